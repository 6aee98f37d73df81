//! The texts of Harmony's system and developer messages.

use crate::{FunctionTool, ReasoningEffort};

use super::typescript::argument_type;

/// What the model was trained to be told. An operator's own prompt belongs in the developer message.
const IDENTITY: &str =
    "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06";

const CHANNELS: &str =
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.";

const FUNCTIONS_CHANNEL: &str = "Calls to these tools must go to the commentary channel: 'functions'.";

/// Harmony knows three efforts. `none` and `minimal` are its least, `xhigh` and `max` its most.
fn effort_name(effort: Option<ReasoningEffort>) -> &'static str {
    match effort {
        Some(ReasoningEffort::None | ReasoningEffort::Minimal | ReasoningEffort::Low) => "low",
        Some(ReasoningEffort::Medium) | None => "medium",
        Some(ReasoningEffort::High | ReasoningEffort::XHigh | ReasoningEffort::Max) => "high",
    }
}

/// Content of the system message.
pub(super) fn system(date: Option<&str>, effort: Option<ReasoningEffort>, has_tools: bool) -> String {
    let mut text = IDENTITY.to_owned();
    if let Some(date) = date {
        text.push_str("\nCurrent date: ");
        text.push_str(date);
    }
    text.push_str("\n\nReasoning: ");
    text.push_str(effort_name(effort));
    text.push_str("\n\n");
    text.push_str(CHANNELS);
    if has_tools {
        text.push('\n');
        text.push_str(FUNCTIONS_CHANNEL);
    }
    text
}

/// Content of a developer message; `None` if there is nothing to say.
pub(super) fn developer(instructions: Option<&str>, tools: &[FunctionTool]) -> Option<String> {
    let instructions = instructions.map(|text| format!("# Instructions\n\n{text}"));
    let tools = (!tools.is_empty()).then(|| functions(tools));
    match (instructions, tools) {
        (Some(instructions), Some(tools)) => Some(format!("{instructions}\n\n{tools}")),
        (instructions, tools) => instructions.or(tools),
    }
}

/// The `# Tools` section.
fn functions(tools: &[FunctionTool]) -> String {
    let mut text = "# Tools\n\n## functions\n\nnamespace functions {\n\n".to_owned();
    for tool in tools {
        for line in tool.description.as_deref().unwrap_or_default().lines() {
            text.push_str("// ");
            text.push_str(line);
            text.push('\n');
        }
        let arguments = match &tool.parameters {
            Some(schema) if !schema.is_null() => format!("_: {}", argument_type(schema)),
            _ => String::new(),
        };
        text.push_str(&format!("type {} = ({arguments}) => any;\n\n", tool.name));
    }
    text.push_str("} // namespace functions");
    text
}
