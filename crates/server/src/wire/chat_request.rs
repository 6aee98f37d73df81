//! `POST /v1/chat/completions` and the messages of `POST /tokenize`.

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::content::Content;

/// Fields of a chat request beyond [`super::fields::GenerationFields`].
#[derive(Debug, Default, Deserialize)]
pub(crate) struct ChatFields {
    pub(crate) messages: Option<Vec<WireMessage>>,
    pub(crate) tools: Option<Vec<WireTool>>,
    pub(crate) tool_choice: Option<Value>,
    pub(crate) parallel_tool_calls: Option<bool>,
    pub(crate) reasoning_effort: Option<String>,
    pub(crate) include_reasoning: Option<bool>,
    pub(crate) chat_template_kwargs: Option<Map<String, Value>>,
    pub(crate) logprobs: Option<bool>,
    pub(crate) top_logprobs: Option<u64>,
    pub(crate) max_completion_tokens: Option<u64>,
}

/// One message of any role; which fields matter depends on it.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct WireMessage {
    pub(crate) role: Option<String>,
    pub(crate) content: Option<Content>,
    pub(crate) name: Option<String>,
    pub(crate) reasoning: Option<String>,
    pub(crate) reasoning_content: Option<String>,
    pub(crate) refusal: Option<String>,
    pub(crate) tool_calls: Option<Vec<WireToolCall>>,
    pub(crate) tool_call_id: Option<String>,
    pub(crate) function_call: Option<WireFunctionCall>,
}

/// A call in history.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct WireToolCall {
    pub(crate) id: Option<String>,
    pub(crate) function: Option<WireFunctionCall>,
}

/// Name and arguments. Clients send arguments as a string, an object, null or not at all.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct WireFunctionCall {
    pub(crate) name: Option<String>,
    pub(crate) arguments: Option<Value>,
}

/// A tool on offer.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct WireTool {
    #[serde(rename = "type")]
    pub(crate) kind: Option<String>,
    pub(crate) function: Option<WireFunction>,
}

/// Its function.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct WireFunction {
    pub(crate) name: Option<String>,
    pub(crate) description: Option<String>,
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
