//! `POST /v1/completions`.

use serde::Deserialize;

use super::prompt::Prompt;

/// Fields of a completions request beyond [`super::fields::GenerationFields`].
#[derive(Debug, Default, Deserialize)]
pub(crate) struct CompletionFields {
    pub(crate) prompt: Option<Prompt>,
    pub(crate) echo: Option<bool>,
    pub(crate) logprobs: Option<u64>,
}
