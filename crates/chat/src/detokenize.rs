//! From token ids to whole characters, incrementally.

use std::sync::Arc;

use ctxserve_core::TokenId;

use crate::Tokenizer;

/// Bytes in, whole characters out. However the bytes are cut, the text pushed and finished equals
/// [`String::from_utf8_lossy`] of all of them.
#[derive(Clone, Debug, Default)]
pub struct Utf8Stream {
    /// At most three bytes: the valid start of a character whose rest has not come.
    held: Vec<u8>,
}

impl Utf8Stream {
    /// Appends the characters that `bytes` completes; a byte that cannot be part of any is U+FFFD.
    pub fn push(&mut self, bytes: &[u8], out: &mut String) {
        self.held.extend_from_slice(bytes);
        let mut rest: &[u8] = &self.held;
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, tail) = rest.split_at(error.valid_up_to());
                    out.push_str(&String::from_utf8_lossy(valid));
                    rest = tail;
                    let Some(bad) = error.error_len() else { break };
                    out.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[bad..];
                }
            }
        }
        let done = self.held.len() - rest.len();
        self.held.drain(..done);
    }

    /// Whether a character has begun and not ended.
    pub fn is_mid_character(&self) -> bool {
        !self.held.is_empty()
    }

    /// Ends the text: a cut character is one U+FFFD. The stream is then as new.
    pub fn finish(&mut self, out: &mut String) {
        if !self.held.is_empty() {
            self.held.clear();
            out.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

/// Ids in, whole characters out; special tokens are skipped. All pushes and the finish together equal
/// [`Tokenizer::decode`] of all the ids with `skip_special`.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    stream: Utf8Stream,
}

impl Detokenizer {
    /// At the start of a text.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self { tokenizer, stream: Utf8Stream::default() }
    }

    /// Takes one id, of whatever value, and gives the text it made certain.
    pub fn push(&mut self, id: TokenId) -> String {
        let mut out = String::new();
        if !self.tokenizer.is_special(id)
            && let Some(bytes) = self.tokenizer.token_bytes(id)
        {
            self.stream.push(bytes, &mut out);
        }
        out
    }

    /// Ends the text: a cut character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        let mut out = String::new();
        self.stream.finish(&mut out);
        out
    }
}
