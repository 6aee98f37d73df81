//! Whole and streamed chat answers.

use ctxserve_core::TokenId;
use schemars::JsonSchema;
use serde::Serialize;

use super::schema;
use super::usage::WireUsage;

/// What matched to end a choice: a stop string, a stop token id, or neither (vLLM's extension).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(untagged)]
pub(crate) enum StopReason {
    Text(String),
    Token(TokenId),
}

/// A whole answer.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ChatResponse<'a> {
    pub(crate) id: &'a str,
    #[schemars(extend("const" = "chat.completion"))]
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: &'a str,
    pub(crate) system_fingerprint: &'a str,
    pub(crate) choices: Vec<ChatChoice>,
    pub(crate) usage: WireUsage,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_token_ids: Option<&'a [TokenId]>,
}

/// One of its choices.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ChatChoice {
    pub(crate) index: usize,
    pub(crate) message: ChatMessage,
    pub(crate) logprobs: Option<ChatLogprobs>,
    #[schemars(schema_with = "schema::finish")]
    pub(crate) finish_reason: &'static str,
    pub(crate) stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<Vec<TokenId>>,
}

/// The message. Reasoning goes by the names that clients read, or by the one that the operator chose.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ChatMessage {
    #[schemars(extend("const" = "assistant"))]
    pub(crate) role: &'static str,
    pub(crate) content: Option<String>,
    pub(crate) refusal: Option<String>,
    pub(crate) reasoning: Option<String>,
    pub(crate) reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<WireCall>,
}

/// A call, whole.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct WireCall {
    pub(crate) id: String,
    #[serde(rename = "type")]
    #[schemars(extend("const" = "function"))]
    pub(crate) kind: &'static str,
    pub(crate) function: WireCallFunction,
}

/// Its function.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct WireCallFunction {
    pub(crate) name: String,
    pub(crate) arguments: String,
}

/// `logprobs` of a choice or a chunk.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ChatLogprobs {
    pub(crate) content: Vec<ChatLogprob>,
    pub(crate) refusal: Option<()>,
}

/// One visible token.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct ChatLogprob {
    #[serde(flatten)]
    pub(crate) sampled: Candidate,
    pub(crate) top_logprobs: Vec<Candidate>,
}

/// A token with its text, its exact bytes and its log-probability.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub(crate) struct Candidate {
    pub(crate) token: String,
    pub(crate) logprob: f32,
    pub(crate) bytes: Vec<u8>,
}

/// One SSE frame.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ChatChunk<'a> {
    pub(crate) id: &'a str,
    #[schemars(extend("const" = "chat.completion.chunk"))]
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: &'a str,
    pub(crate) system_fingerprint: &'a str,
    pub(crate) choices: Vec<ChunkChoice>,
    /// Absent unless usage was asked for, then null in all frames but the last (or in none with continuous
    /// statistics).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) usage: Option<Option<WireUsage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_token_ids: Option<&'a [TokenId]>,
}

/// The one choice of a frame.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct ChunkChoice {
    pub(crate) index: usize,
    pub(crate) delta: ChunkDelta,
    pub(crate) logprobs: Option<ChatLogprobs>,
    #[schemars(schema_with = "schema::finish_or_none")]
    pub(crate) finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<Vec<TokenId>>,
}

/// What is new. Absent means unchanged: null would overwrite in some clients.
#[derive(Debug, Default, Serialize, JsonSchema)]
#[schemars(transform = schema::absent_not_null)]
pub(crate) struct ChunkDelta {
    #[schemars(extend("enum" = ["assistant"]))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tool_calls: Option<[CallDelta; 1]>,
}

/// Part of a call: the first has id, type and the whole name, later ones only arguments.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(transform = schema::absent_not_null)]
pub(crate) struct CallDelta {
    pub(crate) index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    #[schemars(extend("enum" = ["function"]))]
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<&'static str>,
    pub(crate) function: FunctionDelta,
}

/// Part of its function.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(transform = schema::absent_not_null)]
pub(crate) struct FunctionDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    pub(crate) arguments: String,
}
