//! One step's work, described once and uploaded once.

use std::ops::Range;
use std::sync::Arc;

use ctxserve_core::{SamplingParams, TokenId, TokenLogprobs, TokenMask};
use thiserror::Error;

use crate::{KvSpec, PageTable};

/// How to pick the token that follows a sequence's last row.
#[derive(Clone, Debug)]
pub struct SampleRow {
    /// The request's parameters.
    pub params: Arc<SamplingParams>,
    /// Seed of the sequence's random stream, resolved: never drawn by the backend.
    pub seed: u64,
    /// Which draw of that stream this is: tokens generated so far, those still in flight included.
    pub step: u64,
    /// Ids that must not be picked (stop ids before `min_tokens`).
    pub banned: Arc<[TokenId]>,
    /// The ids that may be picked, where a constraint says so; all others count as minus infinity.
    pub mask: Option<Arc<TokenMask>>,
    /// Prompt and generated ids, for penalties; empty when the parameters have none.
    pub prompt: Arc<[TokenId]>,
    /// See `prompt`.
    pub generated: Arc<Vec<TokenId>>,
}

impl SampleRow {
    /// The first draw with these parameters, seed 0, nothing banned and no history.
    pub fn new(params: Arc<SamplingParams>) -> Self {
        let (banned, prompt, generated) = (Arc::default(), Arc::default(), Arc::default());
        Self { params, seed: 0, step: 0, banned, mask: None, prompt, generated }
    }
}

/// Consecutive tokens of one sequence within a batch: a decode token, or a prefill chunk.
#[derive(Clone, Debug)]
pub struct SequenceSlice {
    /// Names the sequence for its whole life, so that a runner may keep state for it.
    pub key: u64,
    /// Its rows in [`Batch::tokens`].
    pub rows: Range<usize>,
    /// Position of its first row; positions `0..start` are in the KV cache already, from its own rows or those of
    /// another sequence with the same tokens.
    pub start: usize,
    /// `Some(i)` when the input id is the one that sampling row `i` (in the order of [`Batch::sample_rows`]) of the
    /// step sampled last has picked, or will pick: it is on the device and the host may not know it yet. The slice
    /// has one row then, whose entry in [`Batch::tokens`] is a placeholder, 0.
    pub feed: Option<usize>,
    /// One table per KV group, covering every position that the rows see or write. Several sequences may have a page
    /// that all of them only read; those that a slice writes to are its own. From step to step any page may be
    /// replaced by another of the same content, and a sequence may lose its pages and start over.
    pub tables: Arc<Vec<PageTable>>,
    /// Present when the last row's logits are wanted; absent inside a prompt.
    pub sample: Option<SampleRow>,
}

/// One step's work. Rows of a sequence are consecutive, and slices follow one another without gaps.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Input ids, one a row.
    pub tokens: Vec<TokenId>,
    /// The sequences, in row order.
    pub sequences: Vec<SequenceSlice>,
}

/// A batch that no backend could run: a bug in its maker, caught before it reaches device memory.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("sequence {sequence} of the batch: {what}")]
pub struct BatchError {
    /// Index into [`Batch::sequences`].
    pub sequence: usize,
    /// What is wrong.
    pub what: &'static str,
}

impl Batch {
    /// Rows whose logits are wanted, in the order of [`Batch::sequences`].
    pub fn logit_rows(&self) -> impl Iterator<Item = usize> + '_ {
        self.sequences.iter().filter(|s| s.sample.is_some()).map(|s| s.rows.end - 1)
    }

    /// The sampling rows, in the order of [`Batch::logit_rows`].
    pub fn sample_rows(&self) -> impl Iterator<Item = &SampleRow> {
        self.sequences.iter().filter_map(|s| s.sample.as_ref())
    }

    /// Empties it for the next step; its memory is kept.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.sequences.clear();
    }

    /// Checks what device code relies on: gapless rows, ids inside the vocabulary, one row where a slice is fed,
    /// pages for every position seen or written, page ids inside their pools. Whether a feed names a row of the
    /// step before is for those to check who know that step: see [`Batch::check_feeds`].
    ///
    /// # Errors
    /// The first rule that a sequence breaks.
    pub fn check(&self, spec: &KvSpec, pages: &[usize], vocab: usize) -> Result<(), BatchError> {
        let mut next = 0;
        for (sequence, slice) in self.sequences.iter().enumerate() {
            let fail = |what| Err(BatchError { sequence, what });
            if slice.rows.start != next || slice.rows.is_empty() || slice.rows.end > self.tokens.len() {
                return fail("rows are not gapless");
            }
            next = slice.rows.end;
            if self.tokens[slice.rows.clone()].iter().any(|&id| id as usize >= vocab) {
                return fail("a token id is outside the vocabulary");
            }
            if slice.feed.is_some() && slice.rows.len() != 1 {
                return fail("a fed slice has more than one row");
            }
            if slice.tables.len() != spec.groups.len() || pages.len() != spec.groups.len() {
                return fail("a page table is missing");
            }
            let last = slice.start + slice.rows.len() - 1;
            for (group, table) in slice.tables.iter().enumerate() {
                // The largest, not the first that is too large: that loop runs over vectors.
                if table.pages.iter().max().is_some_and(|&page| page as usize >= pages[group]) {
                    return fail("a page id is outside its pool");
                }
                let first = spec.first_visible(group, slice.start);
                let covers = |position| table.locate(position, spec.page_size).is_some();
                if !covers(first) || !covers(last) {
                    return fail("a position has no page");
                }
            }
        }
        if next != self.tokens.len() {
            return Err(BatchError { sequence: self.sequences.len(), what: "tokens without a sequence" });
        }
        Ok(())
    }

    /// Checks that every feed names one of the `sampled` sampling rows of the step before.
    ///
    /// # Errors
    /// The first that does not.
    pub fn check_feeds(&self, sampled: usize) -> Result<(), BatchError> {
        match self.sequences.iter().position(|slice| slice.feed.is_some_and(|row| row >= sampled)) {
            Some(sequence) => {
                Err(BatchError { sequence, what: "it is fed by a row that the last step did not sample" })
            }
            None => Ok(()),
        }
    }
}

/// The outcome of one sampling row.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The picked id.
    pub id: TokenId,
    /// Present when the parameters asked for it.
    pub logprobs: Option<Box<TokenLogprobs>>,
}

/// Why one row could not be sampled; other rows are unaffected.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SampleError {
    /// A logit is NaN, or all are infinite: garbage is never streamed.
    #[error("the model produced non-finite logits")]
    NonFinite,
    /// A scripted model has said all it has to say; the sequence ends as if cut by length.
    #[error("the script of this sequence has ended")]
    ScriptEnded,
    /// Bans and masks left nothing to pick.
    #[error("every token of the vocabulary is banned")]
    NothingLeft,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{KvDtype, KvGroup};

    fn spec() -> KvSpec {
        let groups = vec![KvGroup { window: None, layers: vec![0], dtype: KvDtype::F32 }];
        KvSpec { page_size: 4, kv_heads: 1, head_dim: 1, groups }
    }

    /// Two sequences of `rows` rows each from position 0 on, the second fed by row `feed`.
    fn batch(rows: usize, feed: usize) -> Batch {
        let slice = |at: usize| SequenceSlice {
            key: at as u64,
            rows: at * rows..(at + 1) * rows,
            start: 0,
            feed: (at == 1).then_some(feed),
            tables: Arc::new(vec![PageTable { first: 0, pages: vec![at as u32] }]),
            sample: Some(SampleRow::new(Arc::default())),
        };
        Batch { tokens: vec![0; 2 * rows], sequences: vec![slice(0), slice(1)] }
    }

    #[test]
    fn a_fed_slice_is_one_row_of_the_step_before() {
        let check = |batch: Batch| batch.check(&spec(), &[2], 8);
        assert_eq!(check(batch(1, 0)), Ok(()));
        let what = "a fed slice has more than one row";
        assert_eq!(check(batch(2, 0)), Err(BatchError { sequence: 1, what }));
        assert_eq!(batch(1, 2).check_feeds(3), Ok(()));
        assert_eq!(batch(1, 3).check_feeds(3).map_err(|error| error.sequence), Err(1));
    }

    #[test]
    fn a_cleared_batch_is_an_empty_one() {
        let mut batch = batch(1, 0);
        batch.clear();
        assert!(batch.tokens.is_empty() && batch.sequences.is_empty());
    }
}
