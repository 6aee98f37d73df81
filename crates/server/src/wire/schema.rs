//! JSON Schemas of fields whose types say less than what is accepted, for `/openapi.json`.

use ctxserve_chat::ReasoningEffort;
use ctxserve_core::limits;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde_json::{Value, json};

use super::chat_request::WireTool;
use super::content::Content;
use super::prompt::Prompt;
use crate::validate::tools::MAX_NAME;

/// Where the document has its schemas.
pub(crate) const COMPONENTS: &str = "#/components/schemas/";

/// A schema that the document defines once it knows the server.
fn defined(name: &str) -> Value {
    json!({"$ref": format!("{COMPONENTS}{name}")})
}

fn or_null(schema: Value) -> Schema {
    json_schema!({"anyOf": [schema, {"type": "null"}]})
}

/// A name that is served.
pub(crate) fn model(_: &mut SchemaGenerator) -> Schema {
    or_null(defined("ModelName"))
}

pub(crate) fn stop_token_ids(_: &mut SchemaGenerator) -> Schema {
    let most = limits::MAX_STOP_TOKEN_IDS;
    json_schema!({"type": ["array", "null"], "items": defined("TokenId"), "maxItems": most})
}

/// Ids that fit into the context.
pub(crate) fn tokens(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"$ref": format!("{COMPONENTS}TokenIds")})
}

pub(crate) fn template_arguments(_: &mut SchemaGenerator) -> Schema {
    or_null(defined("TemplateArguments"))
}

pub(crate) fn tools(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<WireTool>();
    or_null(defined("Tools"))
}

pub(crate) fn logit_bias(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": ["object", "null"],
        "propertyNames": {"pattern": "^[0-9]+$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        "maxProperties": limits::MAX_LOGIT_BIAS,
    })
}

pub(crate) fn stop(_: &mut SchemaGenerator) -> Schema {
    let text = json!({"type": "string", "minLength": 1, "maxLength": limits::MAX_STOP_STRING_BYTES});
    json_schema!({"anyOf": [
        text,
        {"type": "array", "items": text, "maxItems": limits::MAX_STOP_STRINGS},
        {"type": "null"},
    ]})
}

pub(crate) fn object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": ["object", "null"]})
}

/// The same where there always is one.
pub(crate) fn just_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "object"})
}

/// A text, or blocks of the Messages API.
pub(crate) fn blocks(_: &mut SchemaGenerator) -> Schema {
    let kinds = json!({"enum": ["text", "thinking", "redacted_thinking", "tool_use", "tool_result"]});
    let block = json!({"type": "object", "properties": {"type": kinds}, "required": ["type"]});
    json_schema!({"anyOf": [{"type": "string"}, {"type": "array", "items": block}]})
}

pub(crate) fn system(_: &mut SchemaGenerator) -> Schema {
    let text = json!({"type": "object", "properties": {"type": {"const": "text"}}, "required": ["type"]});
    json_schema!({"anyOf": [{"type": "string"}, {"type": "array", "items": text}, {"type": "null"}]})
}

pub(crate) fn stop_sequences(_: &mut SchemaGenerator) -> Schema {
    let text = json!({"type": "string", "minLength": 1, "maxLength": limits::MAX_STOP_STRING_BYTES});
    json_schema!({"type": ["array", "null"], "items": text, "maxItems": limits::MAX_STOP_STRINGS})
}

/// Objects whose meaning depends on their `type`.
pub(crate) fn objects(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": ["array", "null"], "items": {"type": "object"}})
}

/// The same where there always is one.
pub(crate) fn list(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "array", "items": {"type": "object"}})
}

/// Reasoning in pieces, as clients keep it.
pub(crate) fn thoughts(_: &mut SchemaGenerator) -> Schema {
    let text = json!({"type": ["string", "null"]});
    let piece = json!({
        "type": "object",
        "properties": {"type": text, "text": text, "refusal": text, "thinking": text, "reasoning": text},
    });
    json_schema!({"type": ["array", "null"], "items": piece})
}

/// `input`: a text, or items.
pub(crate) fn input(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}, {"type": "null"}]})
}

pub(crate) fn text(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": ["string", "null"], "minLength": 1})
}

pub(crate) fn choice(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": ["array", "null"], "items": {"type": "string", "minLength": 1}, "minItems": 1})
}

pub(crate) fn guided_json(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": ["object", "string", "null"], "description": "A JSON Schema, or its text."})
}

pub(crate) fn response_format(_: &mut SchemaGenerator) -> Schema {
    let kind =
        |name: &str| json!({"type": "object", "properties": {"type": {"const": name}}, "required": ["type"]});
    let wrapper = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "schema": {"type": ["object", "null"]},
            "strict": {"type": ["boolean", "null"]},
        },
    });
    let schema = json!({
        "type": "object",
        "properties": {"type": {"const": "json_schema"}, "json_schema": wrapper},
        "required": ["type", "json_schema"],
    });
    json_schema!({"anyOf": [kind("text"), kind("json_object"), schema, {"type": "null"}]})
}

pub(crate) fn structured_outputs(generator: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": ["object", "null"],
        "description": "At most one of them.",
        "properties": {
            "json": guided_json(generator),
            "json_object": {"type": ["boolean", "null"]},
            "regex": text(generator),
            "choice": choice(generator),
            "grammar": text(generator),
        },
        "additionalProperties": {"enum": [false, null]},
    })
}

pub(crate) fn effort(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"enum": efforts()})
}

const EFFORTS: [ReasoningEffort; 7] = [
    ReasoningEffort::None,
    ReasoningEffort::Minimal,
    ReasoningEffort::Low,
    ReasoningEffort::Medium,
    ReasoningEffort::High,
    ReasoningEffort::XHigh,
    ReasoningEffort::Max,
];

/// Levels of effort, and null.
pub(crate) fn efforts() -> Vec<Value> {
    EFFORTS.iter().map(|level| json!(level.as_str())).chain([Value::Null]).collect()
}

pub(crate) fn function_name(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "string", "pattern": format!("^[A-Za-z0-9_.-]{{1,{MAX_NAME}}}$")})
}

/// `tool_choice`: a word, a function, or a set of functions.
pub(crate) fn tool_choice(_: &mut SchemaGenerator) -> Schema {
    let named = json!({"type": "object", "properties": {"name": {"type": "string", "minLength": 1}}, "required": ["name"]});
    let function = json!({
        "type": "object",
        "properties": {"type": {"enum": ["function", null]}, "function": named},
        "required": ["function"],
    });
    let flat = json!({
        "type": "object",
        "properties": {"type": {"enum": ["function", null]}, "name": {"type": "string", "minLength": 1}},
        "required": ["name"],
    });
    let set = json!({
        "type": "object",
        "properties": {
            "mode": {"enum": ["auto", "required"]},
            "tools": {"type": "array", "items": {"anyOf": [function, flat]}, "minItems": 1},
        },
        "required": ["mode", "tools"],
    });
    let allowed = json!({
        "type": "object",
        "properties": {"type": {"const": "allowed_tools"}, "allowed_tools": set},
        "required": ["type", "allowed_tools"],
    });
    json_schema!({"anyOf": [{"enum": ["auto", "none", "required", null]}, function, flat, allowed]})
}

/// What is read of a message depends on its role; other fields are ignored.
pub(crate) fn by_role(schema: &mut Schema) {
    let of = |roles: &[&str], required: &[&str], others: &[&str]| {
        let told = |name: &&str| schema.get("properties")?.get(*name).cloned();
        let mut properties = serde_json::Map::from_iter([("role".to_owned(), json!({"enum": roles}))]);
        for name in required.iter().chain(others) {
            let field = told(name).unwrap_or_default();
            let field = if required.contains(name) {
                json!({"allOf": [field, {"not": {"enum": [null, ""]}}]})
            } else {
                field
            };
            properties.insert((*name).to_owned(), field);
        }
        let required: Vec<&str> = ["role"].iter().chain(required).copied().collect();
        json!({"type": "object", "properties": properties, "required": required})
    };
    let said = ["content", "reasoning", "reasoning_content", "refusal", "tool_calls", "function_call"];
    let mut asked = of(&["system", "developer", "user"], &["content"], &[]);
    // Nothing may be said, but it has to be said.
    if let Some(content) = asked.pointer_mut("/properties/content") {
        *content = json!({"$ref": format!("{COMPONENTS}Content")});
    }
    let roles = [
        asked,
        of(&["assistant"], &[], &said),
        of(&["tool"], &["tool_call_id"], &["content"]),
        of(&["function"], &["name"], &["content"]),
    ];
    *schema = json_schema!({"anyOf": roles});
}

/// What a response may leave out is never null.
pub(crate) fn absent_not_null(schema: &mut Schema) {
    let is_null = |value: &Value| value == "null" || *value == json!({"type": "null"}) || value.is_null();
    let Some(fields) = schema.get_mut("properties").and_then(Value::as_object_mut) else { return };
    let optional = fields.values_mut().filter_map(Value::as_object_mut);
    for field in optional {
        for list in ["type", "anyOf", "enum"] {
            if let Some(list) = field.get_mut(list).and_then(Value::as_array_mut) {
                list.retain(|value| !is_null(value));
            }
        }
    }
}

pub(crate) fn finish(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"enum": FINISH})
}

pub(crate) fn finish_or_none(_: &mut SchemaGenerator) -> Schema {
    let reasons: Vec<Value> = FINISH.iter().map(|reason| json!(reason)).chain([Value::Null]).collect();
    json_schema!({"enum": reasons})
}

const FINISH: [&str; 3] = ["stop", "length", "tool_calls"];

impl JsonSchema for Content {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Content".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let text = json!({
            "type": "object",
            "properties": {
                "type": {"enum": ["text", "input_text", "output_text"]},
                "text": {"type": "string"},
            },
            "required": ["type", "text"],
        });
        let refusal = json!({
            "type": "object",
            "properties": {"type": {"const": "refusal"}, "refusal": {"type": "string"}},
            "required": ["type", "refusal"],
        });
        let parts = json!({"type": "array", "items": {"anyOf": [{"type": "string"}, text, refusal]}});
        json_schema!({"anyOf": [{"type": "string"}, parts]})
    }
}

impl JsonSchema for Prompt {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Prompt".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let text = json!({"type": "string", "minLength": 1});
        // Ids in a prompt leave room for a token of the answer.
        let ids = defined("PromptIds");
        let many = |items: &Value| json!({"type": "array", "items": items, "minItems": 1, "maxItems": limits::MAX_PROMPTS});
        json_schema!({"anyOf": [text, many(&text), ids, many(&ids)]})
    }
}
