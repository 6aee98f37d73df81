//! `POST /v1/responses`. Items are read one by one in `api::responses::items`: what their fields mean depends on their type.

use serde::Deserialize;
use serde_json::{Map, Value};

/// Fields of a request beyond [`super::fields::GenerationFields`].
#[derive(Debug, Default, Deserialize)]
pub(crate) struct ResponsesFields {
    pub(crate) input: Option<Value>,
    pub(crate) instructions: Option<String>,
    pub(crate) previous_response_id: Option<String>,
    pub(crate) tools: Option<Vec<Value>>,
    pub(crate) tool_choice: Option<Value>,
    pub(crate) parallel_tool_calls: Option<bool>,
    pub(crate) reasoning: Option<WireReasoning>,
    pub(crate) text: Option<WireText>,
    pub(crate) max_output_tokens: Option<u64>,
    pub(crate) max_tool_calls: Option<u64>,
    pub(crate) top_logprobs: Option<u64>,
    pub(crate) include: Option<Vec<String>>,
    pub(crate) metadata: Option<Map<String, Value>>,
    pub(crate) store: Option<bool>,
    pub(crate) background: Option<bool>,
    pub(crate) truncation: Option<String>,
    pub(crate) service_tier: Option<String>,
    pub(crate) user: Option<String>,
    pub(crate) safety_identifier: Option<String>,
    pub(crate) prompt_cache_key: Option<String>,
    pub(crate) chat_template_kwargs: Option<Map<String, Value>>,
}

/// `reasoning`.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct WireReasoning {
    pub(crate) effort: Option<String>,
    pub(crate) summary: Option<String>,
    pub(crate) generate_summary: Option<String>,
}

/// `text`.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct WireText {
    pub(crate) format: Option<Value>,
    pub(crate) verbosity: Option<String>,
}

/// A function tool.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct WireFunctionTool {
    pub(crate) name: Option<String>,
    pub(crate) description: Option<String>,
    pub(crate) parameters: Option<Value>,
    pub(crate) strict: Option<bool>,
}
