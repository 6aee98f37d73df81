//! Who computes what in the next step.
//!
//! Sequences are served in the order of submission: every running sequence is older than every waiting one, and a
//! running one gives way only to older ones. The oldest therefore always advances, so everything finishes.

use std::collections::VecDeque;

use ctxserve_backend::{Batch, SampleError, Sampled};
use ctxserve_core::FinishReason;

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

/// One step's work; valid until it is committed.
#[derive(Debug, Default)]
pub(crate) struct Step {
    slices: Vec<Slice>,
}

impl Step {
    /// Whether there is nothing to do.
    pub(crate) fn is_empty(&self) -> bool {
        self.slices.is_empty()
    }
}

/// All sequences of an engine.
#[derive(Debug)]
pub(crate) struct Scheduler {
    limits: Limits,
    pools: KvPools,
    /// Oldest first.
    waiting: VecDeque<Sequence>,
    /// Oldest first; all older than `waiting`.
    running: Vec<Sequence>,
    counters: Counters,
}

impl Scheduler {
    /// One without sequences. `pools` must hold any single sequence.
    pub(crate) fn new(mut limits: Limits, pools: KvPools) -> Self {
        limits.max_num_seqs = limits.max_num_seqs.min(limits.max_batched_tokens);
        let (waiting, running, counters) = (VecDeque::new(), Vec::new(), Counters::default());
        Self { limits, pools, waiting, running, counters }
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
        self.running.len()
    }

    /// Whether there is no sequence at all.
    pub(crate) fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Queues a sequence, younger than all before it.
    pub(crate) fn push(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
    }

    /// Drops the sequences whose owners are gone; their pages are free at once.
    pub(crate) fn drop_cancelled(&mut self) {
        let before = self.running.len() + self.waiting.len();
        self.running.retain(|sequence| !sequence.is_cancelled());
        self.waiting.retain(|sequence| !sequence.is_cancelled());
        self.counters.aborted += (before - self.running.len() - self.waiting.len()) as u64;
    }

    /// Ends every sequence.
    pub(crate) fn end_all(&mut self, reason: &FinishReason) -> Vec<Ending> {
        let all = self.running.drain(..).chain(self.waiting.drain(..));
        let endings: Vec<_> = all.map(|sequence| sequence.finish(reason)).collect();
        self.counters.aborted += endings.len() as u64;
        endings
    }

    /// Checks that every page belongs to one sequence or to the free list.
    ///
    /// # Errors
    /// The first page of which that is not so.
    pub(crate) fn check(&self) -> Result<(), PageError> {
        self.pools.check(self.running.iter().chain(&self.waiting).map(Sequence::kv))
    }

    /// Plans a step: a row for every sequence in decode, then prompt chunks, oldest first, in what the budget
    /// leaves. Empty only when there is no sequence.
    pub(crate) fn schedule(&mut self) -> Step {
        let decoding = self.running.iter().filter(|sequence| sequence.remaining() == 1).count();
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
            let Some(sequence) = self.waiting.front() else { return };
            let rows = sequence.remaining().min(*budget);
            if !self.has_room(sequence, rows) {
                return;
            }
            let Some(mut sequence) = self.waiting.pop_front() else { return };
            if !sequence.grow(rows) {
                return self.waiting.push_front(sequence);
            }
            self.counters.prompt_tokens += sequence.begin() as u64;
            step.slices.push(Slice { index: self.running.len(), rows });
            self.running.push(sequence);
            *budget -= rows;
        }
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
            free >= owed(group).saturating_add(spec.pages_for(group, sequence.len(), rows))
        };
        self.pools.free().into_iter().enumerate().all(fits)
    }

    /// Sends the youngest running sequence back to the head of the queue, without its pages.
    fn preempt_youngest(&mut self) {
        let Some(mut sequence) = self.running.pop() else { return };
        tracing::debug!(id = %sequence.id(), key = sequence.key(), tokens = sequence.len(), "preempted");
        sequence.preempt();
        self.waiting.push_front(sequence);
        self.counters.preemptions += 1;
    }

    /// The step as a runner takes it.
    pub(crate) fn batch(&self, step: &Step) -> Batch {
        let mut batch = Batch::default();
        for slice in &step.slices {
            let Some(sequence) = self.running.get(slice.index) else { continue };
            batch.sequences.push(sequence.slice(slice.rows, &mut batch.tokens));
        }
        batch
    }

    /// Takes a step's outcomes, one per sampling row, and returns what ended, pages already free.
    pub(crate) fn commit(&mut self, step: Step, outcomes: Vec<Result<Sampled, SampleError>>) -> Vec<Ending> {
        let mut outcomes = outcomes.into_iter();
        for slice in step.slices {
            let Some(sequence) = self.running.get_mut(slice.index) else { continue };
            sequence.advance(slice.rows);
            if sequence.remaining() == 0
                && let Some(outcome) = outcomes.next()
            {
                self.counters.generation_tokens += u64::from(sequence.accept(outcome, self.limits.vocab));
            }
        }
        self.counters.steps += 1;
        let ended = self.running.extract_if(.., |sequence| sequence.has_ended());
        let endings: Vec<_> = ended.map(|sequence| sequence.finish(&FinishReason::Abort)).collect();
        self.counters.finished += endings.len() as u64;
        endings
    }
}

#[cfg(test)]
mod tests;
