//! Tools on offer, and which of them may be called.

use ctxserve_chat::FunctionTool;
use serde_json::Value;

use crate::config::ServerConfig;
use crate::error::ApiError;
use crate::state::ServerState;
use crate::wire::chat_request::{WireTool, declarations};

/// Longest function name, OpenAI's. Names land in message headers.
pub(crate) const MAX_NAME: usize = 64;

/// Whether calls of the model are delivered as calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Calls {
    /// `auto`, stated or implied.
    Auto,
    /// `none`: their text is content.
    None,
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
    let most = config.max_tools;
    if tools.len() > most {
        let message = format!("{} tools in one request, at most {most} are allowed", tools.len());
        return Err(ApiError::invalid("tools", message));
    }
    let mut functions = Vec::with_capacity(tools.len());
    for ((index, tool), declaration) in tools.into_iter().enumerate().zip(declarations(body)) {
        functions.push(FunctionTool { declaration: Some(declaration.to_owned()), ..function(index, tool)? });
    }
    Ok(functions)
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
    let name = function.name.unwrap_or_default();
    if !is_name(&name) {
        let message = format!("a function name is 1 to {MAX_NAME} letters, digits, '_', '-' or '.'");
        return Err(ApiError::invalid(at("function.name"), message));
    }
    match function.parameters {
        None | Some(Value::Object(_)) => {}
        Some(_) => {
            return Err(ApiError::invalid(
                at("function.parameters"),
                "parameters must be a JSON Schema object",
            ));
        }
    }
    Ok(FunctionTool {
        name,
        description: function.description,
        parameters: function.parameters,
        declaration: None,
    })
}

fn is_name(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(is_name_byte)
}

/// Bytes of a function name.
pub(crate) fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.')
}

/// Reads `tool_choice`. Forcing a call needs constrained decoding, which this server does not have yet.
///
/// # Errors
/// 400 on `tool_choice`.
pub(crate) fn choice(state: &ServerState, choice: Option<&Value>, tools: bool) -> Result<Calls, ApiError> {
    let param = "tool_choice";
    let auto = || {
        if tools && !state.config().enable_auto_tool_choice {
            let message =
                "'auto' tool choice is switched off; start the server with --enable-auto-tool-choice";
            return Err(ApiError::unsupported(param, message));
        }
        Ok(Calls::Auto)
    };
    match choice {
        None | Some(Value::Null) => auto(),
        Some(Value::String(word)) => match word.as_str() {
            "auto" => auto(),
            "none" => Ok(Calls::None),
            "required" => Err(not_yet("required")),
            _ => Err(ApiError::invalid(param, "tool_choice must be 'auto' or 'none'")),
        },
        Some(Value::Object(_)) => Err(not_yet("a named function")),
        Some(_) => Err(ApiError::invalid(param, "tool_choice must be a string or an object")),
    }
}

fn not_yet(what: &str) -> ApiError {
    let message = format!("tool_choice {what} is not supported yet; use 'auto' or 'none'");
    ApiError::unsupported("tool_choice", message)
}
