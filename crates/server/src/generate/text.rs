//! Plain text: generated ids read without any protocol.

use std::sync::Arc;

use ctxserve_chat::{Delta, End, Finish, Outcome, Place, StreamParser, Tokenizer, Utf8Stream};
use ctxserve_core::TokenId;

/// Everything is content. Special tokens are skipped, or shown as their text when asked.
pub(crate) struct TextParser {
    tokenizer: Arc<Tokenizer>,
    utf8: Utf8Stream,
    skip_special: bool,
}

impl TextParser {
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Self {
        Self { tokenizer, utf8: Utf8Stream::default(), skip_special }
    }
}

fn content(text: String, out: &mut Vec<Delta>) {
    if !text.is_empty() {
        out.push(Delta::Content(text));
    }
}

impl StreamParser for TextParser {
    fn push(&mut self, id: TokenId, out: &mut Vec<Delta>) -> Place {
        if self.skip_special && self.tokenizer.is_special(id) {
            return Place::Markup;
        }
        let Some(bytes) = self.tokenizer.token_bytes(id) else { return Place::Markup };
        let mut text = String::new();
        self.utf8.push(bytes, &mut text);
        content(text, out);
        Place::Content
    }

    fn finish(&mut self, end: End, out: &mut Vec<Delta>) -> Outcome {
        let mut text = String::new();
        self.utf8.finish(&mut text);
        content(text, out);
        let finish = match end {
            End::Stop => Finish::Stop,
            End::Cut => Finish::Length,
        };
        Outcome { finish, recoveries: Vec::new() }
    }
}
