//! A conversation as every API shape maps onto it.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::Generated;

/// How long the model should think. [`ReasoningEffort::parse`] takes every spelling that clients send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReasoningEffort {
    /// As little as the format knows.
    None,
    /// OpenAI's smallest.
    Minimal,
    /// Low.
    Low,
    /// Medium, the default of Harmony.
    Medium,
    /// High.
    High,
    /// Above high where a format knows it.
    XHigh,
    /// The format's most.
    Max,
}

impl ReasoningEffort {
    /// Reads the API spelling; `None` when unknown.
    pub fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "none" => Self::None,
            "minimal" => Self::Minimal,
            "low" => Self::Low,
            "medium" => Self::Medium,
            "high" => Self::High,
            "xhigh" => Self::XHigh,
            "max" => Self::Max,
            _ => return None,
        })
    }

    /// The API spelling.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Minimal => "minimal",
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
            Self::XHigh => "xhigh",
            Self::Max => "max",
        }
    }
}

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub struct FunctionTool {
    /// Name, already checked: it lands in message headers.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// JSON Schema of the arguments, key order kept.
    pub parameters: Option<Value>,
    /// The whole declaration as the client sent it: JSON, for formats that show it to the model as it is. Without it
    /// they make one of the other fields.
    pub declaration: Option<String>,
}

/// A call in an assistant turn of the history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ToolCall {
    /// The id that tool results refer to.
    pub id: String,
    /// Function name without namespace.
    pub name: String,
    /// Arguments, as text: usually JSON, whatever the client sent.
    pub arguments: String,
}

/// One turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Operator's instructions, API role `system`.
    System(String),
    /// Operator's instructions, API role `developer`.
    Developer(String),
    /// The user.
    User {
        /// Author's name, if given.
        name: Option<String>,
        /// Text.
        content: String,
    },
    /// The model's earlier turn.
    Assistant {
        /// Reasoning before the answer or the calls.
        reasoning: Option<String>,
        /// Visible text.
        content: Option<String>,
        /// Calls, in order.
        tool_calls: Vec<ToolCall>,
    },
    /// A tool's result.
    Tool {
        /// Which call it answers.
        call_id: String,
        /// Text.
        content: String,
    },
}

/// What is rendered into a prompt.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// Turns, oldest first.
    pub messages: Vec<Message>,
    /// Functions on offer.
    pub tools: Vec<FunctionTool>,
    /// Asked-for effort; `None` is the format's default.
    pub reasoning_effort: Option<ReasoningEffort>,
    /// Whether the model should think before it answers; `None` is what the effort says, else the format's default.
    pub thinking: Option<bool>,
    /// `YYYY-MM-DD` for formats whose prompt states the date; `None` leaves it out.
    pub current_date: Option<String>,
    /// Arguments of the chat template beyond those above, by name: [`crate::ChatFormat::template_arguments`] are read, others are not.
    pub template_arguments: Map<String, Value>,
    /// Keep reasoning of turns before the last final answer, which formats drop by default.
    pub keep_reasoning: bool,
    /// Turns that the model wrote, by their index in `messages`. Where a message says the same, the prompt repeats the ids of
    /// those of its parts that the prompt has anyway.
    pub generated: BTreeMap<usize, Arc<Generated>>,
}

impl Conversation {
    /// The turn that a message repeats, if it is known and says the same.
    pub(crate) fn generated(&self, index: usize) -> Option<&Generated> {
        let turn = self.generated.get(&index)?;
        turn.says(self.messages.get(index)?).then_some(turn)
    }
}
