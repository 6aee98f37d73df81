//! Sequences, their pages and the batches they are cut into.

use std::sync::Arc;

use ctxserve_core::{SamplingParams, TokenId};

use super::random::Random;
use crate::{Batch, KvPlan, PageTable, SampleRow, SequenceSlice};

/// A sequence on its way through steps.
#[derive(Clone, Debug)]
pub(super) struct Sequence {
    pub(super) tokens: Vec<TokenId>,
    pub(super) done: usize,
    tables: Vec<PageTable>,
}

/// Free pages of every group, in random order: neighbours in a sequence are not neighbours in memory.
#[derive(Debug)]
pub(super) struct Pages {
    free: Vec<Vec<usize>>,
}

impl Pages {
    pub(super) fn new(plan: &KvPlan, random: &mut Random) -> Self {
        Self { free: plan.pages.iter().map(|&count| random.order(count)).collect() }
    }
}

impl Sequence {
    pub(super) fn new(tokens: Vec<TokenId>, groups: usize) -> Self {
        Self { tokens, done: 0, tables: vec![PageTable::default(); groups] }
    }

    /// One that goes on from the first `pages` pages of this one, which has computed them and still holds them.
    pub(super) fn followed_by(&self, tokens: Vec<TokenId>, pages: usize, page_size: usize) -> Self {
        let mut tables = self.tables.clone();
        tables.iter_mut().for_each(|table| table.pages.truncate(pages - table.first));
        Self { tokens, done: pages * page_size, tables }
    }

    /// Returns pages that have left the window and takes pages for `count` more positions.
    fn advance(&mut self, count: usize, plan: &KvPlan, pages: &mut Pages) {
        let size = plan.spec.page_size;
        for (group, table) in self.tables.iter_mut().enumerate() {
            let keep = plan.spec.first_visible(group, self.done) / size;
            while table.first < keep && !table.pages.is_empty() {
                pages.free[group].insert(0, table.pages.remove(0) as usize);
                table.first += 1;
            }
            while (table.first + table.pages.len()) * size < self.done + count {
                let Some(page) = pages.free[group].pop() else { break };
                table.pages.push(page as u32);
            }
        }
        self.done += count;
    }
}

/// One step: the next `count` tokens of each named sequence. Every slice's last row is sampled greedily.
pub(super) fn step(
    sequences: &mut [Sequence],
    counts: &[(usize, usize)],
    plan: &KvPlan,
    pages: &mut Pages,
) -> Batch {
    let mut batch = Batch::default();
    for &(index, count) in counts {
        let sequence = &mut sequences[index];
        let start = sequence.done;
        sequence.advance(count, plan, pages);
        let rows = batch.tokens.len()..batch.tokens.len() + count;
        batch.tokens.extend_from_slice(&sequence.tokens[start..start + count]);
        let (key, tables) = (index as u64, Arc::new(sequence.tables.clone()));
        let sample = Some(greedy());
        batch.sequences.push(SequenceSlice { key, rows, start, feed: None, tables, sample });
    }
    batch
}

/// A batch of single rows at position 0, to read every row of a residual stream.
pub(super) fn singles(tokens: Vec<TokenId>, groups: usize) -> Batch {
    let tables = Arc::new(vec![PageTable { first: 0, pages: vec![0] }; groups]);
    let sequences = (0..tokens.len()).map(|row| SequenceSlice {
        key: row as u64,
        rows: row..row + 1,
        start: 0,
        feed: None,
        tables: Arc::clone(&tables),
        sample: Some(greedy()),
    });
    Batch { sequences: sequences.collect(), tokens }
}

fn greedy() -> SampleRow {
    SampleRow::new(Arc::new(SamplingParams::greedy()))
}
