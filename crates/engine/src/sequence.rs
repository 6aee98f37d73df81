//! One sequence from submission to its end.

use std::sync::Arc;

use ctxserve_backend::{SampleError, SampleRow, Sampled, SequenceSlice};
use ctxserve_core::{
    Allowed, ConstraintError, Event, FinishReason, RequestId, SamplingParams, StopCause, StopRules,
    TokenEvent, TokenId, Usage,
};
use tokio::sync::mpsc::UnboundedSender;

use crate::guides::{Guided, Question};
use crate::pages::{History, KvLease, Match, Salt};
use crate::queue::Ticket;
use crate::shared::Submission;

/// State of one sequence. Dropping it frees its pages and its place in the queue.
#[derive(Debug)]
pub(crate) struct Sequence {
    key: u64,
    id: RequestId,
    prompt: Arc<[TokenId]>,
    generated: Arc<Vec<TokenId>>,
    /// Tokens after those that steps in flight sample.
    in_flight: usize,
    /// Number of the step that samples the last of them, and its sampling row there.
    sampled_by: (u64, usize),
    /// Positions whose keys and values are in the cache once every launched step has run: `0..computed`.
    computed: usize,
    kv: KvLease,
    salt: Salt,
    /// Prompt tokens that were computed for others before it began.
    cached: usize,
    sampling: Arc<SamplingParams>,
    seed: u64,
    stop: StopRules,
    /// Ids that may not be sampled before `min_tokens`.
    banned: Arc<[TokenId]>,
    /// What the next token may be.
    guided: Guided,
    /// Most tokens to generate.
    limit: usize,
    /// Why it ended, once it has.
    end: Option<FinishReason>,
    /// Whether its owner knows that it left the queue; true again after preemption.
    begun: bool,
    events: UnboundedSender<Event>,
    ticket: Ticket,
}

impl Sequence {
    /// A waiting sequence. `seed` is used where the request names none; `vocab` is the width of the logits.
    pub(crate) fn new(submission: Submission, kv: KvLease, seed: u64, vocab: usize) -> Self {
        let Submission { key, request, limit, events, ticket } = submission;
        let stop = request.stop;
        let banned = if request.sampling.min_tokens > 0 {
            stop.all().filter(|&id| (id as usize) < vocab).collect()
        } else {
            Arc::default()
        };
        Self {
            key,
            id: request.id,
            prompt: request.prompt,
            generated: Arc::default(),
            in_flight: 0,
            sampled_by: (0, 0),
            computed: 0,
            kv,
            salt: request.salt,
            cached: 0,
            seed: request.sampling.seed.unwrap_or(seed),
            sampling: Arc::new(request.sampling),
            stop,
            banned,
            guided: Guided::new(request.guide),
            limit,
            end: None,
            begun: false,
            events,
            ticket,
        }
    }

    /// Its number in the order of submission.
    pub(crate) fn key(&self) -> u64 {
        self.key
    }

    /// The server's name for it.
    pub(crate) fn id(&self) -> RequestId {
        self.id
    }

    /// Tokens of prompt and answer, those in flight included.
    pub(crate) fn len(&self) -> usize {
        self.prompt.len() + self.generated.len() + self.in_flight
    }

    /// Tokens to compute before the next one can be sampled: 1 in decode, more in prefill.
    pub(crate) fn remaining(&self) -> usize {
        self.len() - self.computed
    }

    /// Whether its tokens in flight are its last, whatever they are.
    pub(crate) fn is_ending(&self) -> bool {
        self.in_flight > 0 && self.generated.len() + self.in_flight >= self.limit
    }

    /// Whether its next row cannot be launched before a token in flight is known: penalties read it, or step `last`,
    /// the one launched last, does not sample it and so cannot feed it.
    pub(crate) fn must_wait(&self, last: u64) -> bool {
        self.in_flight > 0 && (self.sampling.has_penalties() || self.sampled_by.0 != last)
    }

    /// Whether it takes no part in steps for now: a constraint has to know the token in flight before it can say what
    /// comes next, or is about to say it.
    pub(crate) fn is_held(&self) -> bool {
        self.guided.is_busy() || (self.in_flight > 0 && self.guided.is_bound())
    }

    /// Whether it has left the queue before.
    pub(crate) fn has_begun(&self) -> bool {
        self.begun
    }

    /// Tokens in flight.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Its pages.
    pub(crate) fn kv(&self) -> &KvLease {
        &self.kv
    }

    /// Takes pages for `rows` more positions: all or none.
    pub(crate) fn grow(&mut self, rows: usize) -> bool {
        self.kv.grow(self.computed + rows)
    }

    /// Whether its owner has dropped the stream.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    /// Leaves the queue. Returns whether that is the first time, which it is not after a preemption.
    pub(crate) fn begin(&mut self) -> bool {
        if std::mem::replace(&mut self.begun, true) {
            return false;
        }
        self.cached = self.computed;
        self.ticket.leave_queue();
        self.send(Event::Admitted);
        true
    }

    /// Its tokens as far as they are known.
    pub(crate) fn history(&self) -> History<'_> {
        History { prompt: &self.prompt, generated: &self.generated }
    }

    /// What keeps its prefix apart from others'.
    pub(crate) fn salt(&self) -> &Salt {
        &self.salt
    }

    /// Positions that are computed.
    pub(crate) fn computed(&self) -> usize {
        self.computed
    }

    /// Looks up how much of a waiting sequence is computed already. Its last token never counts: there has to be a row
    /// to sample from.
    pub(crate) fn seek(&mut self) -> Match {
        let history = History { prompt: &self.prompt, generated: &self.generated };
        let most = self.most_shared();
        self.kv.seek(&self.salt, &history, most)
    }

    /// Pages that it may have from others at most.
    pub(crate) fn most_shared(&self) -> usize {
        self.len().saturating_sub(1) / self.kv.page_size()
    }

    /// Takes what the last [`Sequence::seek`] found, which nothing has changed since.
    pub(crate) fn attach(&mut self) {
        self.computed = self.kv.attach(&self.salt);
        self.kv.keep(self.prompt.len() / self.kv.page_size());
    }

    /// Someone else begins with its first `pages` pages and goes on differently.
    pub(crate) fn keep(&mut self, pages: usize) {
        self.kv.keep(pages);
    }

    /// Undoes [`Sequence::attach`].
    pub(crate) fn detach(&mut self) {
        self.kv.clear();
        self.computed = 0;
    }

    /// Gives all pages back; the tokens stay, to be computed again where nobody has kept them. One that is in flight
    /// stays too: the step that samples it runs before any that could write to these pages, so what arrives is sound.
    pub(crate) fn give_up_pages(&mut self) {
        let history = History { prompt: &self.prompt, generated: &self.generated };
        self.kv.retire(&history, self.computed);
        self.computed = 0;
    }

    /// Appends its next `rows` input ids to `tokens` and describes them. Where a step in flight samples the input,
    /// there is one row, fed by that step.
    pub(crate) fn slice(&self, rows: usize, tokens: &mut Vec<TokenId>) -> SequenceSlice {
        let first = tokens.len();
        let feed = (self.in_flight > 0).then_some(self.sampled_by.1);
        if feed.is_some() {
            tokens.push(0);
        } else {
            let known = self.prompt.iter().chain(self.generated.iter());
            tokens.extend(known.skip(self.computed).take(rows));
        }
        SequenceSlice {
            key: self.key,
            rows: first..tokens.len(),
            start: self.computed,
            feed,
            tables: Arc::clone(self.kv.tables()),
            sample: (rows == self.remaining()).then(|| self.sample_row()),
        }
    }

    fn sample_row(&self) -> SampleRow {
        let history = self.sampling.has_penalties();
        let stops = if self.may_stop(self.drawn()) { Arc::default() } else { Arc::clone(&self.banned) };
        let (banned, mask) = match self.guided.allowed() {
            Allowed::Any => (stops, None),
            Allowed::Except(ids) if stops.is_empty() => (Arc::clone(ids), None),
            Allowed::Except(ids) => (ids.iter().chain(stops.iter()).copied().collect(), None),
            // Where an end is all that may come, it comes, however early.
            Allowed::Only(mask) if mask.ids().all(|id| stops.contains(&id)) => {
                (Arc::default(), Some(Arc::clone(mask)))
            }
            Allowed::Only(mask) => (stops, Some(Arc::clone(mask))),
        };
        SampleRow {
            params: Arc::clone(&self.sampling),
            seed: self.seed,
            step: self.drawn() as u64,
            banned,
            mask,
            prompt: if history { Arc::clone(&self.prompt) } else { Arc::default() },
            generated: if history { Arc::clone(&self.generated) } else { Arc::default() },
        }
    }

    /// Tokens of the answer, those in flight included.
    fn drawn(&self) -> usize {
        self.generated.len() + self.in_flight
    }

    /// Whether the token after `drawn` others may be a stop id.
    fn may_stop(&self, drawn: usize) -> bool {
        drawn >= self.sampling.min_tokens
    }

    /// Step `step` is launched with `rows` of its rows, the last of which is sampling row `sampling` if it is sampled.
    /// Pages that no later query sees go back at once, although the step still reads them: whoever takes them writes in
    /// a later step, and steps run in the order they are launched.
    pub(crate) fn launched(&mut self, rows: usize, step: u64, sampling: usize) -> bool {
        let samples = rows == self.remaining();
        self.computed += rows;
        if samples {
            self.in_flight += 1;
            self.sampled_by = (step, sampling);
        }
        let history = History { prompt: &self.prompt, generated: &self.generated };
        self.kv.publish(&history, self.computed);
        self.kv.slide(self.computed);
        samples
    }

    /// Takes the outcome of its oldest row in flight and tells its owner. Returns whether a token was sampled, and the
    /// question of what may follow it, where that is one.
    pub(crate) fn accept(
        &mut self,
        outcome: Result<Sampled, SampleError>,
        vocab: usize,
    ) -> (bool, Option<Question>) {
        self.in_flight = self.in_flight.saturating_sub(1);
        let Sampled { id, logprobs } = match outcome {
            Ok(sampled) if (sampled.id as usize) < vocab => sampled,
            Ok(sampled) => {
                let what = format!("the model sampled token {} of a vocabulary of {vocab}", sampled.id);
                self.end = Some(FinishReason::Error(what));
                return (false, None);
            }
            Err(SampleError::ScriptEnded) => {
                self.end = Some(FinishReason::Length);
                return (false, None);
            }
            Err(error @ (SampleError::NonFinite | SampleError::NothingLeft)) => {
                self.end = Some(FinishReason::Error(error.to_string()));
                return (false, None);
            }
        };
        self.end = self.cause(id).map(FinishReason::Stop);
        Arc::make_mut(&mut self.generated).push(id);
        if self.end.is_none() && self.generated.len() >= self.limit {
            self.end = Some(FinishReason::Length);
        }
        self.send(Event::Token(TokenEvent { id, logprobs }));
        if self.end.is_some() {
            return (true, None);
        }
        let question = self.guided.accept(self.key, id).unwrap_or_else(|error| {
            self.fail(&error);
            None
        });
        (true, question)
    }

    /// Takes what its constraint says, or ends with it.
    pub(crate) fn guide(&mut self, guided: Result<Guided, ConstraintError>) {
        match guided {
            Ok(guided) => self.guided = guided,
            Err(error) => self.fail(&error),
        }
    }

    fn fail(&mut self, error: &ConstraintError) {
        self.end = Some(FinishReason::Error(error.to_string()));
    }

    /// Why sampling `id` next ends the sequence, if it does. An id in both lists counts as the model's own end.
    fn cause(&self, id: TokenId) -> Option<StopCause> {
        if !self.may_stop(self.generated.len()) || !self.stop.stops_on(id) {
            return None;
        }
        let is_eos = !self.stop.ignore_eos && self.stop.eos.contains(&id);
        Some(if is_eos { StopCause::Eos(id) } else { StopCause::TokenId(id) })
    }

    /// Whether it has ended by itself.
    pub(crate) fn has_ended(&self) -> bool {
        self.end.is_some()
    }

    /// Frees everything; its own reason to end wins over `otherwise`. The owner is told by [`Ending::send`].
    pub(crate) fn finish(mut self, otherwise: &FinishReason) -> Ending {
        self.give_up_pages();
        let usage = Usage { prompt: self.prompt.len(), cached: self.cached, generated: self.generated.len() };
        let reason = self.end.unwrap_or_else(|| otherwise.clone());
        Ending { events: self.events, event: Event::Finished { reason, usage } }
    }

    /// A reader that is gone is found by [`Sequence::is_cancelled`].
    fn send(&self, event: Event) {
        let _ = self.events.send(event);
    }
}

/// The last event of a sequence whose pages are free already.
#[derive(Debug)]
#[must_use = "the owner waits for it"]
pub(crate) struct Ending {
    events: UnboundedSender<Event>,
    event: Event,
}

impl Ending {
    /// Tells the owner.
    pub(crate) fn send(self) {
        let _ = self.events.send(self.event);
    }
}
