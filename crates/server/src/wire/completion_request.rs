//! `POST /v1/completions`.

use ctxserve_core::limits;
use schemars::JsonSchema;
use serde::Deserialize;

use super::prompt::Prompt;

/// Fields of a completions request beyond [`super::fields::GenerationFields`].
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub(crate) struct CompletionFields {
    #[schemars(required)]
    pub(crate) prompt: Option<Prompt>,
    pub(crate) echo: Option<bool>,
    /// Not with `echo`.
    #[schemars(range(max = limits::MAX_LOGPROBS))]
    pub(crate) logprobs: Option<u64>,
}
