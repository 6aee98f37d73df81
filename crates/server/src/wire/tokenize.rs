//! `POST /tokenize` and `POST /detokenize`, in vLLM's shapes.

use ctxserve_core::TokenId;
use serde::{Deserialize, Serialize};

/// What `/tokenize` takes beyond the messages of a chat request.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct TokenizeFields {
    pub(crate) model: Option<String>,
    pub(crate) prompt: Option<String>,
    pub(crate) add_generation_prompt: Option<bool>,
    pub(crate) return_token_strs: Option<bool>,
}

/// Answer of `/tokenize`.
#[derive(Debug, Serialize)]
pub(crate) struct TokenizeResponse {
    pub(crate) count: usize,
    pub(crate) max_model_len: usize,
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) token_strs: Option<Vec<String>>,
}

/// What `/detokenize` takes.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct DetokenizeFields {
    pub(crate) model: Option<String>,
    pub(crate) tokens: Option<Vec<TokenId>>,
}

/// Answer of `/detokenize`.
#[derive(Debug, Serialize)]
pub(crate) struct DetokenizeResponse {
    pub(crate) prompt: String,
}
