//! The conversation of a request: instructions, what was before, and the items that it adds.

use std::sync::Arc;

use ctxserve_chat::Message;
use serde_json::{Value, json};

use super::items::{At, Item, Origin, Skipped, Turns, read};
use crate::error::ApiError;
use crate::state::ServerState;
use crate::store::{Link, Owner, StoredItem};

/// A conversation as it goes to the model, and what the request added as it goes to the store, if it does.
pub(super) struct Conversation {
    pub(super) messages: Vec<Message>,
    /// Where each message began.
    pub(super) origins: Vec<Origin>,
    pub(super) stored: Vec<StoredItem>,
}

/// Brings the parts together. Instructions are this request's alone: those of earlier ones are no part of what was before.
///
/// # Errors
/// 400 naming the item, 404 for a reference to one that is not there.
pub(super) fn conversation(
    state: &ServerState,
    owner: Owner,
    instructions: Option<String>,
    previous: Option<&Arc<Link>>,
    input: Option<Value>,
    store: bool,
) -> Result<Conversation, ApiError> {
    let mut turns = Turns::default();
    if let Some(text) = instructions {
        turns.push(Origin::Instructions, Item::System(text));
    }
    let before = previous.map(Link::items).unwrap_or_default();
    for item in &before {
        turns.push(Origin::Previous, restored(item)?);
    }
    let mut stored = Vec::new();
    let mut skipped = Skipped::default();
    for (index, value) in listed(input, previous.is_some())?.into_iter().enumerate() {
        let at = format!("input[{index}]");
        let (item, kept) = match read(&At(&at), &value)? {
            Item::Reference(id) => {
                let found = before.iter().find(|item| item.id == id).map(|item| (*item).clone());
                let Some(found) = found.or_else(|| state.responses().item(owner, &id)) else {
                    let shown: String = id.chars().take(128).collect();
                    let message = format!("Item with id '{shown}' not found.");
                    return Err(ApiError::not_found(Some(&format!("{at}.id")), "item_not_found", message));
                };
                (restored(&found)?, found)
            }
            item => {
                if let Item::Skipped(kind) = &item {
                    skipped.add(kind);
                }
                let kept = if store { complete(state, &item, value) } else { StoredItem::default() };
                (item, kept)
            }
        };
        turns.push(Origin::Input(index), item);
        stored.push(kept);
    }
    skipped.log("skipping items of types that say nothing to this model");
    let (messages, origins) = turns.finish();
    if messages.is_empty() {
        return Err(ApiError::invalid("input", "input is required and must not be empty"));
    }
    Ok(Conversation { messages, origins, stored })
}

fn listed(input: Option<Value>, goes_on: bool) -> Result<Vec<Value>, ApiError> {
    match input {
        None | Some(Value::Null) if goes_on => Ok(Vec::new()),
        None | Some(Value::Null) => Err(ApiError::invalid("input", "input is required")),
        Some(Value::String(text)) => Ok(vec![json!({"type": "message", "role": "user", "content": text})]),
        Some(Value::Array(items)) => Ok(items),
        Some(_) => Err(ApiError::invalid("input", "input must be a string or a list of items")),
    }
}

fn restored(item: &StoredItem) -> Result<Item, ApiError> {
    let damaged = |_| ApiError::internal("A stored item could not be read.");
    let value: Value = serde_json::from_str(&item.json).map_err(damaged)?;
    read(&At("previous_response_id"), &value)
}

/// The item as lists of input items give it back: with an id, a type and, in a message, parts and a status.
fn complete(state: &ServerState, item: &Item, mut value: Value) -> StoredItem {
    let (kind, prefix) = match item {
        Item::System(_) | Item::Developer(_) | Item::User(_) | Item::Assistant(_) => ("message", "msg_"),
        Item::Reasoning(_) => ("reasoning", "rs_"),
        Item::Call(_) => ("function_call", "fc_"),
        Item::Output { .. } => ("function_call_output", "fco_"),
        Item::Reference(_) | Item::Skipped(_) => ("", "item_"),
    };
    let given = value["id"].as_str().filter(|id| !id.is_empty()).map(str::to_owned);
    let id = given.unwrap_or_else(|| state.random_name(prefix));
    if let Some(map) = value.as_object_mut() {
        map.insert("id".to_owned(), id.clone().into());
        map.entry("type").or_insert_with(|| kind.into());
        if kind == "message" {
            if let Some(text) = map.get("content").and_then(Value::as_str) {
                let part = if matches!(item, Item::Assistant(_)) {
                    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
                } else {
                    json!({"type": "input_text", "text": text})
                };
                map.insert("content".to_owned(), Value::Array(vec![part]));
            }
            map.entry("status").or_insert_with(|| "completed".into());
        }
    }
    StoredItem { id, json: value.to_string().into() }
}
