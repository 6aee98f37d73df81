//! What the engine is asked to do: token ids in, sampling rules, stop rules.

use std::sync::Arc;

use crate::{Guide, RequestId, SamplingParams, TokenId};

/// When a sequence ends by the model's own token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopRules {
    /// End-of-turn ids of the model and the chat format. Skipped when `ignore_eos` is set.
    pub eos: Arc<[TokenId]>,
    /// Ids that this request asked to stop on, honoured even with `ignore_eos`.
    pub token_ids: Vec<TokenId>,
    /// Generate past end-of-turn ids, up to `max_tokens` (benchmarks).
    pub ignore_eos: bool,
}

impl StopRules {
    /// Whether sampling `id` ends the sequence.
    pub fn stops_on(&self, id: TokenId) -> bool {
        self.token_ids.contains(&id) || (!self.ignore_eos && self.eos.contains(&id))
    }

    /// Every id that would end the sequence: what must not be sampled before `min_tokens`.
    pub fn all(&self) -> impl Iterator<Item = TokenId> + '_ {
        let eos = if self.ignore_eos { &[][..] } else { &self.eos[..] };
        eos.iter().chain(&self.token_ids).copied()
    }
}

/// One sequence to generate. A request with `n > 1` becomes `n` of these sharing one prompt.
///
/// The submitter has checked every id against the logits width and every number against
/// [`crate::limits`]; the engine checks the context length again and trusts the rest.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// The server's name for it, for logs.
    pub id: RequestId,
    /// Prompt ids, at least one.
    pub prompt: Arc<[TokenId]>,
    /// How to pick tokens.
    pub sampling: SamplingParams,
    /// When to end.
    pub stop: StopRules,
    /// Most tokens to generate, stop token included; already clamped to the context.
    pub max_tokens: usize,
    /// What the answer may be; `None` is anything.
    pub guide: Option<Guide>,
    /// Requests share what was computed for the beginnings of their prompts where their salts are equal, and only there.
    pub salt: Option<Arc<str>>,
}
