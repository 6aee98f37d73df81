//! Items of a conversation: read from a request or from the store, made into turns.

use std::collections::BTreeSet;

use ctxserve_chat::{Message, ToolCall};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::sealed;
use crate::error::ApiError;
use crate::validate::history::called;
use crate::wire::chat_request::WireFunctionCall;
use crate::wire::content::Content;

/// Types of items that belong to tools which run elsewhere. Nothing of them can be shown to the model.
const HOSTED: [&str; 22] = [
    "apply_patch_call",
    "apply_patch_call_output",
    "code_interpreter_call",
    "compaction",
    "computer_call",
    "computer_call_output",
    "file_search_call",
    "image_generation_call",
    "local_shell_call",
    "local_shell_call_output",
    "mcp_approval_request",
    "mcp_approval_response",
    "mcp_call",
    "mcp_list_tools",
    "shell_call",
    "shell_call_output",
    "tool_search_call",
    "tool_search_output",
    "web_search_call",
    "compaction_trigger",
    "configuration_update",
    "program",
];

/// What an item says to the model.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Item {
    System(String),
    Developer(String),
    User(String),
    Assistant(String),
    Reasoning(String),
    Call(ToolCall),
    Output {
        call_id: String,
        text: String,
    },
    Reference(String),
    /// Nothing; the item's type.
    Skipped(String),
}

/// Where an item stands, for errors.
pub(super) struct At<'a>(pub(super) &'a str);

impl At<'_> {
    fn invalid(&self, part: &str, message: &str) -> ApiError {
        let at = self.0;
        ApiError::invalid(format!("{at}.{part}"), format!("{at}: {message}"))
    }

    fn field<T: DeserializeOwned>(
        &self,
        map: &Map<String, Value>,
        name: &str,
    ) -> Result<Option<T>, ApiError> {
        match map.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => T::deserialize(value)
                .map(Some)
                .map_err(|error| self.invalid(name, &format!("invalid value for '{name}': {error}"))),
        }
    }

    fn required(&self, map: &Map<String, Value>, name: &str) -> Result<String, ApiError> {
        let text: Option<String> = self.field(map, name)?;
        text.filter(|text| !text.is_empty()).ok_or_else(|| self.invalid(name, &format!("{name} is required")))
    }

    fn text(&self, map: &Map<String, Value>, name: &str) -> Result<Option<String>, ApiError> {
        let Some(content) = self.field::<Content>(map, name)? else { return Ok(None) };
        let refused = |(index, what): (usize, String)| self.invalid(&format!("{name}[{index}]"), &what);
        match content.joined().map_err(refused)? {
            (text, None) => Ok(Some(text)),
            (_, Some(_)) => Err(self.invalid(name, "reasoning is an item of its own")),
        }
    }
}

/// Reads one item.
///
/// # Errors
/// 400 naming the part of it.
pub(super) fn read(at: &At<'_>, value: &Value) -> Result<Item, ApiError> {
    let Some(map) = value.as_object() else {
        return Err(ApiError::invalid(at.0, format!("{}: an item must be an object", at.0)));
    };
    let kind: Option<String> = at.field(map, "type")?;
    // An easy message leaves its type out.
    let kind = kind.unwrap_or_else(|| if map.contains_key("role") { "message" } else { "" }.to_owned());
    match kind.as_str() {
        "message" => message(at, map),
        "reasoning" => reasoning(at, map),
        "function_call" | "custom_tool_call" => {
            let arguments = if kind == "function_call" { "arguments" } else { "input" };
            let function = WireFunctionCall {
                name: Some(at.required(map, "name")?),
                arguments: at.field(map, arguments)?,
            };
            let (name, arguments) =
                called(function).ok_or_else(|| at.invalid("name", "the function name is too long"))?;
            Ok(Item::Call(ToolCall { id: at.required(map, "call_id")?, name, arguments }))
        }
        "function_call_output" | "custom_tool_call_output" => {
            let call_id = at.required(map, "call_id")?;
            Ok(Item::Output { call_id, text: at.text(map, "output")?.unwrap_or_default() })
        }
        // Without a type it is one, if it has an id and nothing else.
        "item_reference" => Ok(Item::Reference(at.required(map, "id")?)),
        "" if map.len() == 1 && map.contains_key("id") => Ok(Item::Reference(at.required(map, "id")?)),
        "" => Err(at.invalid("type", "an item needs a type")),
        hosted if HOSTED.contains(&hosted) => Ok(Item::Skipped(kind)),
        unknown => {
            let shown: String = unknown.chars().take(64).collect();
            Err(at.invalid("type", &format!("items of type {shown:?} are not supported")))
        }
    }
}

fn message(at: &At<'_>, map: &Map<String, Value>) -> Result<Item, ApiError> {
    let role: Option<String> = at.field(map, "role")?;
    let text = at.text(map, "content")?.ok_or_else(|| at.invalid("content", "content is required"))?;
    Ok(match role.as_deref().unwrap_or_default() {
        "system" => Item::System(text),
        "developer" => Item::Developer(text),
        "user" => Item::User(text),
        "assistant" => Item::Assistant(text),
        _ => return Err(at.invalid("role", "role must be system, developer, user or assistant")),
    })
}

/// The text itself, or else what our own `encrypted_content` holds. Another server's tells nothing.
fn reasoning(at: &At<'_>, map: &Map<String, Value>) -> Result<Item, ApiError> {
    #[derive(serde::Deserialize)]
    struct ReasoningText {
        text: Option<String>,
    }
    let parts: Option<Vec<ReasoningText>> = at.field(map, "content")?;
    let text: String = parts.into_iter().flatten().filter_map(|part| part.text).collect();
    let encrypted: Option<String> = at.field(map, "encrypted_content")?;
    if !text.is_empty() {
        return Ok(Item::Reasoning(text));
    }
    Ok(match encrypted.map(|sealed| sealed::open(&sealed)) {
        Some(Some(text)) => Item::Reasoning(text),
        Some(None) => Item::Skipped("reasoning (encrypted elsewhere)".to_owned()),
        None => Item::Reasoning(String::new()),
    })
}

/// Types that a request brought and that are passed over, for one line in the log.
#[derive(Debug, Default)]
pub(super) struct Skipped(BTreeSet<String>);

impl Skipped {
    /// The client's words are cut, and so is their number.
    pub(super) fn add(&mut self, kind: &str) {
        if self.0.len() < 16 {
            self.0.insert(kind.chars().take(64).collect());
        }
    }

    /// Escaped: nothing in them can be taken for another line.
    pub(super) fn log(&self, what: &str) {
        if !self.0.is_empty() {
            tracing::info!(kinds = ?self.0, "{what}");
        }
    }
}

/// Where an item came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    Instructions,
    Previous,
    Input(usize),
}

/// Items as turns. Items of the assistant between two others are one turn if it calls a function in them, as a model's answer is;
/// without a call each message is a turn.
#[derive(Debug, Default)]
pub(super) struct Turns {
    messages: Vec<Message>,
    /// Where each message began.
    origins: Vec<Origin>,
    run: Vec<(Origin, Item)>,
}

impl Turns {
    /// Takes the next item, which came from `origin`.
    pub(super) fn push(&mut self, origin: Origin, item: Item) {
        let message = match item {
            Item::Assistant(_) | Item::Reasoning(_) | Item::Call(_) => {
                self.run.push((origin, item));
                return;
            }
            Item::Reference(_) | Item::Skipped(_) => return,
            Item::System(text) => Message::System(text),
            Item::Developer(text) => Message::Developer(text),
            Item::User(content) => Message::User { name: None, content },
            Item::Output { call_id, text } => Message::Tool { call_id, content: text },
        };
        self.close_run();
        self.add(origin, message);
    }

    /// The messages, and the place of each.
    pub(super) fn finish(mut self) -> (Vec<Message>, Vec<Origin>) {
        self.close_run();
        (self.messages, self.origins)
    }

    fn add(&mut self, origin: Origin, message: Message) {
        // Reasoning without text is no turn.
        if matches!(&message, Message::Assistant { reasoning: None, content: None, tool_calls } if tool_calls.is_empty())
        {
            return;
        }
        self.messages.push(message);
        self.origins.push(origin);
    }

    fn close_run(&mut self) {
        let run = std::mem::take(&mut self.run);
        let calls = run.iter().any(|(_, item)| matches!(item, Item::Call(_)));
        let mut open: Option<(Origin, Assistant)> = None;
        for (origin, item) in run {
            if !calls && let Some((at, turn)) = open.take_if(|(_, turn)| turn.content.is_some()) {
                self.add(at, turn.message());
            }
            open.get_or_insert_with(|| (origin, Assistant::default())).1.take(item);
        }
        if let Some((origin, turn)) = open {
            self.add(origin, turn.message());
        }
    }
}

#[derive(Debug, Default)]
struct Assistant {
    reasoning: Option<String>,
    content: Option<String>,
    tool_calls: Vec<ToolCall>,
}

impl Assistant {
    fn take(&mut self, item: Item) {
        match item {
            Item::Reasoning(text) if text.is_empty() => {}
            Item::Reasoning(text) => self.reasoning.get_or_insert_default().push_str(&text),
            Item::Assistant(text) => self.content.get_or_insert_default().push_str(&text),
            Item::Call(call) => self.tool_calls.push(call),
            _ => {}
        }
    }

    fn message(self) -> Message {
        let Self { reasoning, content, tool_calls } = self;
        Message::Assistant { reasoning, content, tool_calls }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn item(value: Value) -> Item {
        read(&At("input[0]"), &value).unwrap()
    }

    fn assistant(reasoning: Option<&str>, content: Option<&str>, calls: &[&str]) -> Message {
        let call = |id: &&str| ToolCall { id: (*id).to_owned(), name: "f".into(), arguments: "{}".into() };
        Message::Assistant {
            reasoning: reasoning.map(str::to_owned),
            content: content.map(str::to_owned),
            tool_calls: calls.iter().map(call).collect(),
        }
    }

    fn turns(items: Value) -> Vec<Message> {
        let mut turns = Turns::default();
        for (index, value) in items.as_array().unwrap().iter().enumerate() {
            turns.push(Origin::Input(index), item(value.clone()));
        }
        turns.finish().0
    }

    #[test]
    fn items_of_every_type_are_read() {
        assert_eq!(item(json!({"role": "user", "content": "a"})), Item::User("a".into()));
        let parts = json!([{"type": "output_text", "text": "a", "annotations": null, "logprobs": null}, {"type": "refusal", "refusal": "b"}]);
        let message = json!({"type": "message", "role": "assistant", "id": "m", "status": "completed", "phase": "commentary", "content": parts});
        assert_eq!(item(message), Item::Assistant("ab".into()));
        let call =
            json!({"type": "function_call", "call_id": "c", "name": "f", "arguments": {"a": 1}, "id": null});
        assert_eq!(
            item(call),
            Item::Call(ToolCall { id: "c".into(), name: "f".into(), arguments: "{\"a\":1}".into() })
        );
        let output = json!({"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "x"}, {"type": "output_text", "text": "y"}]});
        assert_eq!(item(output), Item::Output { call_id: "c".into(), text: "xy".into() });
        let reasoning = json!({"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "r"}], "encrypted_content": null});
        assert_eq!(item(reasoning), Item::Reasoning("r".into()));
        assert_eq!(item(json!({"id": "m"})), Item::Reference("m".into()));
        assert_eq!(
            item(json!({"type": "web_search_call", "id": "w"})),
            Item::Skipped("web_search_call".into())
        );
    }

    #[test]
    fn errors_name_the_part() {
        let cases = [
            (json!({"type": "message", "role": "tool", "content": ""}), "input[3].role"),
            (json!({"role": "user"}), "input[3].content"),
            (
                json!({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}),
                "input[3].content[0]",
            ),
            (json!({"type": "function_call", "name": "f", "arguments": ""}), "input[3].call_id"),
            (json!({"type": "function_call", "call_id": "c"}), "input[3].name"),
            (json!({"type": "function_call_output", "call_id": 1}), "input[3].call_id"),
            (json!({"type": "telepathy"}), "input[3].type"),
            (json!({"content": "a"}), "input[3].type"),
            (json!("text"), "input[3]"),
        ];
        for (value, param) in cases {
            let error = read(&At("input[3]"), &value).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{value}");
        }
    }

    #[test]
    fn an_answer_with_a_call_is_one_turn() {
        let call = |id: &str| json!({"type": "function_call", "call_id": id, "name": "f", "arguments": "{}"});
        let reasoning =
            |text: &str| json!({"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}]});
        let says = |text: &str| json!({"role": "assistant", "content": text});
        let items = json!([
            reasoning("r"), says("pre"), reasoning("s"), call("a"), call("b"),
            {"type": "function_call_output", "call_id": "a", "output": "1"},
            reasoning("t"), says("one"), says("two"), {"role": "user", "content": "u"}
        ]);
        let expected = [
            assistant(Some("rs"), Some("pre"), &["a", "b"]),
            Message::Tool { call_id: "a".into(), content: "1".into() },
            assistant(Some("t"), Some("one"), &[]),
            assistant(None, Some("two"), &[]),
            Message::User { name: None, content: "u".into() },
        ];
        assert_eq!(turns(items), expected);
    }
}
