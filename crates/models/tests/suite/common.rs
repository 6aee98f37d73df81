//! Golden checkpoints, and a small driver that pages the KV cache as unkindly as the contract allows.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ctxserve_backend::{Backend, Batch, KvDtype, KvPlan, PageId, PageTable, SampleRow, SequenceSlice};
use ctxserve_checkpoint::Checkpoint;
use ctxserve_core::{SamplingParams, TokenId};
use ctxserve_cpu::CpuBackend;
use ctxserve_models::{LoadOptions, Model, load};
use serde_json::Value;

/// Small and odd, so that windows, chunks and pages never line up.
pub(crate) const OPTIONS: LoadOptions = LoadOptions { page_size: 10, kv_dtype: KvDtype::F32 };

/// Where the goldens are.
pub(crate) fn golden_dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

pub(crate) fn open(name: &str) -> Checkpoint {
    Checkpoint::open(&golden_dir(name)).unwrap()
}

/// What transformers computed for one prompt.
pub(crate) struct Case {
    pub(crate) prompt: Vec<TokenId>,
    pub(crate) greedy: Vec<TokenId>,
    /// Positions of prompt + greedy, ascending, with the logits that follow them.
    pub(crate) logits: Vec<(usize, Vec<f32>)>,
}

impl Case {
    /// Every id that the model is fed: the last greedy one is not.
    pub(crate) fn fed(&self) -> Vec<TokenId> {
        let mut ids = [&self.prompt[..], &self.greedy[..]].concat();
        ids.pop();
        ids
    }

    pub(crate) fn expected(&self, position: usize) -> Option<&[f32]> {
        let index = self.logits.binary_search_by_key(&position, |(p, _)| *p).ok()?;
        Some(&self.logits[index].1)
    }
}

/// Reads `expected.json` and `expected.f32` of a golden.
pub(crate) fn cases(name: &str) -> Vec<Case> {
    let dir = golden_dir(name);
    let json: Value = serde_json::from_slice(&std::fs::read(dir.join("expected.json")).unwrap()).unwrap();
    let bytes = std::fs::read(dir.join("expected.f32")).unwrap();
    let values: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
    let mut rows = values.chunks_exact(json["vocab"].as_u64().unwrap() as usize);
    let list = |value: &Value| -> Vec<TokenId> { serde_json::from_value(value.clone()).unwrap() };
    let cases = json["cases"].as_array().unwrap().iter().map(|case| Case {
        prompt: list(&case["prompt"]),
        greedy: list(&case["greedy"]),
        logits: list(&case["positions"])
            .into_iter()
            .map(|position| (position as usize, rows.next().unwrap().to_vec()))
            .collect(),
    });
    let cases = cases.collect();
    assert!(rows.next().is_none(), "{name}: logits without a position");
    cases
}

/// `|a - b| / |b|`.
pub(crate) fn relative_l2(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let distance: f64 = a.iter().zip(b).map(|(&a, &b)| square(a - b)).sum();
    (distance / b.iter().map(|&b| square(b)).sum::<f64>()).sqrt()
}

pub(crate) fn argmax(row: &[f32]) -> TokenId {
    let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap();
    best.0 as TokenId
}

/// Deterministic and good enough to shuffle with.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as usize) % n
    }

    pub(crate) fn ids(&mut self, count: usize, vocab: usize) -> Vec<TokenId> {
        (0..count).map(|_| self.below(vocab) as TokenId).collect()
    }
}

/// A sequence and the pages it holds.
#[derive(Default)]
pub(crate) struct Sequence {
    stored: usize,
    tables: Vec<PageTable>,
}

/// A sequence, what it is fed in this step, and whether the last row's logits are wanted.
pub(crate) type Work<'a> = (&'a mut Sequence, &'a [TokenId], bool);

/// A loaded model and its cache. Pages that a window has left behind go to whoever asks next, so that a sequence that
/// still reads them reads someone else's keys; pages never written hold NaN.
pub(crate) struct Driver {
    backend: CpuBackend,
    model: Box<dyn Model<CpuBackend>>,
    kv: <CpuBackend as Backend>::Kv,
    free: Vec<Vec<PageId>>,
}

impl Driver {
    pub(crate) fn new(checkpoint: &Checkpoint, mut backend: CpuBackend, pages: usize) -> Self {
        let model = load(checkpoint, &mut backend, &OPTIONS, &mut |_| ()).unwrap();
        let spec = model.info().kv.clone();
        let groups = spec.groups.len();
        let plan = KvPlan { spec, pages: vec![pages; groups] };
        let mut kv = backend.allocate_kv(&plan).unwrap();
        kv.poison(f32::NAN);
        let mut random = Random(1);
        let shuffled = |_| {
            let mut ids: Vec<PageId> = (0..pages as PageId).collect();
            for i in (1..pages).rev() {
                ids.swap(i, random.below(i + 1));
            }
            ids
        };
        Self { backend, model, kv, free: (0..groups).map(shuffled).collect() }
    }

    pub(crate) fn vocab(&self) -> usize {
        self.model.info().vocab_size
    }

    /// Runs one step and returns the logits that were asked for, in order.
    pub(crate) fn step(&mut self, work: &mut [Work<'_>]) -> Vec<Vec<f32>> {
        let mut batch = Batch::default();
        for (key, (sequence, ids, sample)) in work.iter_mut().enumerate() {
            self.page(sequence, ids.len());
            let row = batch.tokens.len();
            batch.tokens.extend_from_slice(ids);
            batch.sequences.push(SequenceSlice {
                key: key as u64,
                rows: row..row + ids.len(),
                start: sequence.stored,
                feed: None,
                tables: Arc::new(sequence.tables.clone()),
                sample: sample.then(greedy_row),
            });
            sequence.stored += ids.len();
        }
        let logits = self.model.forward(&mut self.backend, &mut self.kv, &batch).unwrap();
        let logits = self.backend.read_logits(&logits).unwrap();
        logits.chunks_exact(self.vocab()).map(<[f32]>::to_vec).collect()
    }

    /// Gives back what slid out of the windows, and takes what `more` positions need.
    fn page(&mut self, sequence: &mut Sequence, more: usize) {
        let spec = &self.model.info().kv;
        sequence.tables.resize_with(spec.groups.len(), PageTable::default);
        let last = sequence.stored + more - 1;
        for (group, table) in sequence.tables.iter_mut().enumerate() {
            let first = spec.first_visible(group, sequence.stored) / spec.page_size;
            for _ in table.first..first.min(table.first + table.pages.len()) {
                self.free[group].push(table.pages.remove(0));
            }
            table.first = table.first.max(first);
            while table.first + table.pages.len() <= last / spec.page_size {
                table.pages.push(self.free[group].pop().unwrap());
            }
        }
    }

    /// Forgets a sequence.
    pub(crate) fn finish(&mut self, sequence: Sequence) {
        for (free, table) in self.free.iter_mut().zip(sequence.tables) {
            free.extend(table.pages);
        }
    }

    /// Pages nobody holds, by group.
    pub(crate) fn free_pages(&self) -> Vec<usize> {
        self.free.iter().map(Vec::len).collect()
    }
}

fn greedy_row() -> SampleRow {
    SampleRow::new(Arc::new(SamplingParams::greedy()))
}
