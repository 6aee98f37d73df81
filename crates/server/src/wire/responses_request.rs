//! `POST /v1/responses`. Items are read one by one in `api::responses::items`: what their fields mean depends on their type.

use ctxserve_core::limits;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::schema;

/// Fields of a request beyond [`super::fields::GenerationFields`].
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub(crate) struct ResponsesFields {
    #[schemars(default, schema_with = "schema::input")]
    pub(crate) input: Option<Value>,
    pub(crate) instructions: Option<String>,
    pub(crate) previous_response_id: Option<String>,
    #[schemars(default, schema_with = "schema::objects")]
    pub(crate) tools: Option<Vec<Value>>,
    #[schemars(default, schema_with = "schema::tool_choice")]
    pub(crate) tool_choice: Option<Value>,
    pub(crate) parallel_tool_calls: Option<bool>,
    pub(crate) reasoning: Option<WireReasoning>,
    pub(crate) text: Option<WireText>,
    /// Cut to what the context holds.
    #[schemars(range(min = 1))]
    pub(crate) max_output_tokens: Option<u64>,
    pub(crate) max_tool_calls: Option<u64>,
    #[schemars(range(max = limits::MAX_LOGPROBS))]
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
    #[schemars(default, schema_with = "schema::template_arguments")]
    pub(crate) chat_template_kwargs: Option<Map<String, Value>>,
}

/// `reasoning`.
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub(crate) struct WireReasoning {
    #[schemars(default, schema_with = "schema::effort")]
    pub(crate) effort: Option<String>,
    pub(crate) summary: Option<String>,
    pub(crate) generate_summary: Option<String>,
}

/// `text`.
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub(crate) struct WireText {
    #[schemars(default, schema_with = "schema::object")]
    pub(crate) format: Option<Value>,
    pub(crate) verbosity: Option<String>,
}

/// A function tool.
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub(crate) struct WireFunctionTool {
    pub(crate) name: Option<String>,
    pub(crate) description: Option<String>,
    #[schemars(default, schema_with = "schema::object")]
    pub(crate) parameters: Option<Value>,
    pub(crate) strict: Option<bool>,
}
