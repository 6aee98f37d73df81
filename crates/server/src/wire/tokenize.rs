//! `POST /tokenize` and `POST /detokenize`, in vLLM's shapes.

use ctxserve_core::TokenId;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::schema;

/// What `/tokenize` takes beyond the messages of a chat request.
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub(crate) struct TokenizeFields {
    #[schemars(default, schema_with = "schema::model")]
    pub(crate) model: Option<String>,
    pub(crate) prompt: Option<String>,
    pub(crate) add_generation_prompt: Option<bool>,
    pub(crate) return_token_strs: Option<bool>,
}

/// Answer of `/tokenize`.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct TokenizeResponse {
    pub(crate) count: usize,
    pub(crate) max_model_len: usize,
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) token_strs: Option<Vec<String>>,
}

/// What `/detokenize` takes.
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub(crate) struct DetokenizeFields {
    #[schemars(default, schema_with = "schema::model")]
    pub(crate) model: Option<String>,
    #[schemars(required, schema_with = "schema::tokens")]
    pub(crate) tokens: Option<Vec<TokenId>>,
}

/// Answer of `/detokenize`.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct DetokenizeResponse {
    pub(crate) prompt: String,
}
