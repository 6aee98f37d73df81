//! The response object, whole and inside events.

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::chat_response::ChatLogprob;
use super::responses_output::{OutputItem, ReasoningPart, Status, TextPart};
use super::schema;

/// A response.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct WireResponse<'a> {
    pub(crate) id: &'a str,
    #[schemars(extend("const" = "response"))]
    pub(crate) object: &'static str,
    pub(crate) created_at: u64,
    pub(crate) completed_at: Option<u64>,
    pub(crate) status: Status,
    pub(crate) error: Option<&'a ResponseError>,
    pub(crate) incomplete_details: Option<IncompleteDetails>,
    pub(crate) output: &'a [OutputItem],
    pub(crate) usage: Option<ResponsesUsage>,
    #[serde(flatten)]
    pub(crate) echo: &'a Echo,
}

/// What the request asked for, with defaults filled in.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct Echo {
    pub(crate) model: String,
    pub(crate) background: bool,
    pub(crate) frequency_penalty: f32,
    pub(crate) instructions: Option<String>,
    pub(crate) max_output_tokens: Option<u64>,
    pub(crate) max_tool_calls: Option<u64>,
    pub(crate) metadata: Map<String, Value>,
    pub(crate) parallel_tool_calls: bool,
    pub(crate) presence_penalty: f32,
    pub(crate) previous_response_id: Option<String>,
    pub(crate) prompt_cache_key: Option<String>,
    pub(crate) reasoning: EchoReasoning,
    pub(crate) safety_identifier: Option<String>,
    pub(crate) service_tier: &'static str,
    pub(crate) store: bool,
    pub(crate) temperature: f32,
    pub(crate) text: EchoText,
    pub(crate) tool_choice: Value,
    pub(crate) tools: Vec<EchoTool>,
    pub(crate) top_logprobs: u64,
    pub(crate) top_p: f32,
    pub(crate) truncation: &'static str,
    pub(crate) user: Option<String>,
}

/// `reasoning`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct EchoReasoning {
    pub(crate) effort: Option<String>,
    pub(crate) summary: Option<String>,
}

/// `text`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct EchoText {
    pub(crate) format: Value,
    pub(crate) verbosity: &'static str,
}

/// A function tool on offer.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(tag = "type", rename = "function")]
pub(crate) struct EchoTool {
    pub(crate) name: String,
    pub(crate) description: Option<String>,
    pub(crate) parameters: Option<Value>,
    pub(crate) strict: bool,
}

/// Why a response failed.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct ResponseError {
    pub(crate) code: &'static str,
    pub(crate) message: String,
}

/// Why a response is incomplete.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub(crate) struct IncompleteDetails {
    pub(crate) reason: &'static str,
}

/// Token counts; the details are always there.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub(crate) struct ResponsesUsage {
    pub(crate) input_tokens: usize,
    pub(crate) input_tokens_details: InputDetails,
    pub(crate) output_tokens: usize,
    pub(crate) output_tokens_details: OutputDetails,
    pub(crate) total_tokens: usize,
}

/// Of the input tokens.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub(crate) struct InputDetails {
    pub(crate) cached_tokens: usize,
    /// Nobody pays for writing to the cache here.
    pub(crate) cache_write_tokens: usize,
}

/// Of the output tokens.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub(crate) struct OutputDetails {
    pub(crate) reasoning_tokens: usize,
}

/// One event of a stream.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct WireEvent<'a> {
    #[serde(rename = "type")]
    pub(crate) kind: &'static str,
    /// Counts the events of a response from 0.
    pub(crate) sequence_number: u64,
    #[serde(flatten)]
    pub(crate) body: EventBody<'a>,
}

/// What an event says beside its type and number.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(untagged)]
pub(crate) enum EventBody<'a> {
    /// `response.created` and the others about the whole.
    Response { response: Box<WireResponse<'a>> },
    /// `response.output_item.added` and `.done`.
    Item { output_index: usize, item: &'a OutputItem },
    /// `response.content_part.added` and `.done`.
    Part { item_id: &'a str, output_index: usize, content_index: usize, part: WirePart<'a> },
    /// `response.output_text.delta`.
    TextDelta {
        item_id: &'a str,
        output_index: usize,
        content_index: usize,
        delta: &'a str,
        logprobs: &'a [ChatLogprob],
    },
    /// `response.output_text.done`.
    TextDone {
        item_id: &'a str,
        output_index: usize,
        content_index: usize,
        text: &'a str,
        logprobs: &'a [ChatLogprob],
    },
    /// `response.reasoning_text.delta`.
    ReasoningDelta { item_id: &'a str, output_index: usize, content_index: usize, delta: &'a str },
    /// `response.reasoning_text.done`.
    ReasoningDone { item_id: &'a str, output_index: usize, content_index: usize, text: &'a str },
    /// `response.function_call_arguments.delta`.
    ArgumentsDelta { item_id: &'a str, output_index: usize, delta: &'a str },
    /// `response.function_call_arguments.done`.
    ArgumentsDone { item_id: &'a str, output_index: usize, name: &'a str, arguments: &'a str },
    /// `error`.
    Error { code: Option<&'static str>, message: &'a str, param: Option<&'a str> },
}

/// A content part of an event.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(untagged)]
pub(crate) enum WirePart<'a> {
    Text(&'a TextPart),
    Reasoning(&'a ReasoningPart),
}

/// Answer to `DELETE`.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct Deleted<'a> {
    pub(crate) id: &'a str,
    pub(crate) object: &'static str,
    pub(crate) deleted: bool,
}

/// Answer to `POST /v1/responses/input_tokens`.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct InputTokens {
    #[schemars(extend("const" = "response.input_tokens"))]
    pub(crate) object: &'static str,
    pub(crate) input_tokens: usize,
}

/// A page of items.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ItemList<'a> {
    pub(crate) object: &'static str,
    #[schemars(schema_with = "schema::list")]
    pub(crate) data: Vec<Box<RawValue>>,
    pub(crate) first_id: Option<&'a str>,
    pub(crate) last_id: Option<&'a str>,
    pub(crate) has_more: bool,
}
