//! `/v1/responses`.

mod answer;
mod input;
mod items;
mod kept;
pub(crate) mod live;
mod log;
mod prepare;
mod sealed;
pub(crate) mod stored;
mod truncate;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;

use self::answer::Answer;
use self::kept::Keep;
use self::live::Live;
use self::log::Log;
use self::prepare::Ready;
use crate::error::ApiError;
use crate::generate::choice::Step;
use crate::generate::run::Generation;
use crate::http::body::{blocking, json, read};
use crate::http::guard::Caller;
use crate::http::sse::{self, Frame, Framer};
use crate::state::ServerState;
use crate::wire::responses_response::InputTokens;

const ROUTE: &str = "/v1/responses";

/// Answers a conversation.
pub(crate) async fn create(
    State(state): State<ServerState>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = read(&state, request).await?;
    let preparing = state.clone();
    let owner = caller.tenant;
    let ready = blocking(&state, move || prepare::prepare(&preparing, owner, &body)).await?;
    let Ready { prepared, plan, keep } = ready;
    let generation = prepared.start(&state, &plan.id, ROUTE, caller)?;
    let stream = prepared.options.stream;
    let background = plan.echo.background;
    let log = if stream { Log::on() } else { Log::default() };
    let mut answer = Answer::new(state.clone(), plan, log);
    let keep_alive = state.config().keep_alive;
    if let Some(keep) = keep.clone().filter(|_| background) {
        let queued = json(&answer.response())?;
        let live = Live::start(&state, answer, keep, generation);
        return Ok(if stream { stored::follow(live, 0, keep_alive) } else { queued });
    }
    if stream {
        return Ok(sse::respond(generation, ResponseFramer { state, answer, keep }, keep_alive));
    }
    whole(&state, &mut answer, keep, generation).await
}

async fn whole(
    state: &ServerState,
    answer: &mut Answer,
    keep: Option<Keep>,
    mut generation: Generation,
) -> Result<Response, ApiError> {
    while let Some(next) = generation.next().await {
        let (_, step) = next?;
        answer.step(step, &generation);
    }
    answer.finish(&generation);
    if let Some(keep) = keep {
        keep.store(state, answer);
    }
    json(&answer.response())
}

/// Counts the tokens of a prompt.
pub(crate) async fn input_tokens(
    State(state): State<ServerState>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = read(&state, request).await?;
    let counting = state.clone();
    let input_tokens = blocking(&state, move || prepare::count(&counting, caller.tenant, &body)).await?;
    json(&InputTokens { object: "response.input_tokens", input_tokens })
}

/// Items are not compacted here.
pub(crate) async fn compact() -> ApiError {
    let message = "This server does not compact conversations; send the items that matter to /v1/responses.";
    ApiError::unsupported_path(message)
}

/// An answer's events as they come.
struct ResponseFramer {
    state: ServerState,
    answer: Answer,
    keep: Option<Keep>,
}

impl ResponseFramer {
    /// Stored before the end is said: who hears of it can go on from there.
    fn end(&mut self) -> Vec<Frame> {
        if let Some(keep) = self.keep.take() {
            keep.store(&self.state, &self.answer);
        }
        self.answer.end();
        let mut frames = self.answer.log().take();
        frames.push(sse::done());
        frames
    }
}

impl Framer for ResponseFramer {
    fn first(&mut self, _: &Generation) -> Vec<Frame> {
        self.answer.begin();
        self.answer.log().take()
    }

    fn step(&mut self, _: usize, step: Step, generation: &Generation) -> Vec<Frame> {
        self.answer.step(step, generation);
        self.answer.log().take()
    }

    fn last(&mut self, generation: &Generation) -> Vec<Frame> {
        self.answer.finish(generation);
        self.end()
    }

    fn error(&mut self, error: &ApiError) -> Vec<Frame> {
        self.answer.fail(error);
        self.end()
    }
}
