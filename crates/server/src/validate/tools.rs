//! Tools on offer, and which of them may be called.

use ctxserve_chat::FunctionTool;
use ctxserve_chat::guide::CallRule;
use serde_json::Value;

use crate::config::ServerConfig;
use crate::error::ApiError;
use crate::state::ServerState;
use crate::wire::chat_request::{WireTool, declarations};

/// Longest function name, OpenAI's. Names land in message headers.
pub(crate) const MAX_NAME: usize = 64;

/// What `tool_choice` asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ToolChoice {
    pub(crate) rule: CallRule,
    /// The functions that it is about; `None` is all.
    names: Option<Vec<String>>,
    /// It names one function.
    pub(crate) is_named: bool,
}

impl ToolChoice {
    /// Whether the model may call the function.
    pub(crate) fn includes(&self, name: &str) -> bool {
        self.names.as_ref().is_none_or(|names| names.iter().any(|known| known == name))
    }
}

/// Checks the declarations; `body` is what they were read from.
///
/// # Errors
/// 400 naming the part of `tools`.
pub(crate) fn tools(
    config: &ServerConfig,
    tools: Option<Vec<WireTool>>,
    body: &str,
) -> Result<Vec<FunctionTool>, ApiError> {
    let tools = tools.unwrap_or_default();
    if tools.is_empty() {
        return Ok(Vec::new());
    }
    few(config, tools.len())?;
    let mut functions = Vec::with_capacity(tools.len());
    for ((index, tool), declaration) in tools.into_iter().enumerate().zip(declarations(body)) {
        functions.push(FunctionTool { declaration: Some(declaration.to_owned()), ..function(index, tool)? });
    }
    Ok(functions)
}

/// Bounds how many tools a request may have.
///
/// # Errors
/// 400 on `tools`.
pub(crate) fn few(config: &ServerConfig, count: usize) -> Result<(), ApiError> {
    let most = config.limits.max_tools;
    if count > most {
        let message = format!("{count} tools in one request, at most {most} are allowed");
        return Err(ApiError::invalid("tools", message));
    }
    Ok(())
}

fn function(index: usize, tool: WireTool) -> Result<FunctionTool, ApiError> {
    let at = |part: &str| format!("tools[{index}].{part}");
    match tool.kind.as_deref() {
        None | Some("function") => {}
        Some(_) => {
            return Err(ApiError::unsupported(at("type"), "only tools of type 'function' are supported"));
        }
    }
    let Some(function) = tool.function else {
        return Err(ApiError::invalid(at("function"), "a tool needs a 'function'"));
    };
    let at = |part: &str| format!("tools[{index}].function.{part}");
    declared(function.name, function.description, function.parameters, &at)
}

/// Checks one function; `at` says how the route calls its `name` and its `parameters`.
///
/// # Errors
/// 400 naming the part.
pub(crate) fn declared(
    name: Option<String>,
    description: Option<String>,
    parameters: Option<Value>,
    at: &dyn Fn(&str) -> String,
) -> Result<FunctionTool, ApiError> {
    let name = name.unwrap_or_default();
    if !is_name(&name) {
        let message = format!("a function name is 1 to {MAX_NAME} letters, digits, '_', '-' or '.'");
        return Err(ApiError::invalid(at("name"), message));
    }
    match parameters {
        None | Some(Value::Object(_)) => {}
        Some(_) => {
            return Err(ApiError::invalid(at("parameters"), "parameters must be a JSON Schema object"));
        }
    }
    Ok(FunctionTool { name, description, parameters, declaration: None })
}

fn is_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(is_name_byte)
}

/// Bytes of a function name.
pub(crate) fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.')
}

/// Reads `tool_choice`.
///
/// # Errors
/// 400 on `tool_choice`.
pub(crate) fn choice(
    state: &ServerState,
    choice: Option<&Value>,
    tools: &[FunctionTool],
) -> Result<ToolChoice, ApiError> {
    let invalid = |message: &str| Err(ApiError::invalid(PARAM, message));
    let named = |names: Vec<String>, rule, is_named| match names.iter().find(|name| !is_declared(tools, name))
    {
        Some(name) => {
            let shown: String = name.chars().take(MAX_NAME).collect();
            Err(ApiError::invalid(
                PARAM,
                format!("tool_choice names the function '{shown}', which tools do not have"),
            ))
        }
        None if names.is_empty() => invalid("tool_choice allows no function"),
        None => Ok(ToolChoice { rule, names: Some(names), is_named }),
    };
    match choice {
        None | Some(Value::Null) => auto(state, tools),
        Some(Value::String(word)) => match word.as_str() {
            "auto" => auto(state, tools),
            "none" => Ok(ToolChoice { rule: CallRule::Forbidden, ..ToolChoice::default() }),
            "required" if tools.is_empty() => invalid("tool_choice 'required' needs tools"),
            "required" => Ok(ToolChoice { rule: CallRule::Required, ..ToolChoice::default() }),
            _ => invalid("tool_choice must be 'auto', 'none', 'required' or name a function"),
        },
        Some(Value::Object(map)) => match map.get("type").and_then(Value::as_str) {
            None | Some("function") => match function_name(choice.unwrap_or(&Value::Null)) {
                Some(name) => named(vec![name], CallRule::Required, true),
                None => invalid("a tool_choice of type 'function' needs the 'name' of a 'function'"),
            },
            Some("allowed_tools") => {
                // The Responses API has its fields beside the type.
                let allowed = map.get("allowed_tools").and_then(Value::as_object).unwrap_or(map);
                let rule = match allowed.get("mode").and_then(Value::as_str) {
                    Some("auto") => auto(state, tools)?.rule,
                    Some("required") => CallRule::Required,
                    _ => return invalid("the mode of allowed_tools must be 'auto' or 'required'"),
                };
                let list =
                    allowed.get("tools").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
                match list.iter().map(function_name).collect::<Option<Vec<_>>>() {
                    Some(names) => named(names, rule, false),
                    None => invalid("the tools of allowed_tools must be functions with a 'name'"),
                }
            }
            Some(_) => invalid("the type of tool_choice must be 'function' or 'allowed_tools'"),
        },
        Some(_) => invalid("tool_choice must be a string or an object"),
    }
}

const PARAM: &str = "tool_choice";

fn auto(state: &ServerState, tools: &[FunctionTool]) -> Result<ToolChoice, ApiError> {
    if !tools.is_empty() && !state.config().enable_auto_tool_choice {
        let message = "'auto' tool choice is switched off; start the server with --enable-auto-tool-choice";
        return Err(ApiError::unsupported(PARAM, message));
    }
    Ok(ToolChoice::default())
}

fn is_declared(tools: &[FunctionTool], name: &str) -> bool {
    tools.iter().any(|tool| tool.name == name)
}

/// `{"type": "function", "function": {"name": ...}}`, or with the name beside the type as the Responses API has it.
fn function_name(value: &Value) -> Option<String> {
    let name = value["function"]["name"].as_str().or_else(|| value["name"].as_str())?;
    (!name.is_empty()).then(|| name.to_owned())
}
