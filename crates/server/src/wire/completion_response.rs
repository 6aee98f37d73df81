//! Whole and streamed text completions, which share one shape.

use ctxserve_core::TokenId;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value};

use super::chat_response::StopReason;
use super::schema;
use super::usage::WireUsage;

/// An answer, or one SSE frame of it.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct CompletionResponse<'a> {
    pub(crate) id: &'a str,
    #[schemars(extend("const" = "text_completion"))]
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: &'a str,
    pub(crate) system_fingerprint: &'a str,
    pub(crate) choices: Vec<CompletionChoice>,
    /// As in chat: always in whole answers, in frames only when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) usage: Option<Option<WireUsage>>,
}

/// One choice: its whole text or what is new.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct CompletionChoice {
    pub(crate) index: usize,
    pub(crate) text: String,
    pub(crate) logprobs: Option<CompletionLogprobs>,
    #[schemars(schema_with = "schema::finish_or_none")]
    pub(crate) finish_reason: Option<&'static str>,
    pub(crate) stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_token_ids: Option<Vec<TokenId>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<Vec<TokenId>>,
}

/// The legacy shape: four lists of one length.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub(crate) struct CompletionLogprobs {
    pub(crate) tokens: Vec<String>,
    pub(crate) token_logprobs: Vec<f32>,
    /// Token text to log-probability; the sampled token is always among them.
    pub(crate) top_logprobs: Vec<Map<String, Value>>,
    /// Characters before the token, from the beginning of the choice's text.
    pub(crate) text_offset: Vec<usize>,
}
