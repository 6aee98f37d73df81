//! `POST /v1/messages` and `POST /v1/messages/count_tokens`. Fields that steer Anthropic's own service (`metadata`,
//! `service_tier`, `cache_control`, `context_management` and the like) are not read.

use ctxserve_core::limits;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::content::Content;
use super::schema;

/// Fields of a request.
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub(crate) struct MessagesFields {
    #[schemars(default, schema_with = "schema::model")]
    pub(crate) model: Option<String>,
    /// Cut to what the context holds.
    #[schemars(range(min = 1))]
    pub(crate) max_tokens: Option<u64>,
    pub(crate) stream: Option<bool>,
    #[schemars(default, schema_with = "schema::system")]
    pub(crate) system: Option<Content<Block>>,
    #[schemars(required, length(min = 1))]
    pub(crate) messages: Option<Vec<WireTurn>>,
    #[schemars(default, schema_with = "schema::objects")]
    pub(crate) tools: Option<Vec<WireDeclaration>>,
    pub(crate) tool_choice: Option<WireChoice>,
    #[schemars(default, schema_with = "schema::stop_sequences")]
    pub(crate) stop_sequences: Option<Vec<String>>,
    #[schemars(range(min = 0, max = limits::MAX_TEMPERATURE))]
    pub(crate) temperature: Option<f32>,
    #[schemars(range(max = 1), extend("exclusiveMinimum" = 0))]
    pub(crate) top_p: Option<f32>,
    /// -1 and 0 mean all.
    #[schemars(range(min = -1))]
    pub(crate) top_k: Option<i64>,
    pub(crate) thinking: Option<Thinking>,
    pub(crate) output_config: Option<OutputConfig>,
    #[schemars(default, schema_with = "schema::template_arguments")]
    pub(crate) chat_template_kwargs: Option<Map<String, Value>>,
    /// Where `output_config.format` was before.
    pub(crate) output_format: Option<Map<String, Value>>,
}

/// One message.
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub(crate) struct WireTurn {
    #[schemars(required, extend("enum" = ["user", "assistant", "system"]))]
    pub(crate) role: Option<String>,
    #[schemars(required, schema_with = "schema::blocks")]
    pub(crate) content: Option<Content<Block>>,
}

/// One block of any type; which fields matter depends on it.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Block {
    #[serde(rename = "type")]
    pub(crate) kind: Option<String>,
    pub(crate) text: Option<String>,
    pub(crate) thinking: Option<String>,
    pub(crate) signature: Option<String>,
    pub(crate) id: Option<String>,
    pub(crate) name: Option<String>,
    /// As the client wrote it.
    pub(crate) input: Option<Box<RawValue>>,
    pub(crate) tool_use_id: Option<String>,
    pub(crate) content: Option<Content<Block>>,
    pub(crate) is_error: Option<bool>,
}

/// A tool on offer.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct WireDeclaration {
    #[serde(rename = "type")]
    pub(crate) kind: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) description: Option<String>,
    pub(crate) input_schema: Option<Value>,
    pub(crate) strict: Option<bool>,
    pub(crate) eager_input_streaming: Option<bool>,
}

/// `tool_choice`.
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub(crate) struct WireChoice {
    #[serde(rename = "type")]
    #[schemars(required, extend("enum" = ["auto", "any", "tool", "none"]))]
    pub(crate) kind: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) disable_parallel_tool_use: Option<bool>,
}

/// `thinking`.
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub(crate) struct Thinking {
    #[serde(rename = "type")]
    #[schemars(required, extend("enum" = ["enabled", "disabled", "adaptive"]))]
    pub(crate) kind: Option<String>,
    pub(crate) budget_tokens: Option<u64>,
    #[schemars(extend("enum" = ["summarized", "omitted", null]))]
    pub(crate) display: Option<String>,
}

/// `output_config`.
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub(crate) struct OutputConfig {
    #[schemars(default, schema_with = "schema::effort")]
    pub(crate) effort: Option<String>,
    pub(crate) format: Option<Map<String, Value>>,
}
