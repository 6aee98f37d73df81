//! `/v1/messages` and what is below it.

use serde_json::{Value, json};

use super::{BODY, GENERATION, Schemas, post};
use crate::error::AnthropicEnvelope;
use crate::wire::messages_request::MessagesFields;
use crate::wire::messages_response::{MessageResponse, StreamEvent, TokenCount};
use crate::wire::refused::Route;

pub(crate) fn create(schemas: &mut Schemas) -> Value {
    let mut fields = schemas.fields::<MessagesFields>();
    if let Some(required) = fields.get_mut("required").and_then(Value::as_array_mut) {
        required.push(json!("max_tokens"));
    }
    if let Some(kind) = fields.pointer_mut("/properties/max_tokens/type") {
        *kind = json!("integer");
    }
    let what = "A conversation to go on with. Tools of a type other than 'custom' are left out.";
    let body = schemas.request("MessagesRequest", what, &[fields], Some(Route::Messages));
    let events = json!({"anyOf": [
        schemas.response::<StreamEvent<'_>>(),
        schemas.response::<AnthropicEnvelope<'_>>(),
        {"type": "object", "properties": {"type": {"const": "ping"}}, "required": ["type"]},
    ]});
    let success = json!({
        "application/json": {"schema": schemas.response::<MessageResponse<'_>>()},
        "text/event-stream": {"schema": {"type": "string"}, "x-event-schema": events},
    });
    let path = post("Answers a conversation, as Anthropic's API does.", body, success, GENERATION);
    refusals(path, schemas)
}

pub(crate) fn count_tokens(schemas: &mut Schemas) -> Value {
    let fields = schemas.fields::<MessagesFields>();
    let body = schemas.request("CountRequest", "A conversation.", &[fields], Some(Route::Messages));
    let success = json!({"application/json": {"schema": schemas.response::<TokenCount>()}});
    refusals(post("Counts the tokens of the prompt that a conversation makes.", body, success, BODY), schemas)
}

/// Puts these routes' own envelope in the place of OpenAI's.
fn refusals(mut path: Value, schemas: &mut Schemas) -> Value {
    let error = schemas.response::<AnthropicEnvelope<'_>>();
    let error = json!({"description": "What is wrong.", "content": {"application/json": {"schema": error}}});
    let responses = path.pointer_mut("/post/responses").and_then(Value::as_object_mut);
    for (status, response) in responses.into_iter().flatten() {
        if status != "200" {
            *response = error.clone();
        }
    }
    path
}
