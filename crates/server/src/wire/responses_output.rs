//! Items that answers are made of. Each of them is accepted as input again.

use schemars::JsonSchema;
use serde::Serialize;

use super::chat_response::ChatLogprob;

/// How far an item or a response has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Status {
    Queued,
    InProgress,
    Completed,
    Incomplete,
    Failed,
    Cancelled,
}

/// One item of `output`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum OutputItem {
    Reasoning {
        id: String,
        /// Always empty: the reasoning itself is in `content`.
        summary: [(); 0],
        content: Vec<ReasoningPart>,
        #[serde(skip_serializing_if = "Option::is_none")]
        encrypted_content: Option<String>,
        status: Status,
    },
    Message {
        id: String,
        status: Status,
        #[schemars(extend("const" = "assistant"))]
        role: &'static str,
        /// Known when the message is complete.
        #[serde(skip_serializing_if = "Option::is_none")]
        #[schemars(extend("enum" = ["commentary", "final_answer"]))]
        phase: Option<&'static str>,
        content: Vec<TextPart>,
    },
    FunctionCall {
        id: String,
        call_id: String,
        name: String,
        arguments: String,
        status: Status,
    },
}

impl OutputItem {
    /// Its id, the same in every event and in the final response.
    pub(crate) fn id(&self) -> &str {
        match self {
            Self::Reasoning { id, .. } | Self::Message { id, .. } | Self::FunctionCall { id, .. } => id,
        }
    }
}

/// Reasoning, as it is.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
#[serde(tag = "type", rename = "reasoning_text")]
pub(crate) struct ReasoningPart {
    pub(crate) text: String,
}

/// Text for the user.
#[derive(Clone, Debug, Default, Serialize, JsonSchema)]
#[serde(tag = "type", rename = "output_text")]
pub(crate) struct TextPart {
    pub(crate) text: String,
    pub(crate) annotations: [(); 0],
    /// Empty unless asked for.
    pub(crate) logprobs: Vec<ChatLogprob>,
}
