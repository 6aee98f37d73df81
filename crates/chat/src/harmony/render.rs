//! A conversation as Harmony's token ids.

use std::collections::HashMap;

use ctxserve_core::TokenId;

use crate::{Conversation, Message, RenderError, Rendered, Tokenizer};

use super::{HarmonyTokens, prompt, replay};

/// Longest name that may stand in a message header.
const MAX_NAME: usize = 64;

/// One Harmony message. Every string is encoded on its own and as text, so nothing in it can become a control token.
pub(super) struct Part<'a> {
    /// Role, or a tool's qualified name.
    author: String,
    /// Behind the role, after a colon.
    name: Option<String>,
    pub(super) recipient: Option<String>,
    pub(super) channel: Option<Channel>,
    content: String,
    /// The whole message as the model wrote it, which is used instead; a turn's first has no role.
    pub(super) written: Option<&'a [TokenId]>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Channel {
    Analysis,
    Commentary,
    Final,
}

impl Part<'_> {
    pub(super) fn new(author: &str, content: impl Into<String>) -> Self {
        Self {
            author: author.to_owned(),
            name: None,
            recipient: None,
            channel: None,
            content: content.into(),
            written: None,
        }
    }

    pub(super) fn on(mut self, channel: Channel) -> Self {
        self.channel = Some(channel);
        self
    }

    pub(super) fn to(mut self, recipient: impl Into<String>) -> Self {
        self.recipient = Some(recipient.into());
        self
    }

    fn is_assistant(&self) -> bool {
        self.author == "assistant"
    }
}

/// Prompt ids of the conversation.
pub(super) fn render(
    conversation: &Conversation,
    tokenizer: &Tokenizer,
    tokens: &HarmonyTokens,
) -> Result<Rendered, RenderError> {
    let (mut parts, replayed) = parts(conversation, tokenizer, tokens)?;
    if !conversation.keep_reasoning {
        drop_reasoning(&mut parts);
    }
    let mut ids = Vec::new();
    for part in &parts {
        write(part, tokenizer, tokens, &mut ids);
    }
    Ok(Rendered { ids, replayed })
}

/// Begins the assistant's turn.
pub(super) fn open_turn(tokenizer: &Tokenizer, tokens: &HarmonyTokens, ids: &mut Vec<TokenId>) {
    ids.push(tokens.start);
    tokenizer.encode_into("assistant", ids);
}

/// The messages, and how many turns of them are the model's own.
fn parts<'a>(
    conversation: &'a Conversation,
    tokenizer: &Tokenizer,
    tokens: &HarmonyTokens,
) -> Result<(Vec<Part<'a>>, usize), RenderError> {
    for (i, tool) in conversation.tools.iter().enumerate() {
        check_function_name(&tool.name)
            .map_err(|what| RenderError { message: None, what: format!("tools[{i}]: {what}") })?;
    }
    // The first instructions head the conversation, beside the tools; later ones keep their place.
    let first =
        conversation.messages.iter().position(|m| matches!(m, Message::System(_) | Message::Developer(_)));
    let instructions = first.and_then(|i| match &conversation.messages[i] {
        Message::System(text) | Message::Developer(text) if !text.is_empty() => Some(text.as_str()),
        _ => None,
    });
    let has_tools = !conversation.tools.is_empty();
    let system =
        prompt::system(conversation.current_date.as_deref(), conversation.reasoning_effort, has_tools);
    let mut parts = vec![Part::new("system", system)];
    parts.extend(
        prompt::developer(instructions, &conversation.tools).map(|text| Part::new("developer", text)),
    );

    let mut calls: HashMap<&str, &str> = HashMap::new();
    let mut replayed = 0;
    for (index, message) in conversation.messages.iter().enumerate() {
        let error = |what: String| RenderError { message: Some(index), what };
        match message {
            Message::System(_) | Message::Developer(_) if Some(index) == first => {}
            Message::System(text) | Message::Developer(text) => {
                parts.extend(prompt::developer(Some(text), &[]).map(|text| Part::new("developer", text)));
            }
            Message::User { name, content } => {
                if let Some(name) = name {
                    check_user_name(name).map_err(error)?;
                }
                parts.push(Part { name: name.clone(), ..Part::new("user", content.as_str()) });
            }
            Message::Assistant { reasoning, content, tool_calls } => {
                for call in tool_calls {
                    check_function_name(&call.name).map_err(error)?;
                    calls.insert(&call.id, &call.name);
                }
                let turn = conversation.generated(index);
                let own = turn.and_then(|turn| replay::parts(turn, message, tokenizer, tokens));
                if let Some(own) = own {
                    parts.extend(own);
                    replayed += 1;
                    continue;
                }
                if let Some(text) = reasoning.as_deref().filter(|text| !text.is_empty()) {
                    parts.push(Part::new("assistant", text).on(Channel::Analysis));
                }
                match content {
                    Some(text) if tool_calls.is_empty() => {
                        parts.push(Part::new("assistant", text.as_str()).on(Channel::Final));
                    }
                    // A preamble: said to the user before the calls.
                    Some(text) if !text.is_empty() => {
                        parts.push(Part::new("assistant", text.as_str()).on(Channel::Commentary));
                    }
                    _ => {}
                }
                for call in tool_calls {
                    let recipient = format!("functions.{}", call.name);
                    parts.push(
                        Part::new("assistant", call.arguments.as_str()).on(Channel::Commentary).to(recipient),
                    );
                }
            }
            Message::Tool { call_id, content } => {
                let name = calls
                    .get(call_id.as_str())
                    .ok_or_else(|| error(format!("tool_call_id {call_id:?} answers no earlier tool call")))?;
                let author = format!("functions.{name}");
                parts.push(Part::new(&author, content.as_str()).on(Channel::Commentary).to("assistant"));
            }
        }
    }
    Ok((parts, replayed))
}

/// Once the last turn of the assistant is an answer, the reasoning before the first answer goes. While the last turn is
/// a call, all of it stays: the model is still in the middle of that thought.
fn drop_reasoning(parts: &mut Vec<Part<'_>>) {
    let answered = parts
        .iter()
        .rev()
        .find(|part| part.is_assistant())
        .is_some_and(|part| part.channel == Some(Channel::Final));
    let first = parts.iter().position(|part| part.channel == Some(Channel::Final));
    if let Some(first) = first.filter(|_| answered) {
        let mut index = 0;
        parts.retain(|part| {
            index += 1;
            index > first || part.channel != Some(Channel::Analysis)
        });
    }
}

fn write(part: &Part<'_>, tokenizer: &Tokenizer, tokens: &HarmonyTokens, ids: &mut Vec<TokenId>) {
    if let Some(written) = part.written {
        if written.first() != Some(&tokens.start) {
            open_turn(tokenizer, tokens, ids);
        }
        // History has no token that ends a turn with an answer.
        ids.extend(written.iter().map(|id| if *id == tokens.ret { tokens.end } else { *id }));
        return;
    }
    ids.push(tokens.start);
    tokenizer.encode_into(&part.author, ids);
    if let Some(name) = &part.name {
        tokenizer.encode_into(&format!(":{name}"), ids);
    }
    if let Some(recipient) = &part.recipient {
        tokenizer.encode_into(&format!(" to={recipient}"), ids);
    }
    if let Some(channel) = part.channel {
        ids.push(tokens.channel);
        let name = match channel {
            Channel::Analysis => "analysis",
            Channel::Commentary => "commentary",
            Channel::Final => "final",
        };
        tokenizer.encode_into(name, ids);
    }
    let is_call = part.is_assistant() && part.recipient.is_some();
    if is_call {
        tokenizer.encode_into(" ", ids);
        ids.push(tokens.constrain);
        tokenizer.encode_into("json", ids);
    }
    ids.push(tokens.message);
    tokenizer.encode_into(&part.content, ids);
    ids.push(if is_call { tokens.call } else { tokens.end });
}

/// The name stands in headers, where a space or `to=` would be structure.
fn check_function_name(name: &str) -> Result<(), String> {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if (1..=MAX_NAME).contains(&name.len()) && name.chars().all(legal) {
        Ok(())
    } else {
        Err(format!("function name {name:?} must be 1 to {MAX_NAME} of the characters a-z A-Z 0-9 _ - ."))
    }
}

fn check_user_name(name: &str) -> Result<(), String> {
    let illegal = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '<' | '>' | '|' | '\\' | '/');
    if (1..=MAX_NAME).contains(&name.chars().count()) && !name.contains(illegal) {
        Ok(())
    } else {
        Err(format!("name {name:?} must be 1 to {MAX_NAME} characters, without spaces or any of < > | \\ /"))
    }
}
