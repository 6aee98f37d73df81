//! `/v1/responses` and what is below it.

use serde_json::{Value, json};

use super::{BODY, GENERATION, Schemas, generated, get, operation, post};
use crate::wire::fields::GenerationFields;
use crate::wire::refused::Route;
use crate::wire::responses_request::ResponsesFields;
use crate::wire::responses_response::{Deleted, InputTokens, ItemList, WireEvent, WireResponse};

const STORED: &[u16] = &[400, 401, 404, 405, 500];

fn id() -> Value {
    parameter("id", "path", json!({"type": "string", "minLength": 1}))
}

fn parameter(name: &str, place: &str, schema: Value) -> Value {
    json!({"name": name, "in": place, "required": place == "path", "schema": schema})
}

fn body(schemas: &mut Schemas) -> Value {
    let parts = [schemas.fields::<GenerationFields>(), schemas.fields::<ResponsesFields>()];
    let what = "A conversation to go on with. Tools that are not functions are left out.";
    schemas.request("ResponseRequest", what, &parts, Some(Route::Responses))
}

pub(crate) fn create(schemas: &mut Schemas) -> Value {
    let body = body(schemas);
    let success = generated::<WireResponse<'_>, WireEvent<'_>>(schemas);
    post("Answers a conversation.", body, success, GENERATION)
}

pub(crate) fn input_tokens(schemas: &mut Schemas) -> Value {
    let body = body(schemas);
    let success = json!({"application/json": {"schema": schemas.response::<InputTokens>()}});
    post("Counts the tokens of a prompt.", body, success, BODY)
}

pub(crate) fn stored(schemas: &mut Schemas) -> Value {
    let success = generated::<WireResponse<'_>, WireEvent<'_>>(schemas);
    let mut retrieve = operation("Gives a stored response back.", success, STORED);
    retrieve["parameters"] = json!([
        parameter("stream", "query", json!({"type": "boolean"})),
        parameter("starting_after", "query", json!({"type": "integer", "minimum": 0, "maximum": u64::MAX})),
    ]);
    let deleted = json!({"application/json": {"schema": schemas.response::<Deleted<'_>>()}});
    let delete = operation("Forgets a response; one that runs is ended.", deleted, STORED);
    json!({"parameters": [id()], "get": retrieve, "delete": delete})
}

pub(crate) fn cancel(schemas: &mut Schemas) -> Value {
    let success = json!({"application/json": {"schema": schemas.response::<WireResponse<'_>>()}});
    let cancel = operation("Ends a response that runs in the background.", success, STORED);
    json!({"parameters": [id()], "post": cancel})
}

pub(crate) fn input_items(schemas: &mut Schemas) -> Value {
    let mut path = get::<ItemList<'_>>(schemas, "What a response's request brought.", STORED);
    path["parameters"] = json!([
        id(),
        parameter("limit", "query", json!({"type": "integer", "minimum": 1, "maximum": 100})),
        parameter("order", "query", json!({"enum": ["asc", "desc"]})),
        parameter("after", "query", json!({"type": "string"})),
        parameter("before", "query", json!({"type": "string"})),
    ]);
    path
}

pub(crate) fn compact(_: &mut Schemas) -> Value {
    let refused = json!({"$ref": "#/components/responses/Error"});
    json!({"post": {"summary": "Not served.", "responses": {"400": refused, "401": refused, "405": refused}}})
}
