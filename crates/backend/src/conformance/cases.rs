//! The cases.

mod feeds;
mod quick;
mod shared;

use std::sync::Arc;

use ctxserve_core::{Encoding, SamplingParams};

use super::fixture::{Fixture, Loaded, POISON, Shape, Stage};
use super::random::Random;
use super::schedule::{Pages, Sequence, singles, step};
use super::{Case, Claims, Report};
use crate::{Backend, DeviceError, KvDtype, PageTable, SampleError};

/// Row counts: all small ones, register blocks' edges, and more than any block.
const ROWS: [usize; 19] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 33, 64];
/// Collects comparisons.
pub(super) struct Suite<'a> {
    random: Random,
    claims: &'a Claims,
    cases: Vec<Case>,
    skipped: Vec<String>,
}

fn shape() -> Shape {
    Shape {
        kv_heads: 1,
        group: 8,
        head_dim: 32,
        window: None,
        sinks: true,
        page_size: 16,
        kv: KvDtype::F32,
        spare_pages: 8,
        head_norms: false,
        biased: true,
        mlp: false,
        experts: 8,
        top_k: 4,
        inner: 64,
        dense: Encoding::F32,
        expert: Encoding::F32,
        extra: 32,
        unequal: false,
    }
}

/// As in Qwen3: wide heads with norms, no sinks, no biases, a dense layer.
fn qwen() -> Shape {
    Shape { head_dim: 128, group: 4, sinks: false, head_norms: true, biased: false, mlp: true, ..shape() }
}

impl<'a> Suite<'a> {
    pub(super) fn new(seed: u64, claims: &'a Claims) -> Self {
        let skipped = claims.lacks.iter().map(|(feature, why)| format!("{feature:?}: {why}")).collect();
        Self { random: Random::new(seed), claims, cases: Vec::new(), skipped }
    }

    pub(super) fn report(self, seed: u64) -> Report {
        Report { seed, cases: self.cases, skipped: self.skipped }
    }

    /// Whether backends take matrices stored so. Floats and MXFP4 any backend takes; for others it is asked.
    fn takes<B: Backend>(
        &mut self,
        encoding: Encoding,
        make: &impl Fn() -> Result<B, DeviceError>,
    ) -> Result<bool, DeviceError> {
        let takes = match encoding {
            Encoding::F32 | Encoding::Bf16 | Encoding::Mxfp4 => true,
            Encoding::Nvfp4 | Encoding::Affine => make()?.accepts(encoding),
        };
        let skipped = format!("{encoding:?} matrices: the backend does not accept them");
        if !takes && !self.skipped.contains(&skipped) {
            self.skipped.push(skipped);
        }
        Ok(takes)
    }

    fn compare(&mut self, name: String, got: &[Vec<f32>], want: &[Vec<f32>], limit: f64) {
        let error = if got.len() == want.len() {
            got.iter().zip(want).map(|(got, want)| relative(got, want)).fold(0.0, f64::max)
        } else {
            f64::INFINITY
        };
        self.cases.push(Case { name, error, limit });
    }

    fn tokens(&mut self, count: usize) -> Vec<u32> {
        (0..count).map(|_| self.random.below(POISON as usize) as u32).collect()
    }

    /// Embedding, QKV and experts over row counts, encodings and ragged widths.
    pub(super) fn products<B: Backend, R: Backend>(
        &mut self,
        make: &impl Fn() -> Result<B, DeviceError>,
        reference: &impl Fn() -> Result<R, DeviceError>,
    ) -> Result<(), DeviceError> {
        use Encoding::{Affine, Bf16, F32, Mxfp4, Nvfp4};
        let shapes = [
            Shape { dense: Bf16, expert: Mxfp4, experts: 32, ..shape() },
            Shape { dense: Mxfp4, expert: Mxfp4, inner: 96, extra: 96, ..shape() },
            Shape { dense: Bf16, expert: Bf16, inner: 37, extra: 33, ..shape() },
            Shape { dense: F32, expert: F32, inner: 21, extra: 1, ..shape() },
            Shape { head_dim: 64, dense: Bf16, expert: Mxfp4, ..shape() },
            Shape { dense: Affine, expert: Affine, extra: 64, ..shape() },
            Shape { dense: Nvfp4, expert: Nvfp4, inner: 48, extra: 16, ..shape() },
            Shape { extra: 64, dense: Bf16, ..qwen() },
            Shape { extra: 33, inner: 37, dense: Bf16, biased: true, ..qwen() },
            Shape { head_dim: 32, extra: 16, inner: 48, dense: Nvfp4, unequal: true, ..qwen() },
            Shape { extra: 16, inner: 208, dense: Nvfp4, ..qwen() },
            Shape { head_dim: 64, extra: 48, inner: 80, dense: Nvfp4, biased: true, unequal: true, ..qwen() },
            Shape { head_dim: 32, extra: 64, inner: 192, dense: Affine, ..qwen() },
            Shape { head_dim: 32, extra: 128, inner: 96, dense: Affine, ..qwen() },
        ];
        for shape in shapes.map(|shape| self.claims.fit(shape)) {
            if !self.takes(shape.dense, make)? {
                continue;
            }
            let fixture = Fixture::new(shape, &mut self.random)?;
            let (mut ours, mut theirs) = (fixture.load(make()?)?, fixture.load(reference()?)?);
            // Every row count once for FP4 experts and once for other codes, the edges for the rest.
            let all = shape.experts == 32 || shape.mlp && shape.dense == Nvfp4 && shape.head_dim == 32;
            for rows in ROWS.into_iter().filter(|&rows| all || [1, 2, 5, 8, 17, 33].contains(&rows)) {
                let tokens = self.tokens(rows);
                // Every row writes the same slot, which nobody reads here.
                let batch = singles(tokens, 2);
                for stage in [Stage::Embed, Stage::Queries, shape.feed_forward()] {
                    let name = format!("{stage:?}, {rows} rows, {shape:?}");
                    let (got, want) = (ours.run(&batch, stage)?, theirs.run(&batch, stage)?);
                    self.compare(name, &got, &want, self.claims.products);
                }
            }
        }
        Ok(())
    }

    /// Prefill chunks and decode rows in one batch, over windows, pages, sinks and KV storages.
    pub(super) fn attention<B: Backend, R: Backend>(
        &mut self,
        make: &impl Fn() -> Result<B, DeviceError>,
        reference: &impl Fn() -> Result<R, DeviceError>,
    ) -> Result<(), DeviceError> {
        for shape in self.attention_shapes() {
            if !self.takes(shape.dense, make)? {
                continue;
            }
            let fixture = Fixture::new(shape, &mut self.random)?;
            let (mut ours, mut theirs) = (fixture.load(make()?)?, fixture.load(reference()?)?);
            poison(&mut ours)?;
            poison(&mut theirs)?;
            let limit = self.claims.products.max(storage(shape.kv));
            // What quantisation changes before the router may change its choice: only exact layers compare.
            let layer = self.claims.products <= self.claims.exact && shape.kv == KvDtype::F32;
            let stages = &[Stage::Attention, Stage::Output, Stage::Layer][..if layer { 3 } else { 2 }];
            let mut sequences: Vec<Sequence> = (0..3).map(|_| Sequence::new(self.tokens(100), 2)).collect();
            let mut pages = Pages::new(&ours.plan, &mut self.random);
            let window = shape.window.unwrap_or(20);
            let steps = [
                vec![(0, window.saturating_sub(1).max(1)), (1, 1)],
                vec![(0, 1), (1, window)],
                vec![(2, 3), (0, 1), (1, 1)],
                vec![(0, 17), (2, 1), (1, 2)],
                vec![(1, 1), (0, 1), (2, 33)],
            ];
            for (at, counts) in steps.iter().enumerate() {
                let batch = step(&mut sequences, counts, &ours.plan, &mut pages);
                for &stage in stages {
                    let name = format!("{stage:?}, step {at}, {shape:?}");
                    let (got, want) = (ours.run(&batch, stage)?, theirs.run(&batch, stage)?);
                    self.compare(name, &got, &want, limit);
                }
            }
        }
        Ok(())
    }

    fn attention_shapes(&self) -> Vec<Shape> {
        let mut shapes = Vec::new();
        for &kv in &self.claims.kv {
            shapes.extend([
                Shape { kv, ..shape() },
                Shape { kv, sinks: false, page_size: 5, ..shape() },
                Shape { kv, window: Some(1), page_size: 3, ..shape() },
                Shape { kv, window: Some(8), page_size: 8, sinks: false, ..shape() },
                Shape { kv, window: Some(9), page_size: 4, ..shape() },
                Shape { kv, window: Some(16), head_dim: 64, ..shape() },
                Shape { kv, head_dim: 64, kv_heads: 2, page_size: 1, ..shape() },
                Shape { kv, ..qwen() },
                Shape { kv, kv_heads: 2, head_dim: 32, page_size: 6, ..qwen() },
                Shape { kv, extra: 48, dense: Encoding::Nvfp4, ..qwen() },
                Shape { kv, head_dim: 64, kv_heads: 2, extra: 16, dense: Encoding::Nvfp4, ..qwen() },
            ]);
        }
        shapes.into_iter().map(|shape| self.claims.fit(shape)).collect()
    }

    /// One sequence alone, in one chunk, against the same in other company, chunks and pages.
    pub(super) fn independence<B: Backend>(
        &mut self,
        make: &impl Fn() -> Result<B, DeviceError>,
    ) -> Result<(), DeviceError> {
        const LENGTH: usize = 41;
        let limit = if self.claims.bitwise { 0.0 } else { self.claims.products };
        let shapes = [
            Shape { dense: Encoding::Bf16, expert: Encoding::Mxfp4, ..shape() },
            Shape { dense: Encoding::F32, expert: Encoding::Bf16, ..shape() },
            Shape { dense: Encoding::Nvfp4, expert: Encoding::Nvfp4, inner: 48, extra: 16, ..shape() },
            Shape { dense: Encoding::Nvfp4, head_dim: 32, extra: 16, ..qwen() },
            Shape { dense: Encoding::Affine, head_dim: 32, extra: 64, ..qwen() },
        ];
        for shape in shapes {
            let base = self.claims.fit(Shape { window: Some(12), ..shape });
            if !self.takes(base.dense, make)? {
                continue;
            }
            let fixture = Fixture::new(base, &mut self.random)?;
            let subject = self.tokens(LENGTH);
            let mut alone = fixture.load(make()?)?;
            let mut sequences = [Sequence::new(subject.clone(), 2)];
            let mut pages = Pages::new(&alone.plan, &mut self.random);
            let batch = step(&mut sequences, &[(0, LENGTH)], &alone.plan, &mut pages);
            // Near a tie of the router, rounding that depends on the chunk picks another expert.
            let stage = if self.claims.bitwise { Stage::Layer } else { Stage::Output };
            let want = alone.run(&batch, stage)?;
            let untold = alone.run(&batch, Stage::Next { told: false })?;
            let told = alone.run(&batch, Stage::Next { told: true })?;
            self.compare(format!("independence, of the next norm, {base:?}"), &told, &untold, limit);

            for chunk in [1, 7, 16, 40] {
                for (page_size, strangers) in [(16, 0), (16, 3), (5, 3)] {
                    let mut fixture = fixture.clone();
                    fixture.shape = self.claims.fit(Shape { page_size, ..fixture.shape });
                    let mut loaded = fixture.load(make()?)?;
                    poison(&mut loaded)?;
                    let mut pages = Pages::new(&loaded.plan, &mut self.random);
                    // The first stranger is nothing but NaN.
                    let mut sequences = vec![Sequence::new(subject.clone(), 2)];
                    for at in 0..strangers {
                        let tokens = if at == 0 { vec![POISON; LENGTH] } else { self.tokens(LENGTH) };
                        sequences.push(Sequence::new(tokens, 2));
                    }
                    let mut got = Vec::new();
                    while sequences[0].done < LENGTH {
                        let count = chunk.min(LENGTH - sequences[0].done);
                        // Strangers before and after the subject.
                        let mut counts = vec![(0, count)];
                        if strangers > 0 && sequences[1].done + 1 < LENGTH {
                            counts.insert(0, (1, 1));
                        }
                        for (other, sequence) in sequences.iter().enumerate().skip(2) {
                            let room = LENGTH - sequence.done;
                            if room > 0 {
                                counts.push((other, room.min(1 + self.random.below(5))));
                            }
                        }
                        let batch = step(&mut sequences, &counts, &loaded.plan, &mut pages);
                        let mut rows = loaded.run(&batch, stage)?;
                        let mine = batch.sequences.iter().find(|slice| slice.key == 0);
                        got.extend(
                            mine.map_or_else(Vec::new, |slice| rows.drain(slice.rows.clone()).collect()),
                        );
                    }
                    let name = format!(
                        "independence, chunks of {chunk}, {strangers} strangers, page size {page_size}, {base:?}"
                    );
                    self.compare(name, &got, &want, limit);
                }
            }
        }
        Ok(())
    }

    /// The same picks as the reference, and a NaN that fails its own row alone.
    pub(super) fn sampling<B: Backend, R: Backend>(
        &mut self,
        make: &impl Fn() -> Result<B, DeviceError>,
        reference: &impl Fn() -> Result<R, DeviceError>,
    ) -> Result<(), DeviceError> {
        let fixture = Fixture::new(self.claims.fit(shape()), &mut self.random)?;
        let (mut ours, mut theirs) = (fixture.load(make()?)?, fixture.load(reference()?)?);
        self.outcomes(&mut ours, &mut theirs)
    }

    /// See [`Suite::sampling`].
    fn outcomes<B: Backend, R: Backend>(
        &mut self,
        ours: &mut Loaded<B>,
        theirs: &mut Loaded<R>,
    ) -> Result<(), DeviceError> {
        let mut tokens = self.tokens(32);
        tokens[5] = POISON;
        let mut batch = singles(tokens, 2);
        for (row, slice) in batch.sequences.iter_mut().enumerate() {
            if let Some(sample) = &mut slice.sample {
                (sample.seed, sample.step) = (self.random.bits(), row as u64);
                sample.params = Arc::new(params(row));
                sample.banned = if row % 4 == 3 { (0..40).collect() } else { Arc::default() };
                sample.prompt = Arc::from([1, 2, 3, 3]);
                sample.generated = Arc::new(vec![7, 7, 9]);
            }
        }
        let (got, want) = (ours.sample(&batch)?, theirs.sample(&batch)?);
        batch.sequences.iter_mut().for_each(|slice| slice.sample = None);
        let none = ours.sample(&batch)?;
        let nan = matches!(got.get(5), Some(Err(SampleError::NonFinite)));
        let mut push = |name: &str, wrong: usize| {
            let error = if wrong == 0 { 0.0 } else { f64::INFINITY };
            self.cases.push(Case { name: name.to_owned(), error, limit: 0.0 });
        };
        push("sampling, a step inside prompts has nothing to sample", none.len());
        push("sampling, a NaN row fails", usize::from(!nan));
        push("sampling, only that row fails", got.iter().filter(|row| row.is_err()).count().abs_diff(1));
        // Quantised logits may pick otherwise.
        if self.claims.products <= self.claims.exact {
            let differ = got.iter().zip(&want).filter(|(got, want)| match (got, want) {
                (Ok(got), Ok(want)) => got.id != want.id,
                (got, want) => got.is_ok() != want.is_ok(),
            });
            push("sampling, the same picks", differ.count());
        }
        Ok(())
    }
}

/// What storage may add to an error: its rounding flips where the two sides differ in the last bit before it.
fn storage(kv: KvDtype) -> f64 {
    match kv {
        KvDtype::F32 => 0.0,
        KvDtype::Bf16 => 2e-3,
        KvDtype::Fp8E4m3 => 5e-2,
    }
}

/// Parameters that walk through the filters.
fn params(row: usize) -> SamplingParams {
    let base = SamplingParams::default();
    match row % 6 {
        0 => SamplingParams::greedy(),
        1 => SamplingParams { top_k: 7, ..base },
        2 => SamplingParams { top_p: 0.6, temperature: 0.7, ..base },
        3 => SamplingParams { min_p: 0.2, temperature: 1.5, ..base },
        4 => SamplingParams { repetition_penalty: 1.3, presence_penalty: 0.5, ..base },
        _ => SamplingParams { logit_bias: vec![(11, 3.0), (12, -100.0)], ..base },
    }
}

/// Fills every slot of every page with NaN keys and values: whoever reads one that no real token wrote is found out.
fn poison<B: Backend>(loaded: &mut Loaded<B>) -> Result<(), DeviceError> {
    let (size, groups) = (loaded.plan.spec.page_size, loaded.plan.spec.groups.len());
    let count = loaded.plan.pages[0];
    let mut batch = singles(vec![POISON; size * count], groups);
    batch.sequences.truncate(count);
    for (page, slice) in batch.sequences.iter_mut().enumerate() {
        slice.rows = page * size..(page + 1) * size;
        slice.tables = Arc::new(vec![PageTable { first: 0, pages: vec![page as u32] }; groups]);
    }
    loaded.write(&batch)?;
    Ok(())
}

/// `||got - want|| / ||want||`. Rows that are NaN on both sides agree; on one side alone they do not.
fn relative(got: &[f32], want: &[f32]) -> f64 {
    if got.iter().all(|x| x.is_nan()) && want.iter().all(|x| x.is_nan()) {
        return 0.0;
    }
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut got.iter().zip(want).map(|(g, w)| f64::from(*g) - f64::from(*w)));
    let error = difference / norm(&mut want.iter().map(|&w| f64::from(w))).max(f64::MIN_POSITIVE);
    if error.is_finite() && got.len() == want.len() { error } else { f64::INFINITY }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_relative_and_nan_is_infinite() {
        assert!((relative(&[3.0, 4.1], &[3.0, 4.0]) - 0.02).abs() < 1e-6);
        assert_eq!(relative(&[f32::NAN, 1.0], &[1.0, 1.0]), f64::INFINITY);
        assert_eq!(relative(&[f32::NAN], &[f32::NAN]), 0.0);
        assert_eq!(relative(&[f32::NAN], &[1.0]), f64::INFINITY);
    }
}
