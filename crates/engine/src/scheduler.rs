//! Who computes what in the next step.
//!
//! Sequences are served in the order of submission: every running sequence is older than every waiting one, and a
//! running one gives way only to older ones. The oldest therefore always advances, so everything finishes.

use std::collections::VecDeque;

use ctxserve_backend::{Batch, SampleError, Sampled};
use ctxserve_core::FinishReason;

use crate::guides::{Answer, Question};
use crate::pages::{KvPools, PageError};
use crate::sequence::{Ending, Sequence};
use crate::shared::Counters;

/// Bounds of one step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Most sequences; at most `max_batched_tokens`.
    pub(crate) max_num_seqs: usize,
    /// Most rows.
    pub(crate) max_batched_tokens: usize,
    /// Width of the logits.
    pub(crate) vocab: usize,
}

/// Rows of one running sequence in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slice {
    /// Index among the running sequences.
    index: usize,
    rows: usize,
}

/// One step's work as planned; to be launched before anything else changes.
#[derive(Debug, Default)]
#[must_use = "pages were taken for it"]
pub(crate) struct Step {
    slices: Vec<Slice>,
}

/// A step that is under way.
#[derive(Debug)]
#[must_use = "its outcomes have to be committed"]
pub(crate) struct Launched {
    /// The sequence of each sampling row.
    keys: Vec<u64>,
}

impl Launched {
    /// Sampling rows.
    pub(crate) fn rows(&self) -> usize {
        self.keys.len()
    }
}

impl Step {
    /// Whether there is nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        self.slices.is_empty()
    }
}

/// How often something has ended or given way, and how many sequences run.
type Moment = (u64, usize);

/// All sequences of an engine.
#[derive(Debug)]
pub(crate) struct Scheduler {
    limits: Limits,
    pools: KvPools,
    /// Oldest first.
    waiting: VecDeque<Sequence>,
    /// Oldest first; all older than `waiting`.
    running: Vec<Sequence>,
    /// Whose last token is in flight: they need no row, no page and no place any more.
    ending: Vec<Sequence>,
    /// Steps launched so far.
    launched: u64,
    /// What constraints have yet to be asked.
    questions: Vec<Question>,
    /// The waiting sequence that had no room, and when that was.
    stuck: Option<(u64, Moment)>,
    counters: Counters,
}

impl Scheduler {
    /// One without sequences. `pools` must hold any single sequence.
    pub(crate) fn new(mut limits: Limits, pools: KvPools) -> Self {
        limits.max_num_seqs = limits.max_num_seqs.min(limits.max_batched_tokens);
        let (waiting, running, ending) = (VecDeque::new(), Vec::new(), Vec::new());
        let (questions, counters) = (Vec::new(), Counters::default());
        Self { limits, pools, waiting, running, ending, launched: 0, questions, stuck: None, counters }
    }

    /// The pools.
    pub(crate) fn pools(&self) -> &KvPools {
        &self.pools
    }

    /// Totals since start.
    pub(crate) fn counters(&self) -> Counters {
        self.counters
    }

    /// Sequences being computed.
    pub(crate) fn running(&self) -> usize {
        self.running.len() + self.ending.len()
    }

    fn all(&self) -> impl Iterator<Item = &Sequence> {
        self.running.iter().chain(&self.ending).chain(&self.waiting)
    }

    /// Whether there is no sequence at all.
    pub(crate) fn is_idle(&self) -> bool {
        self.all().next().is_none()
    }

    /// Queues a sequence, younger than all before it.
    pub(crate) fn push(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
    }

    /// Drops the sequences whose owners are gone. Their pages are free at once, although a step in flight may still
    /// write to them: steps run in the order they are launched, and who takes the pages is launched later.
    pub(crate) fn drop_cancelled(&mut self) {
        let running = self.running.extract_if(.., |sequence| sequence.is_cancelled());
        let mut gone: Vec<_> = running.chain(self.ending.extract_if(.., |s| s.is_cancelled())).collect();
        // What is computed of them may be of use to others.
        gone.iter_mut().for_each(Sequence::give_up_pages);
        let before = self.waiting.len();
        self.waiting.retain(|sequence| !sequence.is_cancelled());
        self.counters.aborted += (gone.len() + before - self.waiting.len()) as u64;
    }

    /// Ends every sequence. What steps in flight sample for them is not waited for.
    pub(crate) fn end_all(&mut self, reason: &FinishReason) -> Vec<Ending> {
        let all = self.running.drain(..).chain(self.ending.drain(..)).chain(self.waiting.drain(..));
        let endings: Vec<_> = all.map(|sequence| sequence.finish(reason)).collect();
        self.counters.aborted += endings.len() as u64;
        endings
    }

    /// Checks that every page belongs to one sequence or to the free list.
    ///
    /// # Errors
    /// The first page of which that is not so.
    pub(crate) fn check(&self) -> Result<(), PageError> {
        self.pools.check(self.all().map(Sequence::kv))
    }

    /// Plans a step: a row for every sequence in decode, then prompt chunks, oldest first, in what the budget
    /// leaves. A sequence whose next token is in flight gets a row that is fed with it, as if it would not stop; one
    /// whose constraint has to know that token first is left out.
    /// Empty only where a step in flight has to be committed first, a constraint to answer, or there is no sequence.
    pub(crate) fn schedule(&mut self) -> Step {
        // A row left out would be computed a whole step late; waiting costs the few microseconds of a commit.
        let waits = |sequence: &Sequence| !sequence.is_held() && sequence.must_wait(self.launched);
        if self.running.iter().any(waits) {
            return Step::default();
        }
        let decoding = self.running.iter().filter(|s| s.remaining() == 1 && !s.is_held()).count();
        let mut budget = self.limits.max_batched_tokens.saturating_sub(decoding);
        let mut step = Step::default();
        self.advance_running(&mut step, &mut budget);
        self.admit(&mut step, &mut budget);
        // One-row slices together, so that a backend can run them as one decode batch.
        step.slices.sort_by_key(|slice| slice.rows > 1);
        step
    }

    /// Plans rows of running sequences in order of age. Where pages are short the youngest gives way, which has
    /// no rows in this step yet.
    fn advance_running(&mut self, step: &mut Step, budget: &mut usize) {
        let mut index = 0;
        while let Some(sequence) = self.running.get_mut(index) {
            if sequence.is_held() {
                index += 1;
                continue;
            }
            let prefill = sequence.remaining() > 1;
            let rows = if prefill { sequence.remaining().min(*budget) } else { 1 };
            if rows > 0 && !sequence.grow(rows) {
                self.preempt_youngest();
                continue;
            }
            if rows > 0 {
                step.slices.push(Slice { index, rows });
            }
            if prefill {
                *budget -= rows;
            }
            index += 1;
        }
    }

    /// Starts waiting sequences, first come first served, while rows, places and pages last.
    fn admit(&mut self, step: &mut Step, budget: &mut usize) {
        while *budget > 0 && self.running.len() < self.limits.max_num_seqs {
            // Preempted with its last token still to arrive: its rows cannot be told from here.
            let ready = |sequence: &Sequence| sequence.in_flight() == 0 && !sequence.is_held();
            if !self.waiting.front().is_some_and(ready) || self.is_stuck() || !self.share(step) {
                return;
            }
            let Some(sequence) = self.waiting.front() else { return };
            let rows = sequence.remaining().min(*budget);
            if !self.has_room(sequence, rows) {
                self.stuck = Some((sequence.key(), self.moment()));
                self.waiting.iter_mut().take(1).for_each(Sequence::detach);
                return;
            }
            let Some(mut sequence) = self.waiting.pop_front() else { return };
            if !sequence.grow(rows) {
                sequence.detach();
                return self.waiting.push_front(sequence);
            }
            if sequence.begin() {
                self.counters.prompt_tokens += sequence.history().prompt.len() as u64;
                self.counters.prefixes.count(&sequence, self.pools.caching());
            }
            step.slices.push(Slice { index: self.running.len(), rows });
            self.running.push(sequence);
            *budget -= rows;
        }
    }

    /// Gives the first waiting sequence what others have computed of it. False where the step is about to compute more
    /// of it for another: then it waits for the next one, and need not compute it a second time.
    fn share(&mut self, step: &Step) -> bool {
        let Some(sequence) = self.waiting.front_mut().filter(|_| self.pools.caching()) else { return true };
        let found = sequence.seek();
        let (size, most) = (self.pools.spec().page_size, sequence.most_shared());
        for slice in &step.slices {
            let Some(other) = self.running.get_mut(slice.index).filter(|_| slice.rows > 1) else { continue };
            if other.salt() != sequence.salt() {
                continue;
            }
            let done = other.computed() + slice.rows;
            let pages = (other.history().common(&sequence.history()).min(done) / size).min(most);
            // What is in the tree already will not get better by waiting.
            if pages > found.pages.max(other.kv().published()) {
                other.keep(pages);
                return false;
            }
        }
        sequence.attach();
        true
    }

    /// Since when nothing has given way to a waiting sequence.
    fn moment(&self) -> Moment {
        let Counters { finished, aborted, preemptions, .. } = self.counters;
        (finished + aborted + preemptions, self.running.len())
    }

    /// Whether the first waiting sequence had no room, and there is no more since.
    fn is_stuck(&self) -> bool {
        let first = self.waiting.front().map(|sequence| (sequence.key(), self.moment()));
        self.stuck.is_some() && self.stuck == first
    }

    /// Whether the whole of a waiting sequence fits beside what the running ones still need: the rest of their
    /// prompts and one page more, lest a newcomer be preempted at once.
    fn has_room(&self, sequence: &Sequence, rows: usize) -> bool {
        let spec = self.pools.spec();
        let owed = |group: usize| -> usize {
            let missing = |s: &Sequence| {
                spec.pages_for(group, s.len() + spec.page_size, 1).saturating_sub(s.kv().held(group))
            };
            self.running.iter().map(missing).sum()
        };
        let fits = |(group, free): (usize, usize)| {
            let needed =
                spec.pages_for(group, sequence.len(), rows).saturating_sub(sequence.kv().held(group));
            free >= owed(group).saturating_add(needed)
        };
        self.pools.free().into_iter().enumerate().all(fits)
    }

    /// Sends the youngest running sequence back to the head of the queue, without its pages.
    fn preempt_youngest(&mut self) {
        let Some(mut sequence) = self.running.pop() else { return };
        tracing::debug!(id = %sequence.id(), key = sequence.key(), tokens = sequence.len(), "preempted");
        sequence.give_up_pages();
        self.waiting.push_front(sequence);
        self.counters.preemptions += 1;
    }

    /// Describes the step in `batch`, which is empty, as a runner takes it.
    pub(crate) fn describe(&self, step: &Step, batch: &mut Batch) {
        for slice in &step.slices {
            let Some(sequence) = self.running.get(slice.index) else { continue };
            batch.sequences.push(sequence.slice(slice.rows, &mut batch.tokens));
        }
    }

    /// The runner has taken the step: from here on its positions count as computed, its tokens as in flight. The batch
    /// is cleared by now, lest page tables be copied.
    pub(crate) fn launched(&mut self, step: Step) -> Launched {
        self.launched += 1;
        let mut keys = Vec::with_capacity(step.slices.len());
        for slice in step.slices {
            let Some(sequence) = self.running.get_mut(slice.index) else { continue };
            if sequence.launched(slice.rows, self.launched, keys.len()) {
                keys.push(sequence.key());
            }
        }
        for mut sequence in self.running.extract_if(.., |sequence| sequence.is_ending()) {
            sequence.give_up_pages();
            self.ending.push(sequence);
        }
        Launched { keys }
    }

    /// Takes the outcomes, one per sampling row, of the oldest step in flight, and returns what ended, pages already
    /// free.
    pub(crate) fn commit(
        &mut self,
        step: Launched,
        outcomes: Vec<Result<Sampled, SampleError>>,
    ) -> Vec<Ending> {
        let vocab = self.limits.vocab;
        for (key, outcome) in step.keys.into_iter().zip(outcomes) {
            if matches!(outcome, Err(SampleError::NonFinite)) {
                // Whatever went wrong may be in the pages, and would fail everyone who begins alike.
                self.pools.reset();
            }
            // Who is gone was cancelled, or ended by an earlier step: the row was computed in vain.
            let Some(sequence) = self.find(key) else { continue };
            let (sampled, question) = sequence.accept(outcome, vocab);
            self.counters.generation_tokens += u64::from(sampled);
            self.questions.extend(question);
        }
        self.counters.steps += 1;
        self.take_ended()
    }

    /// What constraints have to be asked since the last call.
    pub(crate) fn take_questions(&mut self) -> Vec<Question> {
        std::mem::take(&mut self.questions)
    }

    /// Takes what a constraint says, and returns the sequence if that ends it.
    pub(crate) fn guide(&mut self, answer: Answer) -> Vec<Ending> {
        // Who is gone was cancelled.
        if let Some(sequence) = self.find(answer.key) {
            sequence.guide(answer.guided);
        }
        self.take_ended()
    }

    /// Whether any sequence is left out of steps for now.
    pub(crate) fn has_held(&self) -> bool {
        self.running.iter().chain(&self.waiting).any(Sequence::is_held)
    }

    fn take_ended(&mut self) -> Vec<Ending> {
        let mut ended: Vec<_> = self.running.extract_if(.., |sequence| sequence.has_ended()).collect();
        ended.extend(self.ending.extract_if(.., |sequence| sequence.has_ended()));
        // Who was preempted with a token in flight is at the head of the queue.
        let begun = |waiting: &VecDeque<Sequence>| {
            waiting.iter().take_while(|s| s.has_begun()).position(Sequence::has_ended)
        };
        while let Some(at) = begun(&self.waiting) {
            ended.extend(self.waiting.remove(at));
        }
        self.counters.finished += ended.len() as u64;
        ended.into_iter().map(|sequence| sequence.finish(&FinishReason::Abort)).collect()
    }

    /// The sequence of this key, if there still is one.
    fn find(&mut self, key: u64) -> Option<&mut Sequence> {
        if let Ok(at) = self.running.binary_search_by_key(&key, Sequence::key) {
            return self.running.get_mut(at);
        }
        if let Ok(at) = self.waiting.binary_search_by_key(&key, Sequence::key) {
            return self.waiting.get_mut(at);
        }
        self.ending.iter_mut().find(|sequence| sequence.key() == key)
    }
}

#[cfg(test)]
mod tests;
