//! A conversation through the checkpoint's chat template.

use std::collections::HashMap;

use ctxserve_core::TokenId;
use minijinja::Value;

use crate::jinja::{Failure, Json, Marks, Seen, Template, parse_json};
use crate::{
    Conversation, FormatError, FunctionTool, Message, PromptFiles, ReasoningEffort, RenderError, Tokenizer,
    ToolCall,
};

/// The template of checkpoints that have none.
const DEFAULT: &str = include_str!("default.jinja");

/// Fuel of every rendering, and more for each message or tool and for each byte of the clients' text. Known templates
/// take a tenth of it.
const FUEL: u64 = 500_000;
const FUEL_PER_ITEM: u64 = 1_000;
const BYTES_PER_FUEL: u64 = 2;

/// Renders conversations.
#[derive(Clone, Debug)]
pub(super) struct Renderer {
    template: Template,
    /// Where the checkpoint has one of its own for conversations with tools.
    with_tools: Option<Template>,
    /// Names of special tokens, `bos_token` and so on.
    special: Vec<(String, String)>,
    marks: Marks,
    /// Marks that the templates have themselves.
    seen: Seen,
    /// What the templates read beyond what is set for them here, in order.
    arguments: Vec<String>,
}

/// What is set here, and what transformers' own function takes: no argument of a request may pass for it.
const RESERVED: &[&str] = &[
    "messages",
    "conversation",
    "tools",
    "documents",
    "chat_template",
    "template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "return_dict",
    "reasoning_effort",
    "enable_thinking",
];

impl Renderer {
    pub(super) fn new(files: &PromptFiles, tokenizer: &Tokenizer) -> Result<Self, FormatError> {
        let (template, with_tools) = sources(files)?;
        let mut seen = Seen::default();
        let mut compile = |source: String| {
            seen.add(&source);
            Template::new(&source).map_err(|what| FormatError::Template { what })
        };
        let (template, with_tools) = (compile(template)?, with_tools.map(&mut compile).transpose()?);
        let special = special_tokens(files);
        let reserved = |name: &String| RESERVED.contains(&name.as_str()) || name.ends_with("_token");
        let mut arguments: Vec<String> = [Some(&template), with_tools.as_ref()]
            .into_iter()
            .flatten()
            .flat_map(Template::arguments)
            .filter(|name| !reserved(name))
            .collect();
        arguments.sort();
        arguments.dedup();
        Ok(Self { template, with_tools, special, marks: Marks::new(tokenizer), seen, arguments })
    }

    /// What conversations may set beyond what they are.
    pub(super) fn arguments(&self) -> &[String] {
        &self.arguments
    }

    pub(super) fn render(
        &self,
        conversation: &Conversation,
        tokenizer: &Tokenizer,
        open_turn: bool,
    ) -> Result<Vec<TokenId>, RenderError> {
        let messages = messages(conversation)?;
        let tools = tools(&conversation.tools)?;
        let arguments = self.given(conversation)?;
        let mut seen = self.seen;
        let mut bytes = 0;
        for json in messages
            .iter()
            .flatten()
            .map(|field| &field.value)
            .chain(&tools)
            .chain(arguments.iter().map(|(_, value)| value))
        {
            json.see(&mut seen);
            bytes += size(json);
        }
        let failed = |what: String| RenderError { message: None, what };
        let marking = self
            .marks
            .choose(seen)
            .ok_or_else(|| failed("the text has every noncharacter from U+FDD0 to U+FDEF".to_owned()))?;

        let message = |fields: &Vec<Field>| {
            Value::from_pairs(fields.iter().map(|field| {
                // Roles and the like are ours.
                let value = match (&field.value, field.ours) {
                    (Json::String(text), true) => Value::from(text.as_str()),
                    (value, _) => value.to_value(&marking),
                };
                (field.key, value)
            }))
        };
        let mut context: Vec<(&str, Value)> =
            self.special.iter().map(|(name, text)| (name.as_str(), Value::from(text.as_str()))).collect();
        context.push(("messages", messages.iter().map(message).collect()));
        context.push((
            "tools",
            if tools.is_empty() {
                Value::from(())
            } else {
                tools.iter().map(|tool| tool.to_value(&marking)).collect()
            },
        ));
        context.push(("documents", Value::from(())));
        context.push(("add_generation_prompt", Value::from(open_turn)));
        let effort = conversation.reasoning_effort;
        if let Some(effort) = effort {
            context.push(("reasoning_effort", Value::from(effort.as_str())));
        }
        let by_effort = effort.map(|effort| effort != ReasoningEffort::None);
        if let Some(thinking) = conversation.thinking.or(by_effort) {
            context.push(("enable_thinking", Value::from(thinking)));
        }

        context.extend(arguments.iter().map(|(name, value)| (*name, value.to_value(&marking))));
        let template = self.with_tools.as_ref().filter(|_| !tools.is_empty()).unwrap_or(&self.template);
        let items = (messages.len() + tools.len()) as u64;
        let fuel = FUEL + items.saturating_mul(FUEL_PER_ITEM) + bytes as u64 / BYTES_PER_FUEL;
        let date = conversation.current_date.as_deref();
        let rendered =
            template.render(Value::from_pairs(context), fuel, date).map_err(|failure| match failure {
                Failure::Raised(message) => failed(marking.clean(&message)),
                Failure::TooMuch => failed("the conversation is too much for the chat template".to_owned()),
                Failure::Broken(what) => {
                    failed(format!("the chat template cannot render this: {}", marking.clean(&what)))
                }
            })?;
        Ok(marking.ids(&rendered, tokenizer))
    }
}

impl Renderer {
    /// The arguments of a conversation that the templates read.
    fn given<'a>(&self, conversation: &'a Conversation) -> Result<Vec<(&'a str, Json)>, RenderError> {
        let known = conversation.template_arguments.iter().filter(|(name, _)| self.arguments.contains(name));
        let read = |(name, value): (&'a String, &serde_json::Value)| {
            let what = || format!("the template argument {name} is nested too deeply");
            let value = parse_json(&value.to_string());
            Ok((name.as_str(), value.ok_or_else(|| RenderError { message: None, what: what() })?))
        };
        known.map(read).collect()
    }
}

/// The templates of the files: the general one, and that for conversations with tools.
fn sources(files: &PromptFiles) -> Result<(String, Option<String>), FormatError> {
    if let Some(source) = &files.chat_template {
        return Ok((source.clone(), None));
    }
    let refused = |what: &str| FormatError::Template { what: format!("tokenizer_config.json: {what}") };
    let value = files.tokenizer_config.as_ref().and_then(|config| config.get("chat_template"));
    match value {
        None | Some(serde_json::Value::Null) => Ok((DEFAULT.to_owned(), None)),
        Some(serde_json::Value::String(source)) => Ok((source.clone(), None)),
        Some(serde_json::Value::Array(list)) => {
            let named = |name: &str| {
                let entry = list.iter().find(|entry| entry.get("name").is_some_and(|found| found == name))?;
                entry.get("template")?.as_str().map(str::to_owned)
            };
            let (default, with_tools) = (named("default"), named("tool_use"));
            let only = || match list.as_slice() {
                [one] => one.get("template")?.as_str().map(str::to_owned),
                _ => None,
            };
            let general =
                default.or_else(only).ok_or_else(|| refused("no chat_template is named default"))?;
            Ok((general, with_tools))
        }
        Some(_) => Err(refused("chat_template is neither text nor a list")),
    }
}

/// `bos_token` and its like, as templates know them.
fn special_tokens(files: &PromptFiles) -> Vec<(String, String)> {
    let fields = files.tokenizer_config.as_ref().and_then(serde_json::Value::as_object);
    let special = |(name, value): (&String, &serde_json::Value)| {
        let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
        name.ends_with("_token").then(|| (name.clone(), text.to_owned()))
    };
    fields.into_iter().flatten().filter_map(special).collect()
}

/// A field of a message.
struct Field {
    key: &'static str,
    value: Json,
    /// Written by the server: a role, never a client's text.
    ours: bool,
}

fn role(role: &str) -> Field {
    Field { key: "role", value: Json::String(role.to_owned()), ours: true }
}

fn text(key: &'static str, text: &str) -> Field {
    Field { key, value: Json::String(text.to_owned()), ours: false }
}

/// Messages as templates know them. These have no developer role: its messages are the system's.
fn messages(conversation: &Conversation) -> Result<Vec<Vec<Field>>, RenderError> {
    let mut calls: HashMap<&str, &str> = HashMap::new();
    let mut messages = Vec::with_capacity(conversation.messages.len());
    for (index, message) in conversation.messages.iter().enumerate() {
        messages.push(match message {
            Message::System(content) | Message::Developer(content) => {
                vec![role("system"), text("content", content)]
            }
            Message::User { name, content } => {
                let mut fields = vec![role("user"), text("content", content)];
                fields.extend(name.as_deref().map(|name| text("name", name)));
                fields
            }
            Message::Assistant { reasoning, content, tool_calls } => {
                let mut fields = vec![role("assistant"), text("content", content.as_deref().unwrap_or(""))];
                // Templates differ in the name.
                for name in ["reasoning_content", "thinking"] {
                    fields.extend(reasoning.as_deref().map(|reasoning| text(name, reasoning)));
                }
                if !tool_calls.is_empty() {
                    calls.extend(tool_calls.iter().map(|call| (call.id.as_str(), call.name.as_str())));
                    let value = Json::List(tool_calls.iter().map(tool_call).collect());
                    fields.push(Field { key: "tool_calls", value, ours: false });
                }
                fields
            }
            Message::Tool { call_id, content } => {
                let name = calls.get(call_id.as_str()).ok_or_else(|| RenderError {
                    message: Some(index),
                    what: format!("tool_call_id {call_id:?} answers no earlier tool call"),
                })?;
                vec![
                    role("tool"),
                    text("content", content),
                    text("tool_call_id", call_id),
                    text("name", name),
                ]
            }
        });
    }
    Ok(messages)
}

fn string(text: &str) -> Json {
    Json::String(text.to_owned())
}

fn map(entries: Vec<(&str, Json)>) -> Json {
    Json::Map(entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
}

/// Templates expect arguments as an object, and write text that is none as it is.
fn tool_call(call: &ToolCall) -> Json {
    let arguments = match call.arguments.trim() {
        "" => Json::Map(Vec::new()),
        trimmed => parse_json(trimmed).unwrap_or_else(|| string(&call.arguments)),
    };
    let function = map(vec![("name", string(&call.name)), ("arguments", arguments)]);
    map(vec![("id", string(&call.id)), ("type", string("function")), ("function", function)])
}

fn tools(tools: &[FunctionTool]) -> Result<Vec<Json>, RenderError> {
    let read = |(index, tool): (usize, &FunctionTool)| {
        declaration(tool).ok_or_else(|| RenderError {
            message: None,
            what: format!("tools[{index}] is nested too deeply"),
        })
    };
    tools.iter().enumerate().map(read).collect()
}

/// The whole declaration: the client's, else one of the fields.
fn declaration(tool: &FunctionTool) -> Option<Json> {
    let kind = || ("type".to_owned(), string("function"));
    if let Some(text) = &tool.declaration {
        let Json::Map(mut entries) = parse_json(text)? else { return None };
        if entries.iter().all(|(key, _)| key != "type") {
            entries.insert(0, kind());
        }
        return Some(Json::Map(entries));
    }
    let mut function = vec![("name", string(&tool.name))];
    function.extend(tool.description.as_deref().map(|text| ("description", string(text))));
    if let Some(parameters) = &tool.parameters {
        function.push(("parameters", parse_json(&parameters.to_string())?));
    }
    Some(Json::Map(vec![kind(), ("function".to_owned(), map(function))]))
}

/// About the bytes of a value's text.
fn size(json: &Json) -> usize {
    match json {
        Json::Null | Json::Bool(_) => 8,
        Json::Number(text) | Json::String(text) => 8 + text.len(),
        Json::List(items) => 8 + items.iter().map(size).sum::<usize>(),
        Json::Map(entries) => {
            8 + entries.iter().map(|(key, value)| 8 + key.len() + size(value)).sum::<usize>()
        }
    }
}
