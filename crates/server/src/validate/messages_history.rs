//! Messages of `/v1/messages`.

use ctxserve_chat::{Message, ToolCall};
use serde_json::Value;

use super::history::called;
use super::tools::MAX_NAME;
use crate::error::ApiError;
use crate::wire::chat_request::WireFunctionCall;
use crate::wire::content::Content;
use crate::wire::messages_opaque;
use crate::wire::messages_request::{Block, WireTurn};

/// Claude Code begins its instructions with such a line, which is meant for Anthropic's accounts and differs from request
/// to request: no prefix of the prompt could ever be found in the cache.
const BILLING: &str = "x-anthropic-billing-header:";

/// The turns of a conversation. `sources` gets where each came from: an index in `messages`, or `None` for `system`.
///
/// # Errors
/// 400 naming the part of `system` or `messages`.
pub(super) fn turns(
    system: Option<Content<Block>>,
    messages: Option<Vec<WireTurn>>,
    sources: &mut Vec<Option<usize>>,
) -> Result<Vec<Message>, ApiError> {
    let messages = messages.unwrap_or_default();
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "messages is required and must not be empty"));
    }
    let mut turns = Vec::with_capacity(messages.len() + 1);
    if let Some(text) = text(system, "system", without_billing)?.filter(|text| !text.is_empty()) {
        turns.push(Message::System(text));
        sources.push(None);
    }
    for (index, WireTurn { role, content }) in messages.into_iter().enumerate() {
        let at = format!("messages[{index}].content");
        let Some(content) = content else { return Err(ApiError::invalid(at, "content is required")) };
        match role.as_deref() {
            Some("user") => user(content, &at, &mut turns)?,
            Some("assistant") => turns.push(assistant(content, &at)?),
            Some("system") => {
                turns.push(Message::System(text(Some(content), &at, |text| text)?.unwrap_or_default()));
            }
            _ => {
                let message = "role must be user, assistant or system";
                return Err(ApiError::invalid(format!("messages[{index}].role"), message));
            }
        }
        sources.resize(turns.len(), Some(index));
    }
    Ok(turns)
}

fn without_billing(text: &str) -> &str {
    if text.starts_with(BILLING) { text.split_once('\n').map_or("", |(_, rest)| rest) } else { text }
}

/// Text of blocks that must all be text, each as `edit` leaves it, joined without a separator: a text and the same text
/// in blocks are one prompt.
fn text(
    content: Option<Content<Block>>,
    at: &str,
    edit: impl Fn(&str) -> &str,
) -> Result<Option<String>, ApiError> {
    let blocks = match content {
        None => return Ok(None),
        Some(Content::Text(text)) => return Ok(Some(edit(&text).to_owned())),
        Some(Content::Parts(blocks)) => blocks,
    };
    let mut joined = String::new();
    for (index, block) in blocks.into_iter().enumerate() {
        let at = format!("{at}[{index}]");
        match block.kind.as_deref() {
            Some("text") => joined.push_str(edit(&needed(block.text, &at, "text")?)),
            kind => return Err(unsupported(kind, &at)),
        }
    }
    Ok(Some(joined))
}

fn needed<T>(value: Option<T>, at: &str, field: &str) -> Result<T, ApiError> {
    value.ok_or_else(|| ApiError::invalid(format!("{at}.{field}"), format!("{field} is required")))
}

fn unsupported(kind: Option<&str>, at: &str) -> ApiError {
    let kind: String = kind.unwrap_or_default().chars().take(32).collect();
    let message = match kind.as_str() {
        "" => "a content block needs a type".to_owned(),
        "image" | "document" => {
            format!("blocks of type {kind:?} are not supported; this model reads text only")
        }
        _ => format!("blocks of type {kind:?} are not supported here"),
    };
    ApiError::invalid(at, message)
}

/// Results of tools and text, in their order; texts that follow one another are one message.
fn user(content: Content<Block>, at: &str, turns: &mut Vec<Message>) -> Result<(), ApiError> {
    let said = |content| Message::User { name: None, content };
    let blocks = match content {
        Content::Text(text) => {
            turns.push(said(text));
            return Ok(());
        }
        Content::Parts(blocks) => blocks,
    };
    if blocks.is_empty() {
        return Err(ApiError::invalid(at, "content must not be empty"));
    }
    let mut open: Option<String> = None;
    for (index, block) in blocks.into_iter().enumerate() {
        let at = format!("{at}[{index}]");
        match block.kind.as_deref() {
            Some("text") => open.get_or_insert_default().push_str(&needed(block.text, &at, "text")?),
            Some("tool_result") => {
                turns.extend(open.take().map(said));
                turns.push(result(block, &at)?);
            }
            kind => return Err(unsupported(kind, &at)),
        }
    }
    turns.extend(open.map(said));
    Ok(())
}

fn result(block: Block, at: &str) -> Result<Message, ApiError> {
    let call_id = needed(block.tool_use_id.filter(|id| !id.is_empty()), at, "tool_use_id")?;
    let mut content = text(block.content, &format!("{at}.content"), |text| text)?.unwrap_or_default();
    if block.is_error == Some(true) {
        // Formats have no other place for it.
        content.insert_str(0, if content.is_empty() { "Error" } else { "Error: " });
    }
    Ok(Message::Tool { call_id, content })
}

fn assistant(content: Content<Block>, at: &str) -> Result<Message, ApiError> {
    let blocks = match content {
        Content::Text(text) => {
            return Ok(Message::Assistant { reasoning: None, content: Some(text), tool_calls: Vec::new() });
        }
        Content::Parts(blocks) => blocks,
    };
    let (mut reasoning, mut content, mut tool_calls) = (None::<String>, None::<String>, Vec::new());
    for (index, block) in blocks.into_iter().enumerate() {
        let at = format!("{at}[{index}]");
        match block.kind.as_deref() {
            Some("text") => content.get_or_insert_default().push_str(&needed(block.text, &at, "text")?),
            Some("thinking") => {
                let shown = block.thinking.filter(|text| !text.is_empty());
                let carried = || messages_opaque::omitted(block.signature.as_deref()?);
                if let Some(text) = shown.or_else(carried) {
                    reasoning.get_or_insert_default().push_str(&text);
                }
            }
            // Another service wrote it, and nobody else can read it.
            Some("redacted_thinking") => {}
            Some("tool_use") => tool_calls.push(call(block, &at)?),
            kind => return Err(unsupported(kind, &at)),
        }
    }
    Ok(Message::Assistant { reasoning, content, tool_calls })
}

fn call(block: Block, at: &str) -> Result<ToolCall, ApiError> {
    let id = needed(block.id.filter(|id| !id.is_empty()), at, "id")?;
    let arguments = block.input.map(|input| Value::String(messages_opaque::arguments(&input)));
    let (name, arguments) = called(WireFunctionCall { name: block.name, arguments }).ok_or_else(|| {
        ApiError::invalid(format!("{at}.name"), format!("a tool's name has 1 to {MAX_NAME} characters"))
    })?;
    Ok(ToolCall { id, name, arguments })
}
