//! `/openapi.json`: OpenAPI 3.1, made from the wire types and from what this server was started with.

pub(crate) mod messages;
pub(crate) mod responses;

use schemars::generate::{Contract, SchemaSettings};
use schemars::transform::{RecursiveTransform, Transform};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

use crate::error::Envelope;
use crate::limits::Limits;
use crate::router::routes;
use crate::state::ServerState;
use crate::wire::chat_request::{ChatFields, WireTool};
use crate::wire::chat_response::{ChatChunk, ChatResponse};
use crate::wire::completion_request::CompletionFields;
use crate::wire::completion_response::CompletionResponse;
use crate::wire::fields::GenerationFields;
use crate::wire::refused::Route;
use crate::wire::schema::{COMPONENTS, efforts};
use crate::wire::service::{Health, Load, ModelCard, ModelList, Version};
use crate::wire::tokenize::{DetokenizeFields, DetokenizeResponse, TokenizeFields, TokenizeResponse};

/// Schemas of the document so far. Fields of requests that may be left out are not those of responses.
pub(crate) struct Schemas {
    requests: SchemaGenerator,
    responses: SchemaGenerator,
    own: Map<String, Value>,
}

/// Refusals that any route may give.
const ANY: &[u16] = &[400, 401, 405, 500];
/// Those of a route that reads a body.
const BODY: &[u16] = &[400, 401, 404, 405, 408, 413, 415, 500, 503];
/// Those of a route that generates.
const GENERATION: &[u16] = &[400, 401, 404, 405, 408, 413, 415, 429, 500, 503];

impl Schemas {
    fn new() -> Self {
        let generator = |contract| {
            let mut settings = SchemaSettings::draft2020_12();
            settings.definitions_path = COMPONENTS.trim_start_matches('#').trim_end_matches('/').into();
            settings.meta_schema = None;
            settings.contract = contract;
            settings.into_generator()
        };
        let (requests, responses) = (generator(Contract::Deserialize), generator(Contract::Serialize));
        Self { requests, responses, own: Map::new() }
    }

    fn response<T: JsonSchema>(&mut self) -> Value {
        self.responses.subschema_for::<T>().to_value()
    }

    /// One object with the fields of all `parts`, and those that are known and not served.
    fn request(&mut self, name: &str, what: &str, parts: &[Schema], refused: Option<Route>) -> Value {
        let mut properties = Map::new();
        let mut required = Vec::new();
        for part in parts {
            properties
                .extend(part.get("properties").and_then(Value::as_object).cloned().into_iter().flatten());
            required.extend(part.get("required").and_then(Value::as_array).cloned().into_iter().flatten());
        }
        properties.extend(refused.map(Route::schemas).into_iter().flatten());
        self.define(
            name,
            json!({"type": "object", "description": what, "properties": properties, "required": required}),
        )
    }

    fn define(&mut self, name: &str, schema: Value) -> Value {
        self.own.insert(name.to_owned(), schema);
        json!({"$ref": format!("{COMPONENTS}{name}")})
    }

    fn fields<T: JsonSchema>(&mut self) -> Schema {
        T::json_schema(&mut self.requests)
    }

    /// What depends on the server.
    fn define_served(&mut self, state: &ServerState) {
        let config = state.config();
        let info = state.engine().info();
        let id = json!({"type": "integer", "minimum": 0, "maximum": info.vocab_size.saturating_sub(1)});
        let ids = |least: usize, most: usize| json!({"type": "array", "items": {"$ref": format!("{COMPONENTS}TokenId")}, "minItems": least, "maxItems": most});
        self.define("ModelName", json!({"enum": config.served_model_names}));
        self.define("TokenId", id);
        self.define("TokenIds", ids(0, info.max_model_len));
        self.define("PromptIds", ids(1, info.max_model_len.saturating_sub(1)));
        let tool = self.requests.subschema_for::<WireTool>();
        self.define("Tools", json!({"type": "array", "items": tool, "maxItems": config.limits.max_tools}));
        let mut arguments = Map::from_iter([
            ("reasoning_effort".to_owned(), json!({"enum": efforts()})),
            ("enable_thinking".to_owned(), json!({"type": ["boolean", "null"]})),
        ]);
        arguments.extend(state.format().template_arguments().iter().map(|name| (name.clone(), json!(true))));
        self.define(
            "TemplateArguments",
            json!({"type": "object", "properties": arguments, "additionalProperties": false}),
        );
    }

    /// All of them by name.
    fn into_components(mut self, limits: &Limits) -> Map<String, Value> {
        let mut all = self.own;
        for generator in [&mut self.requests, &mut self.responses] {
            all.extend(generator.take_definitions(true));
        }
        set_limits(&mut all, limits);
        for schema in all.values_mut() {
            if let Ok(schema) = <&mut Schema>::try_from(schema) {
                RecursiveTransform(bounds).transform(schema);
            }
        }
        all
    }
}

/// Puts the operator's limits in the place of the defaults.
fn set_limits(schemas: &mut Map<String, Value>, limits: &Limits) {
    let places = [
        ("/properties/n/maximum", limits.max_n),
        ("/properties/best_of/maximum", limits.max_n),
        ("/properties/stop/anyOf/0/maxLength", limits.max_stop_bytes),
        ("/properties/stop/anyOf/1/items/maxLength", limits.max_stop_bytes),
        ("/properties/stop/anyOf/1/maxItems", limits.max_stop_strings),
        ("/properties/stop_token_ids/maxItems", limits.max_stop_token_ids),
        ("/properties/logit_bias/maxProperties", limits.max_logit_bias),
        ("/properties/top_logprobs/maximum", limits.max_logprobs),
        ("/properties/logprobs/maximum", limits.max_logprobs),
        ("/properties/prompt/anyOf/1/maxItems", limits.max_prompts),
        ("/properties/prompt/anyOf/3/maxItems", limits.max_prompts),
    ];
    for name in ["ChatRequest", "CompletionRequest", "ResponseRequest"] {
        let Some(schema) = schemas.get_mut(name) else { continue };
        for (place, limit) in places {
            if let Some(bound) = schema.pointer_mut(place) {
                *bound = json!(limit);
            }
        }
    }
}

/// States the bounds of Rust's integers: formats that validators do not know say them to nobody.
fn bounds(schema: &mut Schema) {
    let range = match schema.get("format").and_then(Value::as_str) {
        Some("uint8") => (json!(0), json!(u8::MAX)),
        Some("uint32") => (json!(0), json!(u32::MAX)),
        Some("uint" | "uint64") => (json!(0), json!(u64::MAX)),
        Some("int64") => (json!(i64::MIN), json!(i64::MAX)),
        _ => return,
    };
    schema.remove("format");
    for (name, bound) in [("minimum", range.0), ("maximum", range.1)] {
        if schema.get(name).is_none() {
            schema.insert(name.to_owned(), bound);
        }
    }
}

/// The document.
pub(crate) fn document(state: &ServerState) -> Value {
    let mut schemas = Schemas::new();
    let described = routes().into_iter().map(|(path, _, describe)| {
        // axum's wildcard is spelled otherwise here.
        (path.replace("{*", "{"), describe(&mut schemas))
    });
    let paths: Map<String, Value> = described.collect();
    schemas.define_served(state);
    let error = json!({"application/json": {"schema": schemas.response::<Envelope<'_>>()}});
    let mut components = json!({
        "responses": {"Error": {"description": "What is wrong, and with which field.", "content": error}},
    });
    let mut document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "ctxserve",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Fields that are not named here are ignored. Null is as if a field had been left out.",
        },
        "paths": paths,
    });
    if !state.config().api_keys.is_empty() {
        components["securitySchemes"] = json!({"key": {"type": "http", "scheme": "bearer"}});
        document["security"] = json!([{"key": []}]);
    }
    components["schemas"] = Value::Object(schemas.into_components(&state.config().limits));
    document["components"] = components;
    document
}

fn operation(what: &str, success: Value, refusals: &[u16]) -> Value {
    let refused = json!({"$ref": "#/components/responses/Error"});
    let mut responses =
        Map::from_iter([("200".to_owned(), json!({"description": "Success.", "content": success}))]);
    responses.extend(refusals.iter().map(|status| (status.to_string(), refused.clone())));
    json!({"summary": what, "responses": responses})
}

fn get<T: JsonSchema>(schemas: &mut Schemas, what: &str, refusals: &[u16]) -> Value {
    let success = json!({"application/json": {"schema": schemas.response::<T>()}});
    json!({"get": operation(what, success, refusals)})
}

fn post(what: &str, body: Value, success: Value, refusals: &[u16]) -> Value {
    let mut operation = operation(what, success, refusals);
    operation["requestBody"] = json!({"required": true, "content": {"application/json": {"schema": body}}});
    json!({"post": operation})
}

/// A whole answer, or a stream of events. OpenAPI 3.1 has no word for what is in those; tools may read ours.
fn generated<Whole: JsonSchema, Event: JsonSchema>(schemas: &mut Schemas) -> Value {
    let events = json!({"anyOf": [schemas.response::<Event>(), schemas.response::<Envelope<'_>>(), {"const": "[DONE]"}]});
    json!({
        "application/json": {"schema": schemas.response::<Whole>()},
        "text/event-stream": {"schema": {"type": "string"}, "x-event-schema": events},
    })
}

pub(crate) fn chat(schemas: &mut Schemas) -> Value {
    let parts = [schemas.fields::<GenerationFields>(), schemas.fields::<ChatFields>()];
    let body = schemas.request("ChatRequest", "A conversation to go on with.", &parts, Some(Route::Chat));
    let success = generated::<ChatResponse<'_>, ChatChunk<'_>>(schemas);
    post("Answers a conversation.", body, success, GENERATION)
}

pub(crate) fn completions(schemas: &mut Schemas) -> Value {
    let parts = [schemas.fields::<GenerationFields>(), schemas.fields::<CompletionFields>()];
    let body = schemas.request("CompletionRequest", "Prompts to continue.", &parts, Some(Route::Completions));
    let success = generated::<CompletionResponse<'_>, CompletionResponse<'_>>(schemas);
    post("Continues prompts, without any chat format.", body, success, GENERATION)
}

/// Fields of a chat request that `/tokenize` reads too.
const PROMPT_FIELDS: [&str; 4] = ["messages", "tools", "reasoning_effort", "chat_template_kwargs"];

pub(crate) fn tokenize(schemas: &mut Schemas) -> Value {
    let own = schemas.fields::<TokenizeFields>();
    let mut text = own.clone();
    text.insert("required".to_owned(), json!(["prompt"]));
    if let Some(prompt) = text.pointer_mut("/properties/prompt") {
        *prompt = json!({"type": "string"});
    }
    let mut messages = schemas.fields::<ChatFields>();
    if let Some(properties) = messages.get_mut("properties").and_then(Value::as_object_mut) {
        // The other fields of a conversation say nothing about its prompt.
        properties.retain(|name, _| PROMPT_FIELDS.contains(&name.as_str()));
        properties.insert("prompt".to_owned(), json!({"type": "null"}));
    }
    let text = schemas.request("TokenizeText", "A text.", &[text], Some(Route::Tokenize));
    let chat = [own, messages];
    let chat = schemas.request("TokenizeMessages", "A conversation.", &chat, Some(Route::Tokenize));
    let body = json!({"anyOf": [text, chat]});
    let success = json!({"application/json": {"schema": schemas.response::<TokenizeResponse>()}});
    post("Token ids of a text, or of a conversation as the model would read it.", body, success, BODY)
}

pub(crate) fn detokenize(schemas: &mut Schemas) -> Value {
    let fields = schemas.fields::<DetokenizeFields>();
    let body = schemas.request("DetokenizeRequest", "Token ids.", &[fields], None);
    let success = json!({"application/json": {"schema": schemas.response::<DetokenizeResponse>()}});
    post("Text of token ids, control tokens shown.", body, success, BODY)
}

pub(crate) fn models(schemas: &mut Schemas) -> Value {
    get::<ModelList<'_>>(schemas, "Every name that is served.", ANY)
}

pub(crate) fn model(schemas: &mut Schemas) -> Value {
    let mut path = get::<ModelCard<'_>>(schemas, "One of the names.", &[400, 401, 404, 405, 500]);
    path["parameters"] = json!([{"name": "name", "in": "path", "required": true, "schema": {"type": "string", "minLength": 1}}]);
    path
}

pub(crate) fn health(schemas: &mut Schemas) -> Value {
    get::<Health>(schemas, "Whether the server takes requests.", &[400, 401, 405, 500, 503])
}

pub(crate) fn ping(schemas: &mut Schemas) -> Value {
    let mut path = health(schemas);
    path["post"] = path["get"].clone();
    path
}

pub(crate) fn version(schemas: &mut Schemas) -> Value {
    get::<Version>(schemas, "The server's version.", ANY)
}

pub(crate) fn load(schemas: &mut Schemas) -> Value {
    get::<Load>(schemas, "How much is under way.", ANY)
}

pub(crate) fn metrics(_: &mut Schemas) -> Value {
    let text = json!({"text/plain": {"schema": {"type": "string"}}});
    json!({"get": operation("Metrics as Prometheus reads them.", text, ANY)})
}

pub(crate) fn reset_prefix_cache(_: &mut Schemas) -> Value {
    let what = "Forgets what is kept for prompts that begin alike.";
    json!({"post": operation(what, json!({}), &[400, 401, 405, 500, 503])})
}

pub(crate) fn this(_: &mut Schemas) -> Value {
    let any = json!({"application/json": {"schema": {"type": "object"}}});
    json!({"get": operation("This document.", any, ANY)})
}
