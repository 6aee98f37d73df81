//! Requests of `/v1/messages`.

use ctxserve_chat::FunctionTool;
use serde_json::{Map, Value, json};

use super::arguments::TemplateArguments;
use super::options::options;
use super::tools::{self, ToolChoice};
use super::{guide, history, messages_history};
use crate::error::ApiError;
use crate::state::ServerState;
use crate::turn::{Places, Turn};
use crate::wire::fields::{GenerationFields, StopField};
use crate::wire::messages_request::{MessagesFields, Thinking, WireChoice, WireDeclaration};

/// Largest budgets of thinking that mean low and medium effort.
const LOW_BUDGET: u64 = 4096;
const MEDIUM_BUDGET: u64 = 16_384;

/// Where the parts of a conversation came from.
#[derive(Debug, Default)]
pub(crate) struct Sources {
    /// For each message of the conversation its index in `messages`; `None` is `system`.
    pub(super) messages: Vec<Option<usize>>,
    /// For each function its index in `tools`.
    tools: Vec<usize>,
}

impl Places for Sources {
    fn prompt(&self) -> &'static str {
        "messages"
    }

    fn message(&self, index: usize) -> String {
        match self.messages.get(index) {
            Some(Some(index)) => format!("messages[{index}]"),
            _ => "system".to_owned(),
        }
    }

    fn call_prefix(&self) -> &'static str {
        "toolu_"
    }

    fn schema(&self, index: usize) -> String {
        let index = self.tools.get(index).copied().unwrap_or(index);
        format!("tools[{index}].input_schema")
    }

    /// Clients look for this text, and for the numbers in it, to know that they should shorten the conversation.
    fn too_long(&self, state: &ServerState, prompt: usize, error: ApiError) -> ApiError {
        let max = state.engine().info().max_model_len;
        if prompt < max {
            return error;
        }
        ApiError { message: format!("prompt is too long: {prompt} tokens > {max} maximum"), ..error }
    }
}

/// Checks a request; `sources` is filled with where its parts came from.
///
/// # Errors
/// 400 naming the field, 404 for an unknown model.
pub(crate) fn turn<'a>(
    state: &ServerState,
    fields: MessagesFields,
    sources: &'a mut Sources,
) -> Result<Turn<'a>, ApiError> {
    let thinking = thinking(fields.thinking.as_ref())?;
    let content =
        content(fields.output_config.as_ref().and_then(|c| c.format.as_ref()), "output_config.format")?
            .or(content(fields.output_format.as_ref(), "output_format")?);
    let shared = GenerationFields {
        model: fields.model,
        stream: fields.stream,
        temperature: fields.temperature,
        top_p: fields.top_p,
        top_k: fields.top_k,
        max_tokens: fields.max_tokens,
        stop: fields.stop_sequences.map(StopField),
        ..GenerationFields::default()
    };
    let options = options(state, shared, None, None).map_err(renamed)?;
    let (functions, strict) = declared(state, fields.tools.unwrap_or_default(), sources)?;
    let choice = choice(state, fields.tool_choice.as_ref(), &functions)?;
    let one_call = fields.tool_choice.and_then(|choice| choice.disable_parallel_tool_use) == Some(true);
    let messages = messages_history::turns(fields.system, fields.messages, &mut sources.messages)?;
    let asked = fields.output_config.as_ref().and_then(|config| config.effort.as_deref());
    let effort = match (&thinking, asked) {
        (Asked::Off, _) => Some(("none", "thinking")),
        (_, Some(effort)) => Some((effort, "output_config.effort")),
        (Asked::On(effort), None) => effort.map(|effort| (effort, "thinking.budget_tokens")),
        (Asked::Nothing, None) => None,
    };
    let arguments =
        TemplateArguments::new(state.config(), state.format(), fields.chat_template_kwargs.as_ref());
    let mut conversation = history::assemble(state.config(), messages, functions, effort, arguments)?;
    match thinking {
        Asked::Nothing => {}
        Asked::On(_) => conversation.thinking = Some(true),
        Asked::Off => conversation.thinking = Some(false),
    }
    let hide_reasoning = matches!(thinking, Asked::Off);
    Ok(Turn { conversation, options, choice, strict, content, one_call, hide_reasoning, places: sources })
}

/// What `thinking` asks for.
enum Asked {
    /// What the model does by itself.
    Nothing,
    /// Thinking, with the effort that its budget stands for.
    On(Option<&'static str>),
    /// None.
    Off,
}

fn thinking(thinking: Option<&Thinking>) -> Result<Asked, ApiError> {
    let Some(Thinking { kind, budget_tokens, display }) = thinking else { return Ok(Asked::Nothing) };
    if !matches!(display.as_deref(), None | Some("summarized" | "omitted")) {
        return Err(ApiError::invalid("thinking.display", "display must be 'summarized' or 'omitted'"));
    }
    Ok(match kind.as_deref() {
        Some("disabled") => Asked::Off,
        Some("adaptive") => Asked::Nothing,
        Some("enabled") => Asked::On(budget_tokens.map(|budget| match budget {
            budget if budget <= LOW_BUDGET => "low",
            budget if budget <= MEDIUM_BUDGET => "medium",
            _ => "high",
        })),
        _ => {
            let message = "the type of thinking must be 'enabled', 'disabled' or 'adaptive'";
            return Err(ApiError::invalid("thinking.type", message));
        }
    })
}

/// The demand for JSON of one of the fields that may hold it.
fn content(format: Option<&Map<String, Value>>, at: &str) -> Result<Option<guide::Content>, ApiError> {
    let Some(format) = format else { return Ok(None) };
    if format.get("type").and_then(Value::as_str) != Some("json_schema") {
        return Err(ApiError::invalid(format!("{at}.type"), "the type of a format must be 'json_schema'"));
    }
    if !format.get("schema").is_some_and(Value::is_object) {
        return Err(ApiError::invalid(format!("{at}.schema"), "the schema must be a JSON Schema object"));
    }
    let mut format = format.clone();
    // The API promises the schema, so what cannot be enforced is refused.
    format.insert("strict".to_owned(), Value::Bool(true));
    guide::json_schema(&format, at).map(Some)
}

/// The shared checks know some fields by another name.
fn renamed(error: ApiError) -> ApiError {
    match error.param.as_deref() {
        Some("stop") => ApiError { param: Some("stop_sequences".to_owned()), ..error },
        _ => error,
    }
}

/// Functions on offer, and which of them are strict. Tools that only Anthropic's own service and models know are left
/// out, so that a client that offers them besides its own still works.
fn declared(
    state: &ServerState,
    tools: Vec<WireDeclaration>,
    sources: &mut Sources,
) -> Result<(Vec<FunctionTool>, Vec<bool>), ApiError> {
    tools::few(state.config(), tools.len())?;
    let (mut functions, mut strict) = (Vec::new(), Vec::new());
    for (index, tool) in tools.into_iter().enumerate() {
        if let Some(kind) = tool.kind.as_deref().filter(|kind| *kind != "custom") {
            tracing::info!(kind = word(kind), index, "skipped a tool of a type that is not served");
            continue;
        }
        let at = |part: &str| match part {
            "parameters" => format!("tools[{index}].input_schema"),
            part => format!("tools[{index}].{part}"),
        };
        functions.push(tools::declared(tool.name, tool.description, tool.input_schema, &at)?);
        strict.push(tool.strict == Some(true));
        sources.tools.push(index);
    }
    Ok((functions, strict))
}

/// The beginning of a client's word, without what has no business in a log line.
fn word(text: &str) -> String {
    text.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '_').take(64).collect()
}

fn choice(
    state: &ServerState,
    choice: Option<&WireChoice>,
    functions: &[FunctionTool],
) -> Result<ToolChoice, ApiError> {
    let invalid = |param: &str, message: &str| Err(ApiError::invalid(param, message));
    let Some(WireChoice { kind, name, .. }) = choice else { return tools::choice(state, None, functions) };
    let asked = match kind.as_deref() {
        Some(kind @ ("auto" | "none")) => json!(kind),
        Some("any") if functions.is_empty() => {
            return invalid("tool_choice", "tool_choice 'any' needs tools");
        }
        Some("any") => json!("required"),
        Some("tool") => match name {
            Some(name) => json!({"type": "function", "name": name}),
            None => return invalid("tool_choice.name", "a tool_choice of type 'tool' needs a 'name'"),
        },
        _ => {
            let message = "the type of tool_choice must be 'auto', 'any', 'tool' or 'none'";
            return invalid("tool_choice.type", message);
        }
    };
    tools::choice(state, Some(&asked), functions)
}
