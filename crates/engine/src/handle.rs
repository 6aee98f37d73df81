//! The engine as the rest of the server sees it.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use ctxserve_core::{Event, FinishReason, GenerateRequest, Usage};
use tokio::sync::oneshot;

use crate::driver::Driver;
use crate::pages::KvPools;
use crate::scheduler::{Limits, Scheduler};
use crate::shared::{EngineState, Shared, Snapshot, Submission};
use crate::sizing::{self, KvReport};
use crate::{EngineConfig, EngineError, EventStream, Runner, SubmitError};

/// Starts engines.
#[derive(Debug)]
pub struct Engine;

/// Static facts of a running engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineInfo {
    /// Width of the logits; every token id is below it.
    pub vocab_size: usize,
    /// Longest prompt plus answer, tokens.
    pub max_model_len: usize,
    /// Most positions the model supports.
    pub max_context: usize,
    /// Most rows of one step.
    pub max_batched_tokens: usize,
    /// Most sequences in flight, running and waiting.
    pub max_in_flight: usize,
    /// Most prompt tokens that wait.
    pub max_queued_tokens: usize,
    /// The runner's line for logs.
    pub description: String,
    /// The KV cache as planned.
    pub kv: KvReport,
}

impl Engine {
    /// Sizes and allocates the KV cache and starts the engine thread.
    ///
    /// # Errors
    /// Limits that cannot be met, with the numbers; a device out of memory; no thread.
    pub fn start(mut runner: Box<dyn Runner>, config: EngineConfig) -> Result<EngineHandle, EngineError> {
        let model = runner.info().clone();
        let sizing = sizing::size(&model.kv, model.max_context, &config)?;
        runner.allocate(&sizing.plan)?;
        let max_num_seqs = config.max_num_seqs.min(config.max_batched_tokens);
        let info = EngineInfo {
            vocab_size: model.vocab_size,
            max_model_len: sizing.max_model_len,
            max_context: model.max_context,
            max_batched_tokens: config.max_batched_tokens,
            max_in_flight: max_num_seqs.saturating_add(config.max_queued_requests),
            max_queued_tokens: config.max_queued_tokens,
            description: model.description,
            kv: KvReport::new(&sizing, max_num_seqs),
        };
        let limits =
            Limits { max_num_seqs, max_batched_tokens: config.max_batched_tokens, vocab: model.vocab_size };
        let scheduler = Scheduler::new(limits, KvPools::new(&sizing.plan, config.prefix_caching));
        let shared = Arc::new(Shared::new(info));
        let driver = Driver::new(runner, scheduler, Arc::clone(&shared));
        thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || driver.main())
            .map_err(|error| EngineError::Thread(error.to_string()))?;
        Ok(EngineHandle { owner: Arc::new(Owner { shared }) })
    }
}

/// Dropped with the last handle: an engine that nobody can reach finishes what it has and stops.
#[derive(Debug)]
struct Owner {
    shared: Arc<Shared>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.post(|inbox| inbox.draining = true);
    }
}

/// A running engine. Cheap to clone; usable from any thread, async or not. The engine drains when the last one goes.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    owner: Arc<Owner>,
}

impl EngineHandle {
    fn shared(&self) -> &Shared {
        &self.owner.shared
    }

    /// Submits one sequence.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing was queued.
    pub fn submit(&self, request: GenerateRequest) -> Result<EventStream, SubmitError> {
        self.submit_all(vec![request])?.pop().ok_or(SubmitError::Empty)
    }

    /// Submits several sequences, all or none. Each counts as one place in the queue.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing was queued.
    pub fn submit_all(&self, requests: Vec<GenerateRequest>) -> Result<Vec<EventStream>, SubmitError> {
        let shared = self.shared();
        requests.iter().try_for_each(|request| admissible(&shared.info, request))?;
        let tokens = requests.iter().map(|request| request.prompt.len()).sum();
        shared.post(|inbox| {
            match &inbox.ended {
                Some(Err(fault)) => return Err(SubmitError::Faulted(fault.clone())),
                Some(Ok(())) => return Err(SubmitError::Draining),
                None if inbox.draining => return Err(SubmitError::Draining),
                None => has_room(shared, requests.len(), tokens)?,
            }
            let accept = |request: GenerateRequest| {
                let (events, stream) = EventStream::channel();
                let prompt = request.prompt.len();
                let limit = request.max_tokens.min(shared.info.max_model_len.saturating_sub(prompt));
                if limit == 0 {
                    let usage = Usage { prompt, ..Usage::default() };
                    let _ = events.send(Event::Finished { reason: FinishReason::Length, usage });
                    return stream;
                }
                let (key, ticket) = (inbox.next_key, shared.occupancy.enter(prompt));
                inbox.next_key += 1;
                inbox.arrivals.push(Submission { key, request, limit, events, ticket });
                stream
            };
            Ok(requests.into_iter().map(accept).collect())
        })
    }

    /// Static facts.
    pub fn info(&self) -> &EngineInfo {
        &self.shared().info
    }

    /// The engine at this moment.
    pub fn snapshot(&self) -> Snapshot {
        self.shared().snapshot()
    }

    /// Refuses new sequences and stops once those in flight have finished.
    pub fn drain(&self) {
        self.shared().post(|inbox| inbox.draining = true);
    }

    /// Ends every sequence in flight with [`FinishReason::Abort`] before the next step.
    pub fn abort_all(&self) {
        self.shared().post(|inbox| inbox.abort = true);
    }

    /// Forgets every prefix that is kept for later prompts, before the next step. Returns whether that was done: not if
    /// the engine has ended.
    pub async fn reset_prefixes(&self) -> bool {
        let (done, told) = oneshot::channel();
        let sent = self.shared().post(|inbox| {
            let runs = inbox.ended.is_none();
            inbox.resets.extend(Some(done).filter(|_| runs));
            runs
        });
        sent && told.await.is_ok()
    }

    /// Waits for the engine thread's end, by draining or by a fault, and tells which.
    pub async fn stopped(&self) -> EngineState {
        self.shared().wait_ended().await;
        self.shared().state()
    }
}

/// Checks what later code relies on: a prompt, room for an answer, ids that have rows.
fn admissible(info: &EngineInfo, request: &GenerateRequest) -> Result<(), SubmitError> {
    let (prompt, max, vocab) = (request.prompt.len(), info.max_model_len, info.vocab_size);
    if prompt == 0 {
        return Err(SubmitError::Empty);
    }
    if prompt >= max {
        return Err(SubmitError::TooLong { prompt, max });
    }
    let biased = request.sampling.logit_bias.iter().map(|(id, _)| id);
    match request.prompt.iter().chain(biased).find(|&&id| id as usize >= vocab) {
        Some(&id) => Err(SubmitError::TokenOutOfRange { id, vocab }),
        None => Ok(()),
    }
}

/// Checks the caps. Runs under the inbox's lock, so that no two submissions share a place.
fn has_room(shared: &Shared, count: usize, tokens: usize) -> Result<(), SubmitError> {
    let (info, occupancy) = (&shared.info, &shared.occupancy);
    let limit = info.max_in_flight;
    if count > limit {
        return Err(SubmitError::TooMany { count, limit });
    }
    let full = |queued, limit, unit| {
        let wait = shared.published().finish_interval * count as f64;
        let retry_after = Duration::from_secs(wait.ceil().clamp(1.0, 60.0) as u64);
        Err(SubmitError::QueueFull { retry_after, queued, limit, unit })
    };
    let (in_flight, queued_tokens) = (occupancy.sequences(), occupancy.queued_tokens());
    if in_flight.saturating_add(count) > limit {
        return full(in_flight, limit, "sequences");
    }
    if queued_tokens > 0 && queued_tokens.saturating_add(tokens) > info.max_queued_tokens {
        return full(queued_tokens, info.max_queued_tokens, "prompt tokens");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
