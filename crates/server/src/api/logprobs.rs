//! Log-probabilities in the shapes of the two routes.

use ctxserve_chat::Tokenizer;
use ctxserve_core::{TokenId, TokenLogprob, TokenLogprobs};
use serde_json::{Map, Number, Value};

use crate::wire::chat_response::{Candidate, ChatLogprob, ChatLogprobs};
use crate::wire::completion_response::CompletionLogprobs;

/// The chat shape.
pub(crate) fn chat(tokenizer: &Tokenizer, entries: &[TokenLogprobs]) -> ChatLogprobs {
    let content = entries
        .iter()
        .map(|entry| ChatLogprob {
            sampled: candidate(tokenizer, entry.sampled),
            top_logprobs: entry.top.iter().map(|&top| candidate(tokenizer, top)).collect(),
        })
        .collect();
    ChatLogprobs { content, refusal: None }
}

fn candidate(tokenizer: &Tokenizer, token: TokenLogprob) -> Candidate {
    let bytes = tokenizer.token_bytes(token.id).unwrap_or_default().to_vec();
    Candidate { token: String::from_utf8_lossy(&bytes).into_owned(), logprob: token.logprob, bytes }
}

/// Grows the legacy shape, which counts characters from the beginning of the choice's text.
#[derive(Debug)]
pub(crate) struct Legacy {
    offset: usize,
    skip_special: bool,
}

impl Legacy {
    /// `echoed` is what stands before the first generated token; `skip_special`, that control tokens have no text.
    pub(crate) fn new(echoed: &str, skip_special: bool) -> Self {
        Self { offset: echoed.chars().count(), skip_special }
    }

    /// Appends entries in the order of their text.
    pub(crate) fn add(
        &mut self,
        tokenizer: &Tokenizer,
        entries: &[TokenLogprobs],
        out: &mut CompletionLogprobs,
    ) {
        for entry in entries {
            let mut top = Map::new();
            for token in entry.top.iter().chain([&entry.sampled]) {
                top.insert(label(tokenizer, token.id), number(token.logprob));
            }
            let bytes = tokenizer.token_bytes(entry.sampled.id).unwrap_or_default();
            out.tokens.push(label(tokenizer, entry.sampled.id));
            out.token_logprobs.push(entry.sampled.logprob);
            out.top_logprobs.push(top);
            out.text_offset.push(self.offset);
            if !(self.skip_special && tokenizer.is_special(entry.sampled.id)) {
                // A character belongs to the token that begins it.
                self.offset += bytes.iter().filter(|&&byte| byte & 0xC0 != 0x80).count();
            }
        }
    }
}

/// Text of a token; bytes that are no text are spelled out, so that different tokens have different labels.
fn label(tokenizer: &Tokenizer, id: TokenId) -> String {
    let bytes = tokenizer.token_bytes(id).unwrap_or_default();
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            let hex: String = bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
            format!("bytes:{hex}")
        }
    }
}

fn number(value: f32) -> Value {
    Number::from_f64(f64::from(value)).map_or(Value::Null, Value::Number)
}
