//! The control tokens of ChatML.

use ctxserve_core::TokenId;

use crate::{FormatError, Tokenizer};

/// Control tokens that frame turns, found by name in the tokenizer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HermesTokens {
    /// `<|im_start|>`: a turn begins.
    pub start: TokenId,
    /// `<|im_end|>`: a turn ends.
    pub end: TokenId,
    stop: Vec<TokenId>,
}

impl HermesTokens {
    /// Looks the tokens up.
    ///
    /// # Errors
    /// [`FormatError::MissingToken`] for the first one that the tokenizer lacks.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, FormatError> {
        let id = |token: &'static str| {
            tokenizer.special_id(token).ok_or(FormatError::MissingToken { format: "hermes", token })
        };
        let (start, end) = (id("<|im_start|>")?, id("<|im_end|>")?);
        let stop = [Some(end), tokenizer.special_id("<|endoftext|>")].into_iter().flatten().collect();
        Ok(Self { start, end, stop })
    }

    /// Ids that end the assistant's turn: `<|im_end|>` and, where the vocabulary has it, `<|endoftext|>`.
    pub fn stop_ids(&self) -> &[TokenId] {
        &self.stop
    }
}
