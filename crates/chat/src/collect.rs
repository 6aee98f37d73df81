//! Deltas gathered into a whole message.

use crate::Delta;

/// A call the model made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParsedCall {
    /// Function name.
    pub name: String,
    /// Arguments, byte for byte as streamed.
    pub arguments: String,
}

/// A whole message. Absent text is `None`, so that `null` and `""` differ on the wire as they should.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// Text for the user.
    pub content: Option<String>,
    /// Reasoning.
    pub reasoning: Option<String>,
    /// Calls, in order.
    pub calls: Vec<ParsedCall>,
}

/// Gathers deltas. Streaming and whole answers go through the same parser, so they cannot disagree.
#[derive(Clone, Debug, Default)]
pub struct Collector {
    message: Message,
}

impl Collector {
    /// Takes one delta.
    pub fn add(&mut self, delta: &Delta) {
        match delta {
            Delta::Reasoning(text) => self.message.reasoning.get_or_insert_default().push_str(text),
            Delta::Content(text) => self.message.content.get_or_insert_default().push_str(text),
            Delta::CallStart { name, .. } => {
                self.message.calls.push(ParsedCall { name: name.clone(), arguments: String::new() });
            }
            Delta::CallArguments { index, text } => {
                if let Some(call) = self.message.calls.get_mut(*index) {
                    call.arguments.push_str(text);
                }
            }
            Delta::CallEnd { .. } => {}
        }
    }

    /// The message so far.
    pub fn message(&self) -> &Message {
        &self.message
    }

    /// Gives the message away.
    pub fn into_message(self) -> Message {
        self.message
    }
}
