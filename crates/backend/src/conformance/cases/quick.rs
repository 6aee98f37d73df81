//! The short form, for the start of a server.

use std::sync::Arc;

use ctxserve_core::{MXFP4_BLOCK, SamplingParams};

use super::super::fixture::{Fixture, Loaded, Shape, Stage};
use super::super::schedule::{Pages, Sequence, singles, step};
use super::super::{Feature, Like};
use super::{Case, Suite, shape};
use crate::{Backend, DeviceError};

/// Row counts on both sides of where backends go over to other kernels.
const ROWS: [usize; 12] = [1, 2, 5, 8, 16, 17, 40, 64, 72, 136, 256, 400];
/// Different tokens of those rows; the reference's plain loops take their time.
const TOKENS: u32 = 24;
/// Sequences that attend together: more than matrix-vector kernels take.
const SEQUENCES: usize = 18;

impl Suite<'_> {
    /// Each op on one layer like the model's: over row counts, and attending over each KV storage.
    pub(in super::super) fn quick<B: Backend, R: Backend>(
        &mut self,
        like: Like,
        make: &impl Fn() -> Result<B, DeviceError>,
        reference: &impl Fn() -> Result<R, DeviceError>,
    ) -> Result<(), DeviceError> {
        for (at, &kv) in self.claims.kv.iter().enumerate() {
            let Like { head_dim, group, head_norms, dense, expert, .. } = like;
            let mlp = like.experts == 0 && self.claims.has(Feature::Mlp);
            let (experts, top_k) = if like.experts == 0 { (8, 4) } else { (like.experts, like.top_k) };
            // Of a dense layer not whole panels.
            let inner = if mlp { 224 } else { 64 };
            let (window, page_size, spare_pages) = (Some(20), 32, SEQUENCES);
            // Codes come in blocks along rows, which are as wide as the residual stream.
            let width = group * head_dim;
            let extra = (width + 1).next_multiple_of(MXFP4_BLOCK) - width;
            let shape = Shape {
                kv,
                head_dim,
                group,
                head_norms,
                // Where heads are normed projections are not biased.
                biased: !head_norms,
                mlp,
                experts,
                top_k,
                inner,
                window,
                page_size,
                spare_pages,
                dense,
                expert,
                extra,
                ..shape()
            };
            if !self.takes(dense, make)? {
                continue;
            }
            let fixture = Fixture::new(self.claims.fit(shape), &mut self.random)?;
            let (mut ours, mut theirs) = (fixture.load(make()?)?, fixture.load(reference()?)?);
            if at == 0 {
                self.counts(&mut ours, &mut theirs)?;
                self.greedy(&mut ours)?;
                self.outcomes(&mut ours, &mut theirs)?;
                self.fed(&mut ours)?;
            }
            self.steps(&mut ours, &mut theirs)?;
        }
        Ok(())
    }

    /// Embedding, QKV and experts. The reference computes each token once: a row does not depend on its neighbours.
    fn counts<B: Backend, R: Backend>(
        &mut self,
        ours: &mut Loaded<B>,
        theirs: &mut Loaded<R>,
    ) -> Result<(), DeviceError> {
        for stage in [Stage::Embed, Stage::Queries, ours.shape.feed_forward()] {
            let all = theirs.run(&singles((0..TOKENS).collect(), 2), stage)?;
            for rows in ROWS {
                let tokens: Vec<u32> = (0..rows).map(|_| self.random.below(all.len()) as u32).collect();
                let want: Vec<_> = tokens.iter().map(|&token| all[token as usize].clone()).collect();
                let got = ours.run(&singles(tokens, 2), stage)?;
                let name = format!("{stage:?}, {rows} rows, {:?}", ours.shape);
                self.compare(name, &got, &want, self.claims.products);
            }
        }
        Ok(())
    }

    /// Prefill, then decode of many, then of few, then both, in a windowed layer and in a full one.
    fn steps<B: Backend, R: Backend>(
        &mut self,
        ours: &mut Loaded<B>,
        theirs: &mut Loaded<R>,
    ) -> Result<(), DeviceError> {
        let mut sequences: Vec<_> = (0..SEQUENCES).map(|_| Sequence::new(self.tokens(50), 2)).collect();
        let mut pages = Pages::new(&ours.plan, &mut self.random);
        let steps = [
            vec![(0, 35), (1, 3)],
            (0..SEQUENCES).map(|at| (at, 1)).collect(),
            vec![(0, 1), (1, 1)],
            vec![(2, 1), (0, 9)],
        ];
        let limit = self.claims.products.max(super::storage(ours.shape.kv));
        for (at, counts) in steps.iter().enumerate() {
            let batch = step(&mut sequences, counts, &ours.plan, &mut pages);
            for layer in [1, 2] {
                ours.turn_to(layer);
                theirs.turn_to(layer);
                for stage in [Stage::Attention, Stage::Output] {
                    let (got, want) = (ours.run(&batch, stage)?, theirs.run(&batch, stage)?);
                    self.compare(format!("{stage:?}, step {at}, {:?}", ours.shape), &got, &want, limit);
                }
            }
        }
        Ok(())
    }

    /// The likeliest token is picked, by greedy rows and by rows that keep it alone.
    fn greedy<B: Backend>(&mut self, ours: &mut Loaded<B>) -> Result<(), DeviceError> {
        let mut batch = singles(self.tokens(24), 2);
        for (row, sample) in batch.sequences.iter_mut().filter_map(|slice| slice.sample.as_mut()).enumerate()
        {
            let base = SamplingParams::default();
            sample.seed = self.random.bits();
            sample.params = Arc::new(match row % 3 {
                0 => SamplingParams::greedy(),
                1 => SamplingParams { top_k: 1, ..base },
                _ => SamplingParams { top_p: 1e-6, ..base },
            });
        }
        let logits = ours.run(&batch, Stage::Embed)?;
        let picked = ours.sample(&batch)?;
        let likeliest = |row: &Vec<f32>| row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let right = picked.iter().zip(&logits).filter(|(pick, row)| {
            let pick = pick.as_ref().ok().and_then(|pick| row.get(pick.id as usize));
            pick.is_some_and(|&logit| logit == likeliest(row))
        });
        let error = if right.count() == logits.len() { 0.0 } else { f64::INFINITY };
        self.cases.push(Case { name: "sampling, the likeliest token".to_owned(), error, limit: 0.0 });
        Ok(())
    }
}
