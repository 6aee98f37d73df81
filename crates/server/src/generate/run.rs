//! All choices of a request, from submission to their ends.

use std::sync::Arc;
use std::time::Duration;

use ctxserve_core::{
    Event, FinishReason, GenerateRequest, Guide, RequestId, SamplingParams, StopRules, TokenId,
};
use ctxserve_engine::{EventStream, SubmitError};
use tokio::time::{Instant, timeout_at};
use tokio_stream::{StreamExt, StreamMap};

use super::choice::{Choice, ChoiceUsage, Step};
use crate::error::{ApiError, from_submit};
use crate::record::{Accepted, Record};
use crate::state::ServerState;

/// What to submit: every prompt `n` times.
pub(crate) struct Job {
    pub(crate) prompts: Vec<Arc<[TokenId]>>,
    /// Choices of each prompt.
    pub(crate) n: usize,
    pub(crate) sampling: SamplingParams,
    pub(crate) rules: StopRules,
    /// Most tokens to generate for each prompt.
    pub(crate) max_tokens: Vec<usize>,
    /// What answers may be.
    pub(crate) guide: Option<Guide>,
    /// What keeps the prefix apart from others'.
    pub(crate) salt: Option<Arc<str>>,
    /// Field of the request that holds the prompt, for errors.
    pub(crate) prompt_param: &'static str,
}

impl Job {
    /// Sequences in the order of choice indices: all choices of a prompt, then the next prompt. A seed fixes each
    /// choice on its own: choice `i` of a prompt draws from `seed + i`.
    fn requests(&self, id: RequestId) -> Vec<GenerateRequest> {
        let each = self.prompts.iter().zip(&self.max_tokens);
        each.flat_map(|(prompt, &max_tokens)| {
            (0..self.n as u64).map(move |i| {
                let mut sampling = self.sampling.clone();
                sampling.seed = sampling.seed.map(|seed| seed.wrapping_add(i));
                let prompt = Arc::clone(prompt);
                GenerateRequest {
                    id,
                    prompt,
                    sampling,
                    stop: self.rules.clone(),
                    max_tokens,
                    guide: self.guide.clone(),
                    salt: self.salt.clone(),
                }
            })
        })
        .collect()
    }
}

/// A running request. Dropping it cancels what still runs.
pub(crate) struct Generation {
    streams: StreamMap<usize, EventStream>,
    choices: Vec<Choice>,
    record: Record,
    n: usize,
    prompt_tokens: usize,
    /// When it has to be over, and what that leaves it.
    deadline: Instant,
    limit: Duration,
}

impl Generation {
    /// Submits all choices or none. `choice` makes the reader of one.
    ///
    /// # Errors
    /// What the engine refused, as the client should see it.
    pub(crate) fn start(
        state: &ServerState,
        job: &Job,
        accepted: Accepted,
        mut choice: impl FnMut() -> Choice,
    ) -> Result<Self, ApiError> {
        let streams = state.engine().submit_all(job.requests(accepted.id)).map_err(|error| {
            if let SubmitError::QueueFull { unit, .. } = &error {
                state.metrics().rejected(unit);
            }
            // Of one choice a prompt there are too many prompts.
            let many = if job.n == 1 { job.prompt_param } else { "n" };
            from_submit(error, job.prompt_param, many)
        })?;
        let choices = streams.iter().map(|_| choice()).collect();
        let prompt_tokens = accepted.prompt_tokens;
        let record = Record::new(state.clone(), accepted);
        let streams = streams.into_iter().enumerate().collect();
        let limit = state.config().limits.request_timeout;
        let deadline = Instant::now() + limit;
        Ok(Self { streams, choices, record, n: job.n, prompt_tokens, deadline, limit })
    }

    /// The next step of any choice, or `None` when all have ended.
    ///
    /// # Errors
    /// One choice failed, and with it the request; nothing comes after.
    pub(crate) async fn next(&mut self) -> Option<Result<(usize, Step), ApiError>> {
        loop {
            let Ok(next) = timeout_at(self.deadline, self.streams.next()).await else {
                let error = ApiError::answer_timeout(self.limit);
                self.streams.clear();
                self.record.failed(&error.message);
                return Some(Err(error));
            };
            let (index, event) = next?;
            match self.take(index, event) {
                Ok(None) => {}
                Ok(Some(step)) => {
                    if let Some(end) = &step.end {
                        self.streams.remove(&index);
                        self.record.ended(end);
                    }
                    return Some(Ok((index, step)));
                }
                Err(error) => {
                    self.streams.clear();
                    self.record.failed(&error.message);
                    return Some(Err(error));
                }
            }
        }
    }

    fn take(&mut self, index: usize, event: Event) -> Result<Option<Step>, ApiError> {
        let Some(choice) = self.choices.get_mut(index) else { return Ok(None) };
        match event {
            Event::Admitted => {
                self.record.admitted();
                Ok(None)
            }
            Event::Token(token) => {
                self.record.token(index);
                Ok(Some(choice.token(token)))
            }
            Event::Finished { reason, usage } => {
                if let FinishReason::Fault(message) = &reason {
                    tracing::error!(message, "the engine failed");
                }
                choice.finish(reason, usage).map(Some)
            }
        }
    }

    /// The id that call `call` of a choice has in every answer that tells of it.
    pub(crate) fn call_id(&self, choice: usize, call: usize) -> &str {
        self.choices.get(choice).map_or("", |choice| choice.call_id(call))
    }

    /// Prompt tokens, each prompt counted once.
    pub(crate) fn prompt_tokens(&self) -> usize {
        self.prompt_tokens
    }

    /// Counts so far. The prefix that a prompt found cached is counted once, as the prompt is.
    pub(crate) fn total(&self) -> ChoiceUsage {
        let mut total = ChoiceUsage::default();
        for (index, choice) in self.choices.iter().enumerate() {
            let usage = choice.usage();
            total.generated += usage.generated;
            total.reasoning += usage.reasoning;
            if index % self.n == 0 {
                total.cached += usage.cached;
            }
        }
        total
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.record.usage(self.total());
    }
}
