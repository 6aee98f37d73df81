//! From a request's fields to a turn.

use std::sync::Arc;

use ctxserve_chat::FunctionTool;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::answer::Plan;
use super::input::{self, Conversation};
use super::items::{Origin, Skipped};
use super::kept::Keep;
use super::truncate::truncate;
use crate::error::ApiError;
use crate::state::ServerState;
use crate::store::{Body, Link, Owner};
use crate::turn::{Places, Prepared, Turn};
use crate::validate::arguments::TemplateArguments;
use crate::validate::guide::Content;
use crate::validate::options::{Logprobs, Options, options};
use crate::validate::{guide, history, tools};
use crate::wire;
use crate::wire::fields::GenerationFields;
use crate::wire::read::text;
use crate::wire::refused::{self, Route};
use crate::wire::responses_request::{ResponsesFields, WireFunctionTool, WireReasoning};
use crate::wire::responses_response::{Echo, EchoReasoning, EchoText, EchoTool};

/// What `include` may ask for. What belongs to tools that are not run here is never there to be included.
const INCLUDABLE: [&str; 8] = [
    ENCRYPTED,
    LOGPROBS,
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
];
const ENCRYPTED: &str = "reasoning.encrypted_content";
const LOGPROBS: &str = "message.output_text.logprobs";

/// OpenAI's bounds on `metadata`.
const MAX_METADATA: usize = 16;
const MAX_METADATA_KEY: usize = 64;
const MAX_METADATA_VALUE: usize = 512;

/// A request, ready to be generated.
pub(super) struct Ready {
    pub(super) prepared: Prepared,
    pub(super) plan: Plan,
    /// How it is to be stored, if it is.
    pub(super) keep: Option<Keep>,
}

/// How this route's requests are spelled.
struct Spelling {
    origins: Vec<Origin>,
    /// Places of the functions among the tools.
    functions: Vec<usize>,
}

impl Places for Spelling {
    fn prompt(&self) -> &'static str {
        "input"
    }

    fn message(&self, index: usize) -> String {
        match self.origins.get(index) {
            Some(Origin::Input(item)) => format!("input[{item}]"),
            Some(Origin::Instructions) => "instructions".to_owned(),
            Some(Origin::Previous) => "previous_response_id".to_owned(),
            None => "input".to_owned(),
        }
    }

    fn schema(&self, index: usize) -> String {
        format!("tools[{}].parameters", self.functions.get(index).unwrap_or(&index))
    }
}

/// Checks a body and renders its prompt.
///
/// # Errors
/// 400 naming the field, 404 for a response or an item that is not there.
pub(super) fn prepare(state: &ServerState, owner: Owner, body: &[u8]) -> Result<Ready, ApiError> {
    checked(state, owner, body, |turn, plan, keep| {
        Ok(Ready { prepared: turn.prepare(state, owner)?, plan, keep })
    })
}

/// How many tokens the prompt of a body has, whether or not they leave room for an answer.
///
/// # Errors
/// As [`prepare`].
pub(super) fn count(state: &ServerState, owner: Owner, body: &[u8]) -> Result<usize, ApiError> {
    checked(state, owner, body, |mut turn, _, _| Ok(turn.render(state, owner)?.ids.len()))
}

fn checked<T>(
    state: &ServerState,
    owner: Owner,
    body: &[u8],
    then: impl FnOnce(Turn<'_>, Plan, Option<Keep>) -> Result<T, ApiError>,
) -> Result<T, ApiError> {
    let text = text(body)?;
    let shared: GenerationFields = wire::read::json(text)?;
    let fields: ResponsesFields = wire::read::json(text)?;
    refused::check(Route::Responses, text)?;
    // Its one option pads events against eavesdroppers.
    let shared = GenerationFields { stream_options: None, ..shared };
    let include = fields.include.as_deref().unwrap_or_default();
    included(include)?;
    let logprobs = logprobs(fields.top_logprobs, include);
    let (content, format) = content(&shared, fields.text.as_ref().and_then(|text| text.format.as_ref()))?;
    let max_tokens = fields.max_output_tokens.map(|most| (most, "max_output_tokens"));
    let options = options(state, shared, max_tokens, logprobs)?;
    let functions = functions(state, fields.tools.as_deref().unwrap_or_default())?;
    let choice = fields.tool_choice.as_ref().map(without_hosted);
    let choice = tools::choice(state, choice.as_ref(), &functions.tools)?;
    let previous = fields.previous_response_id.as_deref().map(|id| previous(state, owner, id)).transpose()?;
    let wants_store = fields.store.unwrap_or(true);
    let store = wants_store && state.responses().is_on();
    if fields.background == Some(true) && !store {
        let why = if wants_store { "this server stores none" } else { "store is false" };
        return Err(ApiError::invalid(
            "background",
            format!("background needs a stored response, and {why}"),
        ));
    }
    let echo = echo(&fields, &options, &functions, format, store)?;
    let Conversation { messages, mut origins, stored } =
        input::conversation(state, owner, fields.instructions, previous.as_ref(), fields.input, store)?;
    let effort = fields.reasoning.as_ref().and_then(|reasoning| reasoning.effort.as_deref());
    let effort = effort.map(|text| (text, "reasoning.effort"));
    let arguments =
        TemplateArguments::new(state.config(), state.format(), fields.chat_template_kwargs.as_ref());
    let mut conversation = history::assemble(state.config(), messages, functions.tools, effort, arguments)?;
    if echo.truncation == "auto" {
        truncate(state, &mut conversation, &mut origins, options.max_tokens);
    }
    let turn = Turn {
        conversation,
        options,
        choice,
        strict: functions.strict,
        content,
        one_call: fields.parallel_tool_calls == Some(false),
        hide_reasoning: false,
        places: &Spelling { origins, functions: functions.places },
    };
    let plan = Plan {
        id: state.random_name("resp_"),
        echo,
        sealed: include.iter().any(|what| what == ENCRYPTED),
        logprobs: logprobs.is_some(),
    };
    let keep = store.then(|| Keep { owner, previous, input: stored });
    then(turn, plan, keep)
}

fn included(include: &[String]) -> Result<(), ApiError> {
    match include.iter().position(|what| !INCLUDABLE.contains(&what.as_str())) {
        Some(index) => {
            let known = INCLUDABLE.join("', '");
            Err(ApiError::invalid(format!("include[{index}]"), format!("include takes '{known}'")))
        }
        None => Ok(()),
    }
}

fn logprobs(top: Option<u64>, include: &[String]) -> Logprobs {
    let asked = top.is_some_and(|top| top > 0) || include.iter().any(|what| what == LOGPROBS);
    let top = usize::try_from(top.unwrap_or(0)).unwrap_or(usize::MAX);
    asked.then_some((top, "top_logprobs"))
}

/// The link that a conversation goes on from.
fn previous(state: &ServerState, owner: Owner, id: &str) -> Result<Arc<Link>, ApiError> {
    let param = "previous_response_id";
    let Some(stored) = state.responses().get(owner, id) else {
        let shown: String = id.chars().take(128).collect();
        let message = format!("Previous response with id '{shown}' not found.");
        return Err(ApiError::not_found(Some(param), "previous_response_not_found", message));
    };
    match stored.body {
        Body::Live(_) => Err(ApiError::invalid(param, "the previous response is still in progress")),
        Body::Done(..) => Ok(stored.link),
    }
}

/// What the text has to be, and `text.format` as the response repeats it.
fn content(shared: &GenerationFields, format: Option<&Value>) -> Result<(Option<Content>, Value), ApiError> {
    let elsewhere = guide::content(shared)?;
    let param = "text.format";
    let plain = json!({"type": "text"});
    let (wanted, format) = match format {
        None | Some(Value::Null) => (None, plain),
        Some(Value::Object(map)) => match map.get("type").and_then(Value::as_str) {
            Some("text") => (None, plain),
            Some("json_object") => (Some(guide::json_object(param)), json!({"type": "json_object"})),
            Some("json_schema") => {
                let mut echo = Map::new();
                for name in ["type", "name", "description", "schema", "strict"] {
                    echo.insert(name.to_owned(), map.get(name).cloned().unwrap_or(Value::Null));
                }
                echo["strict"] = Value::Bool(map.get("strict") == Some(&Value::Bool(true)));
                (Some(guide::json_schema(map, param)?), Value::Object(echo))
            }
            _ => {
                let message = "the type of text.format must be 'text', 'json_object' or 'json_schema'";
                return Err(ApiError::invalid("text.format.type", message));
            }
        },
        Some(_) => return Err(ApiError::invalid(param, "text.format must be an object with a 'type'")),
    };
    match (wanted, elsewhere) {
        (Some(_), Some(_)) => {
            let message = "only one of text.format, structured_outputs and guided_* may constrain the answer";
            Err(ApiError::invalid(param, message))
        }
        (wanted, elsewhere) => Ok((wanted.or(elsewhere), format)),
    }
}

/// The functions among the tools.
#[derive(Default)]
struct Functions {
    tools: Vec<FunctionTool>,
    strict: Vec<bool>,
    places: Vec<usize>,
}

/// Tools of other types are not run here. Clients list them for servers that do, so they are passed over.
fn functions(state: &ServerState, list: &[Value]) -> Result<Functions, ApiError> {
    tools::few(state.config(), list.len())?;
    let mut functions = Functions::default();
    let mut skipped = Skipped::default();
    for (index, tool) in list.iter().enumerate() {
        let at = |part: &str| format!("tools[{index}].{part}");
        match tool.get("type").and_then(Value::as_str) {
            Some("function") => {}
            Some(kind) => {
                skipped.add(kind);
                continue;
            }
            None => return Err(ApiError::invalid(at("type"), "a tool needs a 'type'")),
        }
        let tool = WireFunctionTool::deserialize(tool).map_err(|error| {
            ApiError::invalid(
                format!("tools[{index}]"),
                format!("Invalid value for 'tools[{index}]': {error}"),
            )
        })?;
        functions.strict.push(tool.strict == Some(true));
        functions.tools.push(tools::declared(tool.name, tool.description, tool.parameters, &at)?);
        functions.places.push(index);
    }
    skipped.log("skipping tools of types that are not run here");
    Ok(functions)
}

/// `tool_choice` without the tools that are passed over.
fn without_hosted(choice: &Value) -> Value {
    let mut choice = choice.clone();
    if choice["type"] == "allowed_tools"
        && let Some(list) = choice.get_mut("tools").and_then(Value::as_array_mut)
    {
        list.retain(|tool| tool["type"] == "function" || tool.get("type").is_none());
    }
    choice
}

fn one_of<'a>(param: &str, value: Option<&str>, known: &[&'a str]) -> Result<Option<&'a str>, ApiError> {
    let Some(value) = value else { return Ok(None) };
    let found = known.iter().find(|known| **known == value);
    let message = || format!("{param} must be one of '{}'", known.join("', '"));
    found.map(|known| Some(*known)).ok_or_else(|| ApiError::invalid(param, message()))
}

fn metadata(given: Option<&Map<String, Value>>) -> Result<Map<String, Value>, ApiError> {
    let given = given.cloned().unwrap_or_default();
    let invalid = |message: String| Err(ApiError::invalid("metadata", message));
    if given.len() > MAX_METADATA {
        return invalid(format!("metadata has {} entries, at most {MAX_METADATA} are allowed", given.len()));
    }
    for (key, value) in &given {
        let fits = |text: &str| text.chars().count() <= MAX_METADATA_VALUE;
        if key.chars().count() > MAX_METADATA_KEY {
            return invalid(format!("a key of metadata has at most {MAX_METADATA_KEY} characters"));
        }
        if !value.as_str().is_some_and(fits) {
            return invalid(format!(
                "values of metadata are strings of at most {MAX_METADATA_VALUE} characters"
            ));
        }
    }
    Ok(given)
}

fn echo(
    fields: &ResponsesFields,
    options: &Options,
    functions: &Functions,
    format: Value,
    store: bool,
) -> Result<Echo, ApiError> {
    let truncation = one_of("truncation", fields.truncation.as_deref(), &["auto", "disabled"])?;
    let tiers = ["auto", "default", "flex", "priority", "scale"];
    one_of("service_tier", fields.service_tier.as_deref(), &tiers)?;
    let verbosity = fields.text.as_ref().and_then(|text| text.verbosity.as_deref());
    if verbosity.is_some_and(|verbosity| verbosity != "medium") {
        let message = "this model has one verbosity, 'medium'; leave text.verbosity out";
        return Err(ApiError::unsupported("text.verbosity", message));
    }
    let none = WireReasoning::default();
    let reasoning = fields.reasoning.as_ref().unwrap_or(&none);
    let summary = reasoning.summary.as_deref().or(reasoning.generate_summary.as_deref());
    one_of("reasoning.summary", summary, &["auto", "concise", "detailed", "none"])?;
    let tools = functions.tools.iter().zip(&functions.strict).map(|(tool, &strict)| EchoTool {
        name: tool.name.clone(),
        description: tool.description.clone(),
        parameters: tool.parameters.clone(),
        strict,
    });
    let given = fields.tool_choice.clone().filter(|choice| !choice.is_null());
    Ok(Echo {
        model: options.model.clone(),
        background: fields.background.unwrap_or(false),
        frequency_penalty: options.sampling.frequency_penalty,
        instructions: fields.instructions.clone(),
        max_output_tokens: fields.max_output_tokens,
        max_tool_calls: fields.max_tool_calls,
        metadata: metadata(fields.metadata.as_ref())?,
        parallel_tool_calls: fields.parallel_tool_calls.unwrap_or(true),
        presence_penalty: options.sampling.presence_penalty,
        previous_response_id: fields.previous_response_id.clone(),
        prompt_cache_key: fields.prompt_cache_key.clone(),
        reasoning: EchoReasoning { effort: reasoning.effort.clone(), summary: summary.map(str::to_owned) },
        safety_identifier: fields.safety_identifier.clone(),
        service_tier: "default",
        store,
        temperature: options.sampling.temperature,
        text: EchoText { format, verbosity: "medium" },
        tool_choice: given.unwrap_or_else(|| "auto".into()),
        tools: tools.collect(),
        top_logprobs: fields.top_logprobs.unwrap_or(0),
        top_p: options.sampling.top_p,
        truncation: truncation.unwrap_or("disabled"),
        user: fields.user.clone(),
    })
}
