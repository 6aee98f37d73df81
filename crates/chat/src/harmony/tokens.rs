//! Harmony's control tokens.

use ctxserve_core::TokenId;

use crate::{FormatError, Tokenizer};

/// Control tokens of Harmony, found by name in the tokenizer: another vocabulary has other ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HarmonyTokens {
    /// `<|start|>`: a header begins.
    pub start: TokenId,
    /// `<|end|>`: a message ends, the turn goes on.
    pub end: TokenId,
    /// `<|message|>`: the header ends, content begins.
    pub message: TokenId,
    /// `<|channel|>`: the next header word is the channel.
    pub channel: TokenId,
    /// `<|constrain|>`: the next header word is the content type.
    pub constrain: TokenId,
    /// `<|return|>`: the turn ends with an answer.
    pub ret: TokenId,
    /// `<|call|>`: the turn ends with a call.
    pub call: TokenId,
    /// `<|endoftext|>`, where the vocabulary has it.
    pub endoftext: Option<TokenId>,
    stop: Vec<TokenId>,
}

impl HarmonyTokens {
    /// Looks the tokens up.
    ///
    /// # Errors
    /// [`FormatError::MissingToken`] for the first one that the tokenizer lacks; only `<|endoftext|>` is optional.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, FormatError> {
        let id = |token: &'static str| {
            tokenizer.special_id(token).ok_or(FormatError::MissingToken { format: "harmony", token })
        };
        let (ret, call) = (id("<|return|>")?, id("<|call|>")?);
        let endoftext = tokenizer.special_id("<|endoftext|>");
        Ok(Self {
            start: id("<|start|>")?,
            end: id("<|end|>")?,
            message: id("<|message|>")?,
            channel: id("<|channel|>")?,
            constrain: id("<|constrain|>")?,
            ret,
            call,
            endoftext,
            stop: [Some(ret), Some(call), endoftext].into_iter().flatten().collect(),
        })
    }

    /// Ids that end the assistant's turn: return, call and, if known, endoftext. Never `<|end|>`, which separates
    /// the messages of one turn.
    pub fn stop_ids(&self) -> &[TokenId] {
        &self.stop
    }
}
