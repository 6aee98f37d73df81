//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;
use ctxserve_chat::ParserOptions;
use ctxserve_chat::guide::CallRule;
use ctxserve_core::{Guide, TokenId};

use super::chat_frames::ChatFramer;
use super::chat_message::Gathered;
use crate::error::ApiError;
use crate::generate::choice::{Choice, ChoiceOptions};
use crate::generate::run::{Generation, Job};
use crate::generate::stop::StopMatcher;
use crate::http::body::{blocking, json, read};
use crate::http::guard::Caller;
use crate::http::sse;
use crate::record::Accepted;
use crate::state::{ServerState, unix_seconds};
use crate::validate::arguments::TemplateArguments;
use crate::validate::options::{Options, options, room};
use crate::validate::{guide, history, tools};
use crate::wire;
use crate::wire::chat_request::{ChatFields, WireTool};
use crate::wire::chat_response::ChatResponse;
use crate::wire::fields::GenerationFields;
use crate::wire::read::text;
use crate::wire::refused::{self, Route};
use crate::wire::usage::WireUsage;

const PARAM: &str = "messages";

/// A request, checked and rendered.
struct Prepared {
    options: Options,
    prompt: Arc<[TokenId]>,
    max_tokens: usize,
    /// How answers are read.
    parser: ParserOptions,
    /// What answers may be.
    guide: Option<Guide>,
    one_call: bool,
    hide_reasoning: bool,
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
    let preparing = state.clone();
    let prepared = blocking(&state, move || prepare(&preparing, &body)).await?;
    let options = &prepared.options;
    let head = Head {
        id: state.random_name("chatcmpl-"),
        created: unix_seconds(),
        model: options.model.clone(),
        fingerprint: state.config().system_fingerprint.clone(),
        prompt_ids: options.return_token_ids.then(|| Arc::clone(&prepared.prompt)),
        logprobs: options.sampling.logprobs.is_some(),
    };
    let generation = start(&state, &prepared, &head, caller)?;
    if options.stream {
        let keep_alive = state.config().keep_alive;
        let framer = ChatFramer::new(state, head, options.n, options.usage);
        return Ok(sse::respond(generation, framer, keep_alive));
    }
    whole(&state, &head, options.n, generation).await
}

fn prepare(state: &ServerState, body: &[u8]) -> Result<Prepared, ApiError> {
    let text = text(body)?;
    let shared: GenerationFields = wire::read::json(text)?;
    let fields: ChatFields = wire::read::json(text)?;
    refused::check(Route::Chat, text)?;
    let max_tokens = fields.max_completion_tokens.map(|most| (most, "max_completion_tokens"));
    let content = guide::content(&shared)?;
    let mut options = options(state, shared, max_tokens, logprobs(&fields)?)?;
    let strict: Vec<bool> = fields.tools.iter().flatten().map(is_strict).collect();
    let tools = tools::tools(state.config(), fields.tools, text)?;
    let choice = tools::choice(state, fields.tool_choice.as_ref(), &tools)?;
    let effort = fields.reasoning_effort.as_deref();
    let arguments =
        TemplateArguments::new(state.config(), state.format(), fields.chat_template_kwargs.as_ref());
    let callable = tools.iter().filter(|tool| choice.includes(&tool.name));
    let names: Vec<String> = callable.map(|tool| tool.name.clone()).collect();
    let conversation = history::conversation(state.config(), fields.messages, tools, effort, arguments)?;
    let prompt: Arc<[TokenId]> = state.format().render(&conversation)?.into();
    let parser = ParserOptions {
        calls: choice.rule != CallRule::Forbidden,
        tools: Some(names.into()),
        thinking: state.format().leaves_thinking_open(&prompt),
    };
    let max_tokens = room(state, &options, state.config().default_max_tokens, prompt.len(), PARAM)?;
    let one_call = fields.parallel_tool_calls == Some(false);
    let guide = guide::chat(state, &conversation.tools, &strict, &choice, one_call, content, &prompt)?;
    if guide.is_some() {
        // A checkpoint's end that is ordinary text would cut the text under a grammar.
        options.rules.eos =
            options.rules.eos.iter().copied().filter(|id| state.tokenizer().is_control(*id)).collect();
    }
    let hide_reasoning = fields.include_reasoning == Some(false);
    Ok(Prepared { options, prompt, max_tokens, parser, guide, one_call, hide_reasoning })
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

fn start(
    state: &ServerState,
    prepared: &Prepared,
    head: &Head,
    caller: Caller,
) -> Result<Generation, ApiError> {
    let options = &prepared.options;
    let accepted = Accepted {
        id: state.next_request(),
        name: head.id.clone(),
        http_id: caller.http_id,
        route: "/v1/chat/completions",
        model: head.model.clone(),
        stream: options.stream,
        prompt_tokens: prepared.prompt.len(),
        max_tokens: prepared.max_tokens,
        choices: options.n,
        arrived: caller.arrived,
    };
    let job = Job {
        prompts: vec![Arc::clone(&prepared.prompt)],
        n: options.n,
        sampling: options.sampling.clone(),
        rules: options.rules.clone(),
        max_tokens: vec![prepared.max_tokens],
        guide: prepared.guide.clone(),
        prompt_param: PARAM,
    };
    // The parser needs the control tokens that end a turn; other stop ids are no part of the message.
    let mut silent_stops = options.rules.token_ids.clone();
    silent_stops.retain(|&id| !options.include_stop && !state.tokenizer().is_special(id));
    let reading = ChoiceOptions {
        stop: StopMatcher::new(&options.stop, options.include_stop),
        rules: options.rules.clone(),
        silent_stops,
        all_logprobs: false,
        one_call: prepared.one_call,
        hide_reasoning: prepared.hide_reasoning,
    };
    Generation::start(state, &job, accepted, || {
        Choice::new(
            state.format().parser(prepared.parser.clone()),
            reading.clone(),
            Arc::clone(&options.stop),
        )
    })
}

async fn whole(
    state: &ServerState,
    head: &Head,
    n: usize,
    mut generation: Generation,
) -> Result<Response, ApiError> {
    let mut gathered: Vec<Gathered> = (0..n).map(|_| Gathered::default()).collect();
    while let Some(next) = generation.next().await {
        let (index, step) = next?;
        if let Some(choice) = gathered.get_mut(index) {
            choice.add(step);
        }
    }
    let choices = gathered.into_iter().enumerate().map(|(index, choice)| choice.finish(state, head, index));
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
