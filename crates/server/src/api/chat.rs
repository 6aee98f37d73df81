//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;
use ctxserve_core::TokenId;

use super::chat_frames::ChatFramer;
use super::chat_message;
use crate::error::ApiError;
use crate::generate::gathered::Gathered;
use crate::generate::run::Generation;
use crate::http::body::{blocking, json, read};
use crate::http::guard::{Caller, Tenant};
use crate::http::sse;
use crate::state::{ServerState, unix_seconds};
use crate::turn::{Places, Prepared, Turn};
use crate::validate::arguments::TemplateArguments;
use crate::validate::options::options;
use crate::validate::reasoning::{Asked, asked};
use crate::validate::{guide, history, tools};
use crate::wire;
use crate::wire::chat_request::{ChatFields, WireTool};
use crate::wire::chat_response::ChatResponse;
use crate::wire::fields::GenerationFields;
use crate::wire::read::text;
use crate::wire::refused::{self, Route};
use crate::wire::usage::WireUsage;

const ROUTE: &str = "/v1/chat/completions";

/// How this route's requests are spelled.
struct Spelling;

impl Places for Spelling {
    fn prompt(&self) -> &'static str {
        "messages"
    }

    fn message(&self, index: usize) -> String {
        format!("messages[{index}]")
    }

    fn schema(&self, index: usize) -> String {
        format!("tools[{index}].function.parameters")
    }
}

/// What frames and whole answers both carry.
pub(crate) struct Head {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) fingerprint: String,
    /// Present when the client wants ids back.
    pub(crate) prompt_ids: Option<Arc<[TokenId]>>,
    pub(crate) logprobs: bool,
}

/// Answers a conversation.
pub(crate) async fn chat(
    State(state): State<ServerState>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = read(&state, request).await?;
    let (preparing, tenant) = (state.clone(), caller.tenant);
    let prepared = blocking(&state, move || prepare(&preparing, tenant, &body)).await?;
    let options = &prepared.options;
    let head = Head {
        id: state.random_name("chatcmpl-"),
        created: unix_seconds(),
        model: options.model.clone(),
        fingerprint: state.config().system_fingerprint.clone(),
        prompt_ids: options.return_token_ids.then(|| Arc::clone(&prepared.prompt)),
        logprobs: options.sampling.logprobs.is_some(),
    };
    let generation = prepared.start(&state, &head.id, ROUTE, caller)?;
    if options.stream {
        let keep_alive = state.config().keep_alive;
        let framer = ChatFramer::new(state, head, options.n, options.usage);
        return Ok(sse::respond(generation, framer, keep_alive));
    }
    whole(&state, &head, options.n, generation).await
}

fn prepare(state: &ServerState, tenant: Tenant, body: &[u8]) -> Result<Prepared, ApiError> {
    let text = text(body)?;
    let shared: GenerationFields = wire::read::json(text)?;
    let fields: ChatFields = wire::read::json(text)?;
    refused::check(Route::Chat, text)?;
    let max_tokens = fields.max_completion_tokens.map(|most| (most, "max_completion_tokens"));
    let content = guide::content(&shared)?;
    let options = options(state, shared, max_tokens, logprobs(&fields)?)?;
    let Asked { effort, hide } = asked(&fields)?;
    let strict: Vec<bool> = fields.tools.iter().flatten().map(is_strict).collect();
    let tools = tools::tools(state.config(), fields.tools, text)?;
    let choice = tools::choice(state, fields.tool_choice.as_ref(), &tools)?;
    let arguments =
        TemplateArguments::new(state.config(), state.format(), fields.chat_template_kwargs.as_ref());
    let conversation = history::conversation(state.config(), fields.messages, tools, effort, arguments)?;
    let turn = Turn {
        conversation,
        options,
        choice,
        strict,
        content,
        one_call: fields.parallel_tool_calls == Some(false),
        hide_reasoning: hide,
        places: &Spelling,
    };
    turn.prepare(state, tenant)
}

fn is_strict(tool: &WireTool) -> bool {
    tool.function.as_ref().is_some_and(|function| function.strict == Some(true))
}

fn logprobs(fields: &ChatFields) -> Result<Option<(usize, &'static str)>, ApiError> {
    let param = "top_logprobs";
    let top = usize::try_from(fields.top_logprobs.unwrap_or(0)).unwrap_or(usize::MAX);
    if fields.logprobs == Some(true) {
        return Ok(Some((top, param)));
    }
    if top > 0 {
        return Err(ApiError::invalid(param, "top_logprobs needs logprobs to be true"));
    }
    Ok(None)
}

async fn whole(
    state: &ServerState,
    head: &Head,
    n: usize,
    mut generation: Generation,
) -> Result<Response, ApiError> {
    let gathered = Gathered::all(&mut generation, n).await?;
    let choices = gathered.into_iter().enumerate();
    let choices =
        choices.map(|(index, gathered)| chat_message::choice(state, head, &generation, index, gathered));
    json(&ChatResponse {
        id: &head.id,
        object: "chat.completion",
        created: head.created,
        model: &head.model,
        system_fingerprint: &head.fingerprint,
        choices: choices.collect(),
        usage: usage(&generation),
        prompt_token_ids: head.prompt_ids.as_deref(),
    })
}

/// Counts so far.
pub(crate) fn usage(generation: &Generation) -> WireUsage {
    let total = generation.total();
    WireUsage::new(generation.prompt_tokens(), total.cached, total.generated, total.reasoning)
}
