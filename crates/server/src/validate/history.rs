//! Messages of a chat request.

use ctxserve_chat::{Conversation, FunctionTool, Message, ToolCall};
use serde_json::Value;

use super::arguments::{TemplateArguments, Told, level};
use super::tools::{MAX_NAME, is_name_byte};
use crate::config::ServerConfig;
use crate::error::ApiError;
use crate::wire::chat_request::{WireFunctionCall, WireMessage, WireToolCall};
use crate::wire::content::{Content, Thought};

/// 400 for a template argument, told apart by whether it is known at all.
fn refused(what: String, known: bool) -> ApiError {
    let param = "chat_template_kwargs";
    if known { ApiError::invalid(param, what) } else { ApiError::unsupported(param, what) }
}

/// The conversation to render.
///
/// # Errors
/// 400 naming the part of `messages`, the field of the effort or `chat_template_kwargs`.
pub(crate) fn conversation(
    config: &ServerConfig,
    messages: Option<Vec<WireMessage>>,
    tools: Vec<FunctionTool>,
    effort: Option<(String, &'static str)>,
    arguments: TemplateArguments<'_>,
) -> Result<Conversation, ApiError> {
    let effort = effort.as_ref().map(|(level, param)| (level.as_str(), *param));
    assemble(config, turns(config, messages)?, tools, effort, arguments)
}

/// Turns, tools and settings of a request of any route; `effort` comes with the field that errors name.
///
/// # Errors
/// 400 naming that field or `chat_template_kwargs`.
pub(crate) fn assemble(
    config: &ServerConfig,
    messages: Vec<Message>,
    tools: Vec<FunctionTool>,
    effort: Option<(&str, &'static str)>,
    arguments: TemplateArguments<'_>,
) -> Result<Conversation, ApiError> {
    let Told { effort: from_arguments, thinking, others } =
        arguments.read().map_err(|(what, known)| refused(what, known))?;
    let effort = effort.map(|(text, param)| level(text).map_err(|what| ApiError::invalid(param, what)));
    Ok(Conversation {
        messages,
        tools,
        reasoning_effort: effort.transpose()?.or(from_arguments),
        thinking,
        template_arguments: others,
        current_date: config.prompt_date.date(),
        keep_reasoning: config.keep_reasoning,
        ..Conversation::default()
    })
}

/// Whether a conversation has as many messages as are allowed; `param` is what they were read from.
///
/// # Errors
/// 400 on `param`.
pub(crate) fn few(config: &ServerConfig, count: usize, param: &str) -> Result<(), ApiError> {
    let most = config.limits.max_messages;
    if count > most {
        let message = format!("{count} messages in one request, at most {most} are allowed");
        return Err(ApiError::invalid(param, message));
    }
    Ok(())
}

fn turns(config: &ServerConfig, messages: Option<Vec<WireMessage>>) -> Result<Vec<Message>, ApiError> {
    let messages = messages.unwrap_or_default();
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "messages is required and must not be empty"));
    }
    few(config, messages.len(), "messages")?;
    let mut turns: Vec<Message> = Vec::with_capacity(messages.len());
    for (index, message) in messages.into_iter().enumerate() {
        let turn = turn(index, message, &turns)?;
        turns.push(turn);
    }
    Ok(turns)
}

/// Where in the request an error is.
struct At(usize);

impl At {
    fn invalid(&self, part: &str, message: &str) -> ApiError {
        let At(index) = self;
        ApiError::invalid(format!("messages[{index}].{part}"), format!("messages[{index}]: {message}"))
    }
}

fn turn(index: usize, message: WireMessage, earlier: &[Message]) -> Result<Message, ApiError> {
    let at = At(index);
    let role = message.role.as_deref().unwrap_or_default();
    let WireMessage { content, name, .. } = message;
    let needed = |content| text(&at, content)?.ok_or_else(|| at.invalid("content", "content is required"));
    Ok(match role {
        "system" => Message::System(needed(content)?),
        "developer" => Message::Developer(needed(content)?),
        "user" => Message::User {
            name: name.filter(|name| !name.is_empty()).map(|name| author(&name)),
            content: needed(content)?,
        },
        "assistant" => {
            let mut tool_calls = Vec::new();
            for (number, call) in message.tool_calls.into_iter().flatten().enumerate() {
                tool_calls.push(tool_call(&at, number, call)?);
            }
            if let Some(call) = message.function_call {
                tool_calls.push(legacy_call(&at, index, call)?);
            }
            let joined = |thoughts: Option<Vec<Thought>>| -> Option<String> {
                Some(thoughts?.into_iter().map(|Thought(text)| text).collect())
            };
            let (content, thoughts) = parts(&at, content)?;
            let spellings = [
                message.reasoning_content,
                message.reasoning,
                joined(message.reasoning_details),
                joined(message.thinking_blocks),
                thoughts,
            ];
            let reasoning = spellings.into_iter().flatten().find(|text| !text.is_empty());
            let content = content.or(message.refusal);
            Message::Assistant { reasoning, content, tool_calls }
        }
        "tool" => {
            let call_id = message.tool_call_id.filter(|id| !id.is_empty());
            let call_id = call_id.ok_or_else(|| at.invalid("tool_call_id", "tool_call_id is required"))?;
            Message::Tool { call_id, content: text(&at, content)?.unwrap_or_default() }
        }
        "function" => {
            let name = name.unwrap_or_default();
            let call_id = latest_call(earlier, &name)
                .ok_or_else(|| at.invalid("name", "no earlier assistant message calls this function"))?;
            Message::Tool { call_id, content: text(&at, content)?.unwrap_or_default() }
        }
        _ => {
            let known = "role must be system, developer, user, assistant, tool or function";
            return Err(at.invalid("role", known));
        }
    })
}

/// The text of content that has no reasoning.
fn text(at: &At, content: Option<Content>) -> Result<Option<String>, ApiError> {
    match parts(at, content)? {
        (text, None) => Ok(text),
        (_, Some(_)) => Err(at.invalid("content", "only assistant messages have parts with reasoning")),
    }
}

/// Text and reasoning.
fn parts(at: &At, content: Option<Content>) -> Result<(Option<String>, Option<String>), ApiError> {
    let Some(content) = content else { return Ok((None, None)) };
    let joined = content.joined().map_err(|(index, what)| at.invalid(&format!("content[{index}]"), &what));
    joined.map(|(text, thoughts)| (Some(text), thoughts))
}

fn tool_call(at: &At, number: usize, call: WireToolCall) -> Result<ToolCall, ApiError> {
    let part = |part: &str| format!("tool_calls[{number}].{part}");
    let Some(function) = call.function else {
        return Err(at.invalid(&part("function"), "a tool call needs a 'function'"));
    };
    let id = call.id.filter(|id| !id.is_empty());
    let id = id.ok_or_else(|| at.invalid(&part("id"), "a tool call needs an 'id'"))?;
    let (name, arguments) = called(function).ok_or_else(|| {
        let message = format!("a function name has 1 to {MAX_NAME} characters");
        at.invalid(&part("function.name"), &message)
    })?;
    Ok(ToolCall { id, name, arguments })
}

/// The old spelling has no ids: the message's index makes one.
fn legacy_call(at: &At, index: usize, call: WireFunctionCall) -> Result<ToolCall, ApiError> {
    let (name, arguments) = called(call).ok_or_else(|| {
        at.invalid("function_call.name", &format!("a function name has 1 to {MAX_NAME} characters"))
    })?;
    Ok(ToolCall { id: format!("function_call_{index}"), name, arguments })
}

/// A name that some model garbled must not end the conversation for good: what cannot stand in a header becomes
/// an underscore. Arguments are kept as text, whatever they were.
pub(crate) fn called(call: WireFunctionCall) -> Option<(String, String)> {
    let name = call.name.filter(|name| !name.is_empty() && name.chars().count() <= MAX_NAME)?;
    let arguments = match call.arguments {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text,
        Some(other) => other.to_string(),
    };
    Some((header_word(&name), arguments))
}

/// An author's name, with what would end a header word replaced.
fn author(name: &str) -> String {
    let unsafe_char = |c: char| c.is_whitespace() || c.is_control() || "<>|\\/".contains(c);
    name.chars().take(MAX_NAME).map(|c| if unsafe_char(c) { '_' } else { c }).collect()
}

fn header_word(text: &str) -> String {
    let safe = |c: char| u8::try_from(c).is_ok_and(is_name_byte);
    text.chars().map(|c| if safe(c) { c } else { '_' }).collect()
}

/// The latest call of `name`: what a `function` message answers.
fn latest_call(earlier: &[Message], name: &str) -> Option<String> {
    earlier.iter().rev().find_map(|message| match message {
        Message::Assistant { tool_calls, .. } => {
            tool_calls.iter().rev().find(|call| call.name == name).map(|call| call.id.clone())
        }
        _ => None,
    })
}
