//! Turns as the model wrote them. A prompt that repeats one id for id begins with what was computed before.

use ctxserve_core::TokenId;

use crate::jinja::{Json, parse_json};
use crate::{Message, ParsedMessage};

/// A turn that the model wrote, well-formed: read without a recovery, and ended by one of the format's stop tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Generated {
    /// All that it says, hidden reasoning too, as the format's parser read it.
    pub said: ParsedMessage,
    /// [`crate::ChatFormat::turn_head`] of the prompt that it answered.
    pub head: Box<[TokenId]>,
    /// The ids as sampled, stop token included.
    pub ids: Box<[TokenId]>,
}

impl Generated {
    /// Whether a message of the history says what this turn said: the same content and calls, and the same reasoning or
    /// none. Ids of calls are not compared. Absent and empty content are one; arguments may differ in white space, as
    /// clients that keep them as objects write them anew.
    pub fn says(&self, message: &Message) -> bool {
        let Message::Assistant { reasoning, content, tool_calls } = message else { return false };
        reasoning.as_ref().is_none_or(|text| self.said.reasoning.as_ref() == Some(text))
            && content.as_deref().unwrap_or_default() == self.said.content.as_deref().unwrap_or_default()
            && tool_calls.len() == self.said.calls.len()
            && tool_calls.iter().zip(&self.said.calls).all(|(theirs, mine)| {
                theirs.name == mine.name && same_json(&theirs.arguments, &mine.arguments)
            })
    }
}

/// Equality of the values, numbers by their spelling and keys in their order; of the texts where they are no JSON.
pub(crate) fn same_json(a: &str, b: &str) -> bool {
    let value = |text: &str| parse_json(text.trim());
    a == b || value(a).is_some_and(|a: Json| value(b).is_some_and(|b| a == b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ParsedCall, ToolCall};

    fn turn() -> Generated {
        let calls =
            vec![ParsedCall { name: "f".to_owned(), arguments: r#"{"a": 1.0, "b": "é"}"#.to_owned() }];
        let said = ParsedMessage { content: None, reasoning: Some("Hm.".to_owned()), calls };
        Generated { said, ..Generated::default() }
    }

    fn message(reasoning: Option<&str>, content: Option<&str>, name: &str, arguments: &str) -> Message {
        Message::Assistant {
            reasoning: reasoning.map(str::to_owned),
            content: content.map(str::to_owned),
            tool_calls: vec![ToolCall {
                id: "any".to_owned(),
                name: name.to_owned(),
                arguments: arguments.to_owned(),
            }],
        }
    }

    /// HAR-07: only a message that says the same is rendered by the ids of the turn.
    #[test]
    fn har_07_only_the_same_words_are_the_turn_s() {
        let exact = r#"{"a": 1.0, "b": "é"}"#;
        for (reasoning, content, arguments) in [
            (Some("Hm."), None, exact),
            (None, None, exact),
            (None, Some(""), exact),
            (None, None, "{\"a\":1.0,\n\"b\":\"\\u00e9\"}"),
        ] {
            assert!(turn().says(&message(reasoning, content, "f", arguments)), "{arguments}");
        }
        for (reasoning, content, name, arguments) in [
            (Some("Hm"), None, "f", exact),
            (Some(""), None, "f", exact),
            (None, Some(" "), "f", exact),
            (None, None, "g", exact),
            (None, None, "f", r#"{"a": 1, "b": "é"}"#),
            (None, None, "f", r#"{"b": "é", "a": 1.0}"#),
            (None, None, "f", r#"{"a": 1.0, "b": "e"}"#),
            (None, None, "f", r#"{"a": 1.0, "b": "é"} "x""#),
            (None, None, "f", ""),
        ] {
            assert!(!turn().says(&message(reasoning, content, name, arguments)), "{name} {arguments}");
        }
        let bare = Message::Assistant { reasoning: None, content: None, tool_calls: Vec::new() };
        assert!(!turn().says(&bare) && !turn().says(&Message::System(String::new())));
    }
}
