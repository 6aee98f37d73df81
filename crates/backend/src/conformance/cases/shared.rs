//! Sequences that read one another's pages.

use ctxserve_core::Encoding;

use super::super::fixture::{Fixture, Shape, Stage};
use super::super::schedule::{Pages, Sequence, step};
use super::{Suite, poison, shape, storage};
use crate::{Backend, DeviceError};

/// Whole pages that are shared, and rows of each sequence that goes on from them.
const SHARED: usize = 2;
const ROWS: [usize; 3] = [1, 5, 20];

impl Suite<'_> {
    /// Sequences that go on from another's pages, with different tokens and all in one batch with it, against the same
    /// alone from their start: what a prefix cache relies on.
    pub(in super::super) fn shared<B: Backend>(
        &mut self,
        make: &impl Fn() -> Result<B, DeviceError>,
    ) -> Result<(), DeviceError> {
        let stage = if self.claims.bitwise { Stage::Layer } else { Stage::Output };
        for kv in self.claims.kv.clone() {
            // Chunks differ, and so may bits where they depend on that.
            let limit = if self.claims.bitwise { 0.0 } else { self.claims.products.max(storage(kv)) };
            for window in [None, Some(12), Some(20)] {
                let shape = Shape { kv, window, dense: Encoding::Bf16, spare_pages: 16, ..shape() };
                let shape = self.claims.fit(shape);
                let known = SHARED * shape.page_size;
                let fixture = Fixture::new(shape, &mut self.random)?;
                let mut loaded = fixture.load(make()?)?;
                poison(&mut loaded)?;
                let mut pages = Pages::new(&loaded.plan, &mut self.random);
                let base = self.tokens(known + 10);
                let tails = ROWS.map(|rows| self.tokens(rows + 1));
                let mut sequences = vec![Sequence::new(base.clone(), 2)];
                let first = step(&mut sequences, &[(0, known + 5)], &loaded.plan, &mut pages);
                loaded.run(&first, stage)?;
                for tail in &tails {
                    let tokens = base[..known].iter().chain(tail).copied().collect();
                    let follower = sequences[0].followed_by(tokens, SHARED, shape.page_size);
                    sequences.push(follower);
                }
                let counts: Vec<_> = [1].into_iter().chain(ROWS).enumerate().collect();
                let batch = step(&mut sequences, &counts, &loaded.plan, &mut pages);
                let many = loaded.run(&batch, stage)?;
                let batch_after = step(&mut sequences, &[(1, 1), (2, 1), (3, 1)], &loaded.plan, &mut pages);
                let after = loaded.run(&batch_after, stage)?;
                for (index, (rows, tail)) in ROWS.into_iter().zip(&tails).enumerate() {
                    let mut alone = fixture.load(make()?)?;
                    poison(&mut alone)?;
                    let mut pages = Pages::new(&alone.plan, &mut self.random);
                    let tokens = base[..known].iter().chain(tail).copied().collect();
                    let mut sequences = [Sequence::new(tokens, 2)];
                    let whole = step(&mut sequences, &[(0, known + rows)], &alone.plan, &mut pages);
                    let mut want = alone.run(&whole, stage)?.split_off(known);
                    let last = step(&mut sequences, &[(0, 1)], &alone.plan, &mut pages);
                    want.extend(alone.run(&last, stage)?);
                    let mine = batch.sequences[index + 1].rows.clone();
                    let mut got = many[mine].to_vec();
                    got.push(after[index].clone());
                    self.compare(format!("shared pages, {rows} rows, {shape:?}"), &got, &want, limit);
                }
            }
        }
        Ok(())
    }
}
