//! Reading answers with calls in `<tool_call>` tags, token by token.
//!
//! The parser is total: whatever the model wrote becomes a message. Tags are read as text, so it does not matter
//! whether the model wrote them as the single tokens they are. The rules:
//!
//! - `<tool_call>` begins a call if a JSON object with a `name` on offer and `arguments` follows. The call ends at that
//!   object's last brace, whether or not `</tool_call>` follows. Arguments come byte for byte as written, and stream.
//! - What follows the tag and is no call stays text, with the tag. It does not spoil the calls around it.
//! - A tag within a JSON string is text, unless a raw line break precedes it, which no JSON string contains.
//! - The line break before a call, and white space between calls, are markup. All other text is content.
//! - `<think>` at the start of an answer, or left open by the prompt, begins reasoning, up to `</think>`. A call in
//!   the thinking counts if nothing follows the thinking.
//! - A call whose head was cut off by length is not shown; one whose arguments were cut is, without its end.
//!
//! Every recovery has a name, listed in [`RECOVERIES`].

mod aside;
mod call;
mod machine;
mod recovery;
mod sink;
mod tags;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use ctxserve_core::TokenId;

use crate::{
    Collector, Delta, End, Finish, Outcome, ParsedMessage, ParserOptions, Place, StreamParser, Tokenizer,
    Utf8Stream,
};

use machine::Machine;
use recovery as note;
use sink::Sink;

pub use recovery::RECOVERIES;
pub(super) use tags::{CALL, THINK, THINK_END};

use super::HermesTokens;

/// Parses one answer of the model.
#[derive(Debug)]
pub struct HermesParser {
    tokenizer: Arc<Tokenizer>,
    tokens: HermesTokens,
    utf8: Utf8Stream,
    machine: Machine,
    /// The last token ended the turn.
    over: bool,
}

impl HermesParser {
    /// At the start of an answer.
    pub fn new(tokenizer: Arc<Tokenizer>, tokens: HermesTokens, options: ParserOptions) -> Self {
        let machine = Machine::new(options.calls, options.tools, options.thinking);
        Self { tokenizer, tokens, utf8: Utf8Stream::default(), machine, over: false }
    }

    fn flush(&mut self, sink: &mut Sink<'_>) {
        let mut text = String::new();
        self.utf8.finish(&mut text);
        self.machine.push(&text, sink);
    }
}

/// The message of a whole answer's text; calls may be of any function.
pub(super) fn read(text: &str) -> ParsedMessage {
    let (mut machine, mut deltas) = (Machine::new(true, None, false), Vec::new());
    let mut sink = Sink::new(&mut deltas);
    machine.push(text, &mut sink);
    machine.end(End::Stop, &mut sink);
    let mut collector = Collector::default();
    deltas.iter().for_each(|delta| collector.add(delta));
    collector.into_message()
}

/// Bytes of a token that is text. Of the control tokens, those are that spell a tag.
fn text_of(tokenizer: &Tokenizer, id: TokenId) -> Option<&[u8]> {
    let bytes = tokenizer.token_bytes(id)?;
    let is_tag = || bytes.starts_with(b"<") && !bytes.starts_with(b"<|");
    (!tokenizer.is_control(id) || (!tokenizer.is_special(id) && is_tag())).then_some(bytes)
}

impl StreamParser for HermesParser {
    fn push(&mut self, id: TokenId, out: &mut Vec<Delta>) -> Place {
        let mut sink = Sink::new(out);
        if self.tokens.stop_ids().contains(&id) {
            self.flush(&mut sink);
            self.machine.end(End::Stop, &mut sink);
            if id != self.tokens.end {
                self.machine.notes.add(note::END_OF_TEXT);
            }
            self.over = true;
            return Place::Markup;
        }
        let Some(bytes) = text_of(&self.tokenizer, id) else {
            self.machine.notes.add(note::UNKNOWN_CONTROL);
            return Place::Markup;
        };
        let mut text = String::new();
        self.utf8.push(bytes, &mut text);
        if std::mem::replace(&mut self.over, false) {
            self.machine.notes.add(note::TEXT_AFTER_END);
        }
        let place = self.machine.place();
        if self.machine.push(&text, &mut sink) { Place::Markup } else { place }
    }

    fn finish(&mut self, end: End, out: &mut Vec<Delta>) -> Outcome {
        let mut sink = Sink::new(out);
        self.flush(&mut sink);
        if !self.over {
            self.machine.end(end, &mut sink);
        }
        let over = end == End::Stop || self.over || self.machine.is_whole();
        if self.machine.is_empty() {
            // Clients take null for "there is a call".
            out.push(Delta::Content(String::new()));
        }
        let finish = match (over, self.machine.has_whole_calls()) {
            (false, _) => Finish::Length,
            (true, true) => Finish::ToolCalls,
            (true, false) => Finish::Stop,
        };
        Outcome { finish, recoveries: self.machine.notes.take() }
    }
}
