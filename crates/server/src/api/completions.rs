//! `POST /v1/completions`: prompts as text or token ids, continued without any chat protocol.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;
use ctxserve_core::{Guide, TokenId};

use super::chat::usage;
use super::completion_parts::{CompletionFramer, Head, Parts};
use crate::error::ApiError;
use crate::generate::choice::{Choice, ChoiceOptions};
use crate::generate::run::{Generation, Job};
use crate::generate::stop::StopMatcher;
use crate::generate::text::TextParser;
use crate::http::body::{blocking, json, read};
use crate::http::guard::Caller;
use crate::http::sse;
use crate::record::Accepted;
use crate::state::{ServerState, unix_seconds};
use crate::validate::guide;
use crate::validate::options::{Options, options, room};
use crate::validate::prompts::prompts;
use crate::wire;
use crate::wire::completion_request::CompletionFields;
use crate::wire::completion_response::CompletionResponse;
use crate::wire::fields::GenerationFields;
use crate::wire::read::text;
use crate::wire::refused::{self, Route};

const PARAM: &str = "prompt";
/// OpenAI's default for this route.
const DEFAULT_MAX_TOKENS: usize = 16;

/// A request, checked and encoded.
struct Prepared {
    options: Options,
    prompts: Vec<Arc<[TokenId]>>,
    max_tokens: Vec<usize>,
    /// What answers may be.
    guide: Option<Guide>,
    /// Text of each prompt, when it is to be repeated.
    echo: Option<Vec<String>>,
}

/// Continues prompts.
pub(crate) async fn completions(
    State(state): State<ServerState>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = read(&state, request).await?;
    let preparing = state.clone();
    let prepared = blocking(&state, move || prepare(&preparing, &body)).await?;
    let options = &prepared.options;
    let head = Head {
        id: state.random_name("cmpl-"),
        created: unix_seconds(),
        model: options.model.clone(),
        fingerprint: state.config().system_fingerprint.clone(),
        prompts: options.return_token_ids.then(|| prepared.prompts.clone()),
        echo: prepared.echo.clone(),
        logprobs: options.sampling.logprobs.is_some(),
        skip_special: options.skip_special,
        n: options.n,
    };
    let count = options.n * prepared.prompts.len();
    let generation = start(&state, &prepared, &head, count, caller)?;
    if options.stream {
        let keep_alive = state.config().keep_alive;
        let framer = CompletionFramer::new(state, head, count, options.usage);
        return Ok(sse::respond(generation, framer, keep_alive));
    }
    whole(&state, &head, count, generation).await
}

fn prepare(state: &ServerState, body: &[u8]) -> Result<Prepared, ApiError> {
    let text = text(body)?;
    let shared: GenerationFields = wire::read::json(text)?;
    let fields: CompletionFields = wire::read::json(text)?;
    refused::check(Route::Completions, text)?;
    let logprobs = fields.logprobs.map(|n| (usize::try_from(n).unwrap_or(usize::MAX), "logprobs"));
    let echo = fields.echo.unwrap_or(false);
    if echo && logprobs.is_some() {
        let message = "echo with logprobs needs log-probabilities of the prompt, which are not supported";
        return Err(ApiError::unsupported("logprobs", message));
    }
    let content = guide::content(&shared)?;
    let options = options(state, shared, None, logprobs)?;
    let prompts = prompts(state, fields.prompt, options.n)?;
    let default = Some(DEFAULT_MAX_TOKENS);
    let max_tokens = prompts.iter().map(|prompt| room(state, &options, default, prompt.len(), PARAM));
    let max_tokens = max_tokens.collect::<Result<_, _>>()?;
    let decode = |ids: &Arc<[TokenId]>| state.tokenizer().decode(ids, options.skip_special);
    let echo = echo.then(|| prompts.iter().map(decode).collect());
    let guide = guide::plain(state, content)?;
    Ok(Prepared { options, prompts, max_tokens, guide, echo })
}

fn start(
    state: &ServerState,
    prepared: &Prepared,
    head: &Head,
    count: usize,
    caller: Caller,
) -> Result<Generation, ApiError> {
    let options = &prepared.options;
    let accepted = Accepted {
        id: state.next_request(),
        name: head.id.clone(),
        http_id: caller.http_id,
        route: "/v1/completions",
        model: head.model.clone(),
        stream: options.stream,
        prompt_tokens: prepared.prompts.iter().map(|prompt| prompt.len()).sum(),
        max_tokens: prepared.max_tokens.iter().copied().max().unwrap_or(0),
        choices: count,
        arrived: caller.arrived,
    };
    let job = Job {
        prompts: prepared.prompts.clone(),
        n: options.n,
        sampling: options.sampling.clone(),
        rules: options.rules.clone(),
        max_tokens: prepared.max_tokens.clone(),
        guide: prepared.guide.clone(),
        salt: options.salt.clone(),
        prompt_param: PARAM,
    };
    let silent_stops = if options.include_stop { Vec::new() } else { options.rules.all().collect() };
    let reading = ChoiceOptions {
        stop: StopMatcher::new(&options.stop, options.include_stop),
        rules: options.rules.clone(),
        silent_stops,
        all_logprobs: true,
        one_call: false,
        hide_reasoning: false,
    };
    Generation::start(state, &job, accepted, || {
        let parser = TextParser::new(Arc::clone(state.tokenizer()), options.skip_special);
        Choice::new(Box::new(parser), reading.clone(), Arc::clone(&options.stop))
    })
}

async fn whole(
    state: &ServerState,
    head: &Head,
    count: usize,
    mut generation: Generation,
) -> Result<Response, ApiError> {
    let mut parts: Vec<Parts> = (0..count).map(|index| Parts::new(head, index)).collect();
    let mut choices: Vec<_> = parts.iter_mut().map(|choice| choice.begin(head)).collect();
    while let Some(next) = generation.next().await {
        let (index, step) = next?;
        if let (Some(part), Some(choice)) = (parts.get_mut(index), choices.get_mut(index)) {
            part.add(state, head, step, choice);
        }
    }
    json(&CompletionResponse {
        id: &head.id,
        object: "text_completion",
        created: head.created,
        model: &head.model,
        system_fingerprint: &head.fingerprint,
        choices,
        usage: Some(Some(usage(&generation))),
    })
}
