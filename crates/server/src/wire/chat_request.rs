//! `POST /v1/chat/completions` and the messages of `POST /tokenize`.

use ctxserve_core::limits;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::content::{Content, Thought};
use super::schema;
use crate::validate::tools::MAX_NAME;

/// Fields of a chat request beyond [`super::fields::GenerationFields`].
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub(crate) struct ChatFields {
    #[schemars(required, length(min = 1))]
    pub(crate) messages: Option<Vec<WireMessage>>,
    #[schemars(default, schema_with = "schema::tools")]
    pub(crate) tools: Option<Vec<WireTool>>,
    #[schemars(default, schema_with = "schema::tool_choice")]
    pub(crate) tool_choice: Option<Value>,
    pub(crate) parallel_tool_calls: Option<bool>,
    #[schemars(default, schema_with = "schema::effort")]
    pub(crate) reasoning_effort: Option<String>,
    pub(crate) reasoning: Option<ReasoningField>,
    pub(crate) include_reasoning: Option<bool>,
    #[schemars(default, schema_with = "schema::template_arguments")]
    pub(crate) chat_template_kwargs: Option<Map<String, Value>>,
    pub(crate) logprobs: Option<bool>,
    /// Only with `logprobs`.
    #[schemars(range(max = limits::MAX_LOGPROBS))]
    pub(crate) top_logprobs: Option<u64>,
    /// Cut to what the context holds.
    #[schemars(range(min = 1))]
    pub(crate) max_completion_tokens: Option<u64>,
}

/// `reasoning` of a request.
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub(crate) struct ReasoningField {
    #[schemars(default, schema_with = "schema::effort")]
    pub(crate) effort: Option<String>,
    pub(crate) enabled: Option<bool>,
    pub(crate) exclude: Option<bool>,
    #[schemars(default, with = "()")]
    pub(crate) max_tokens: Option<Value>,
}

/// One message of any role; which fields matter depends on it.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[schemars(transform = schema::by_role)]
pub(crate) struct WireMessage {
    #[schemars(required)]
    pub(crate) role: Option<String>,
    pub(crate) content: Option<Content>,
    pub(crate) name: Option<String>,
    pub(crate) reasoning: Option<String>,
    pub(crate) reasoning_content: Option<String>,
    #[schemars(default, schema_with = "schema::thoughts")]
    pub(crate) reasoning_details: Option<Vec<Thought>>,
    #[schemars(default, schema_with = "schema::thoughts")]
    pub(crate) thinking_blocks: Option<Vec<Thought>>,
    pub(crate) refusal: Option<String>,
    pub(crate) tool_calls: Option<Vec<WireToolCall>>,
    pub(crate) tool_call_id: Option<String>,
    pub(crate) function_call: Option<WireFunctionCall>,
}

/// A call in history.
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub(crate) struct WireToolCall {
    #[schemars(required, length(min = 1))]
    pub(crate) id: Option<String>,
    #[schemars(required)]
    pub(crate) function: Option<WireFunctionCall>,
}

/// Name and arguments. Clients send arguments as a string, an object, null or not at all.
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub(crate) struct WireFunctionCall {
    #[schemars(required, length(min = 1, max = MAX_NAME))]
    pub(crate) name: Option<String>,
    pub(crate) arguments: Option<Value>,
}

/// A tool on offer.
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub(crate) struct WireTool {
    #[serde(rename = "type")]
    #[schemars(extend("enum" = ["function", null]))]
    pub(crate) kind: Option<String>,
    #[schemars(required)]
    pub(crate) function: Option<WireFunction>,
}

/// Its function.
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub(crate) struct WireFunction {
    #[schemars(required, schema_with = "schema::function_name")]
    pub(crate) name: Option<String>,
    pub(crate) description: Option<String>,
    #[schemars(default, schema_with = "schema::object")]
    pub(crate) parameters: Option<Value>,
    pub(crate) strict: Option<bool>,
}

/// The declarations of a body that has already been read once, each as the client wrote it.
pub(crate) fn declarations(body: &str) -> Vec<&str> {
    #[derive(Deserialize)]
    struct Declared<'a> {
        #[serde(borrow)]
        tools: Option<Vec<&'a RawValue>>,
    }
    let declared = serde_json::from_str::<Declared<'_>>(body).ok().and_then(|declared| declared.tools);
    declared.into_iter().flatten().map(RawValue::get).collect()
}
