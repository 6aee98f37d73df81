//! Constrained decoding as requests ask for it: `tool_choice`, `strict`, `response_format`, `structured_outputs` and the
//! older `guided_*` fields.

use ctxserve_chat::FunctionTool;
use ctxserve_chat::guide::{Demands, Fault, Grammar, GuideError, GuidedTool};
use ctxserve_core::{Guide, TokenId};
use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::state::ServerState;
use crate::turn::Turn;
use crate::wire::fields::GenerationFields;

/// What the text for the user has to be, and the field that says so.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Content {
    grammar: Grammar,
    param: String,
}

/// Reads the fields that constrain the text for the user.
///
/// # Errors
/// 400 naming the field, and when more than one of them asks for something.
pub(crate) fn content(fields: &GenerationFields) -> Result<Option<Content>, ApiError> {
    let guided = [
        ("guided_json", &fields.guided_json),
        ("guided_regex", &fields.guided_regex),
        ("guided_choice", &fields.guided_choice),
        ("guided_grammar", &fields.guided_grammar),
    ];
    let mut found = Vec::new();
    found.extend(present(&fields.response_format).map(response_format).transpose()?.flatten());
    found.extend(present(&fields.structured_outputs).map(structured_outputs).transpose()?.flatten());
    for (param, value) in guided {
        let kind = param.trim_start_matches("guided_");
        found.extend(
            present(value).map(|value| constraint(kind, value, param.to_owned())).transpose()?.flatten(),
        );
    }
    match found.as_slice() {
        [_, second, ..] => {
            let message =
                "only one of response_format, structured_outputs and guided_* may constrain the answer";
            Err(ApiError::invalid(second.param.clone(), message))
        }
        _ => Ok(found.pop()),
    }
}

fn present(value: &Option<Value>) -> Option<&Value> {
    value.as_ref().filter(|value| !value.is_null())
}

fn response_format(format: &Value) -> Result<Option<Content>, ApiError> {
    let param = "response_format";
    let Some(map) = format.as_object() else {
        return Err(ApiError::invalid(param, "response_format must be an object with a 'type'"));
    };
    match map.get("type").and_then(Value::as_str) {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(json_object(param))),
        Some("json_schema") => {
            let at = "response_format.json_schema";
            let Some(Value::Object(wrapper)) = map.get("json_schema") else {
                return Err(ApiError::invalid(at, "type 'json_schema' needs an object 'json_schema'"));
            };
            json_schema(wrapper, at).map(Some)
        }
        Some("structural_tag") => {
            Err(ApiError::unsupported("response_format.type", "structural tags are not supported"))
        }
        _ => {
            let message = "the type of response_format must be 'text', 'json_object' or 'json_schema'";
            Err(ApiError::invalid("response_format.type", message))
        }
    }
}

/// Reads `schema` and `strict` of a demand for JSON; `at` is how the route calls the object that holds them.
///
/// # Errors
/// 400 naming the part.
pub(crate) fn json_schema(holder: &Map<String, Value>, at: &str) -> Result<Content, ApiError> {
    let strict = match holder.get("strict") {
        None | Some(Value::Null) => false,
        Some(Value::Bool(strict)) => *strict,
        Some(_) => return Err(ApiError::invalid(format!("{at}.strict"), "strict must be a boolean")),
    };
    let param = format!("{at}.schema");
    let grammar = match holder.get("schema") {
        None | Some(Value::Null) => Grammar::json_object(),
        Some(schema @ Value::Object(_)) => Grammar::Json { schema: schema.clone(), strict },
        Some(_) => return Err(ApiError::invalid(param, "the schema must be a JSON Schema object")),
    };
    Ok(Content { grammar, param })
}

/// A demand for any JSON object, by the field `param`.
pub(crate) fn json_object(param: &str) -> Content {
    Content { grammar: Grammar::json_object(), param: param.to_owned() }
}

fn structured_outputs(value: &Value) -> Result<Option<Content>, ApiError> {
    let param = "structured_outputs";
    let Some(map) = value.as_object() else {
        return Err(ApiError::invalid(param, "structured_outputs must be an object"));
    };
    let mut found = None;
    for (key, value) in map.iter().filter(|(_, value)| !value.is_null()) {
        let at = format!("{param}.{key}");
        let next = match key.as_str() {
            "json" | "regex" | "choice" | "grammar" => constraint(key, value, at.clone())?,
            "json_object" if value == true => {
                Some(Content { grammar: Grammar::json_object(), param: at.clone() })
            }
            // Anything that asks for nothing.
            _ if value == false => None,
            _ => {
                let message = format!("'{key}' of structured_outputs is not supported");
                return Err(ApiError::unsupported(at, message));
            }
        };
        if next.is_some() && found.is_some() {
            let message = "structured_outputs takes one of json, json_object, regex, choice and grammar";
            return Err(ApiError::invalid(at, message));
        }
        found = next.or(found);
    }
    Ok(found)
}

/// One constraint in vLLM's spelling.
fn constraint(kind: &str, value: &Value, param: String) -> Result<Option<Content>, ApiError> {
    let string = |what: &str| match value {
        Value::String(text) => Ok(text.clone()),
        _ => Err(ApiError::invalid(param.clone(), format!("{what} must be a string"))),
    };
    let grammar = match kind {
        "json" => {
            let schema = match value {
                Value::String(text) => serde_json::from_str(text).map_err(|error| {
                    ApiError::invalid(param.clone(), format!("the schema is not JSON: {error}"))
                })?,
                other => other.clone(),
            };
            if !schema.is_object() {
                return Err(ApiError::invalid(param, "the schema must be a JSON Schema object"));
            }
            Grammar::Json { schema, strict: false }
        }
        "regex" => Grammar::Regex(string("a regular expression")?),
        "grammar" => Grammar::Lark(string("a grammar")?),
        _ => {
            let strings = value.as_array().map(|list| {
                list.iter().map(|item| item.as_str().map(str::to_owned)).collect::<Option<Vec<String>>>()
            });
            match strings.flatten() {
                Some(list) => Grammar::Choice(list),
                None => return Err(ApiError::invalid(param, "a choice must be a list of strings")),
            }
        }
    };
    Ok(Some(Content { grammar, param }))
}

/// The guide of a chat answer; `None` where the model may say what it likes.
///
/// # Errors
/// 400 naming the schema or grammar that cannot be used, 503 while too many are being compiled.
pub(crate) fn chat(
    state: &ServerState,
    turn: &Turn<'_>,
    prompt: &[TokenId],
) -> Result<Option<Guide>, ApiError> {
    let Turn { conversation, strict, choice, content, one_call, places, .. } = turn;
    let tools = &conversation.tools;
    let indices: Vec<usize> = (0..tools.len()).filter(|&index| choice.includes(&tools[index].name)).collect();
    let guided = |&index: &usize| {
        let FunctionTool { name, parameters, .. } = &tools[index];
        let strict = strict.get(index).copied().unwrap_or(false);
        GuidedTool { name: name.clone(), parameters: parameters.clone(), strict }
    };
    let demands = Demands {
        tools: indices.iter().map(guided).collect(),
        calls: choice.rule,
        one_call: *one_call || choice.is_named,
        content: content.as_ref().map(|content| content.grammar.clone()),
    };
    if !(demands.is_any() || indices.len() < tools.len()) {
        return Ok(None);
    }
    let param = content.as_ref().map(|content| content.param.as_str());
    let refused = |error: GuideError| match error.fault {
        Fault::Tool(at) => {
            let index = indices.get(at).copied().unwrap_or(at);
            ApiError::invalid(places.schema(index), error.what)
        }
        _ => refused(error, param.unwrap_or("tool_choice")),
    };
    let constraint = state.format().guide(state.guides(), &demands, prompt).map_err(refused)?;
    first(constraint, param.unwrap_or("tool_choice")).map(Some)
}

/// The guide of a completion.
///
/// # Errors
/// As [`chat`].
pub(crate) fn plain(state: &ServerState, content: Option<Content>) -> Result<Option<Guide>, ApiError> {
    let Some(Content { grammar, param }) = content else { return Ok(None) };
    let constraint = state.guides().plain(&grammar, &state.eos()).map_err(|error| refused(error, &param))?;
    first(constraint, &param).map(Some)
}

fn refused(error: GuideError, param: &str) -> ApiError {
    match error.fault {
        Fault::Busy => ApiError::unavailable(error.what),
        Fault::Server => ApiError::unsupported(param, error.what),
        Fault::Tool(_) | Fault::Content => ApiError::invalid(param, error.what),
    }
}

fn first(constraint: Box<dyn ctxserve_core::Constraint>, param: &str) -> Result<Guide, ApiError> {
    Guide::new(constraint).map_err(|error| ApiError::invalid(param, error.to_string()))
}
