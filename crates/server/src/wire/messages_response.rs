//! Answers of `POST /v1/messages`, whole and as events of a stream.

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::value::RawValue;

use super::schema;

/// A whole answer, or its frame at the start of a stream.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct MessageResponse<'a> {
    pub(crate) id: &'a str,
    #[serde(rename = "type")]
    #[schemars(extend("const" = "message"))]
    pub(crate) kind: &'static str,
    #[schemars(extend("const" = "assistant"))]
    pub(crate) role: &'static str,
    pub(crate) model: &'a str,
    pub(crate) content: Vec<ContentBlock>,
    #[serde(flatten)]
    pub(crate) end: EndFields,
    pub(crate) usage: MessageUsage,
}

/// How the answer ended; all null while it has not.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
pub(crate) struct EndFields {
    #[schemars(extend("enum" = ["end_turn", "max_tokens", "stop_sequence", "tool_use", null]))]
    pub(crate) stop_reason: Option<&'static str>,
    pub(crate) stop_sequence: Option<String>,
}

/// One block of an answer.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum ContentBlock {
    Thinking {
        thinking: String,
        signature: String,
    },
    Text {
        text: String,
        citations: Option<()>,
    },
    ToolUse {
        id: String,
        name: String,
        /// An object, as the model wrote it.
        #[schemars(schema_with = "schema::just_object")]
        input: Box<RawValue>,
    },
}

/// Part of a block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(tag = "type")]
pub(crate) enum BlockDelta {
    #[serde(rename = "thinking_delta")]
    Thinking { thinking: String },
    #[serde(rename = "signature_delta")]
    Signature { signature: String },
    #[serde(rename = "text_delta")]
    Text { text: String },
    #[serde(rename = "input_json_delta")]
    Input { partial_json: String },
}

/// Token counts. What was found in the prefix cache is not part of `input_tokens`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub(crate) struct MessageUsage {
    pub(crate) input_tokens: usize,
    pub(crate) cache_creation_input_tokens: usize,
    pub(crate) cache_read_input_tokens: usize,
    pub(crate) output_tokens: usize,
    pub(crate) output_tokens_details: OutputDetails,
}

/// Of the output tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub(crate) struct OutputDetails {
    pub(crate) thinking_tokens: usize,
}

/// One event of a stream.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum StreamEvent<'a> {
    MessageStart { message: MessageResponse<'a> },
    ContentBlockStart { index: usize, content_block: ContentBlock },
    ContentBlockDelta { index: usize, delta: BlockDelta },
    ContentBlockStop { index: usize },
    MessageDelta { delta: EndFields, usage: MessageUsage },
    MessageStop,
}

impl StreamEvent<'_> {
    /// The event's name, which is also its `type`.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::MessageStart { .. } => "message_start",
            Self::ContentBlockStart { .. } => "content_block_start",
            Self::ContentBlockDelta { .. } => "content_block_delta",
            Self::ContentBlockStop { .. } => "content_block_stop",
            Self::MessageDelta { .. } => "message_delta",
            Self::MessageStop => "message_stop",
        }
    }
}

/// The event that keeps a silent stream alive.
pub(crate) const PING: (&str, &str) = ("ping", r#"{"type":"ping"}"#);

/// `POST /v1/messages/count_tokens`.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct TokenCount {
    pub(crate) input_tokens: usize,
}
