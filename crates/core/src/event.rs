//! What the engine answers: tokens as they are sampled, then exactly one end.

use crate::TokenId;

/// Log-probability of one candidate token, natural logarithm, of the distribution before temperature and
/// filtering (after penalties and bias, none of which change it when unset).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The candidate.
    pub id: TokenId,
    /// `ln p`, finite: minus infinity is reported as the smallest finite value.
    pub logprob: f32,
}

/// Log-probabilities at one position.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The token that was sampled.
    pub sampled: TokenLogprob,
    /// The most likely candidates, best first; as many as asked for.
    pub top: Vec<TokenLogprob>,
}

/// One sampled token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenEvent {
    /// The sampled id. A stop id is delivered too: parsers need it for message framing.
    pub id: TokenId,
    /// Present when the request asked for log-probabilities.
    pub logprobs: Option<Box<TokenLogprobs>>,
}

/// Which token ended a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopCause {
    /// An end-of-turn id of the model or format.
    Eos(TokenId),
    /// An id from the request's own list.
    TokenId(TokenId),
}

/// Why a sequence ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended its turn.
    Stop(StopCause),
    /// `max_tokens` or the context limit.
    Length,
    /// Cancelled by its owner or by shutdown.
    Abort,
    /// This request failed, others go on; the text is for the client.
    Error(String),
    /// The device failed: every request ends so, and the process will exit.
    Fault(String),
}

/// Token counts of one sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Prompt tokens.
    pub prompt: usize,
    /// Of those, tokens found in the prefix cache.
    pub cached: usize,
    /// Generated tokens, stop token included.
    pub generated: usize,
}

/// What a sequence's owner receives, in order; `Finished` is last and comes exactly once.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Prefill has begun: the request left the queue.
    Admitted,
    /// A token was sampled.
    Token(TokenEvent),
    /// The sequence ended.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Its token counts.
        usage: Usage,
    },
}
