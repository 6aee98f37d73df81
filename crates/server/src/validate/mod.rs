//! From wire types to what the engine and the chat format take. Every bound on a client's number is in
//! [`crate::limits`] or [`ctxserve_core::limits`], once for all routes.

pub(crate) mod arguments;
pub(crate) mod guide;
pub(crate) mod history;
pub(crate) mod messages;
mod messages_history;
pub(crate) mod options;
pub(crate) mod prompts;
pub(crate) mod reasoning;
pub(crate) mod tools;

use ctxserve_chat::{ChatFormat, Conversation};

use crate::config::ServerConfig;
use crate::error::ApiError;
use crate::wire::chat_request::ChatFields;
use crate::wire::read::{json, text};
use arguments::TemplateArguments;

/// The conversation that `POST /v1/chat/completions` would render for this body; its other fields are not read.
///
/// # Errors
/// What the route would answer.
pub fn conversation_from_json(
    config: &ServerConfig,
    format: &dyn ChatFormat,
    body: &[u8],
) -> Result<Conversation, ApiError> {
    let body = text(body)?;
    let fields: ChatFields = json(body)?;
    let effort = reasoning::asked(&fields)?.effort;
    let tools = tools::tools(config, fields.tools, body)?;
    let arguments = TemplateArguments::new(config, format, fields.chat_template_kwargs.as_ref());
    history::conversation(config, fields.messages, tools, effort, arguments)
}
