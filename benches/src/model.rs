//! gpt-oss-20b's shape on synthetic weights, driven through the backend's ops in the model's own order.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use ctxserve_backend::{
    AttentionInput, AttentionSpec, Backend, Batch, ExpertSpec, ExpertWeights, KvDtype, KvGroup, KvPlan,
    KvSpec, Moe, PageTable, Role, RopeTable, SampleRow, SequenceSlice,
};
use ctxserve_core::{Elements, Matrix, SamplingParams, TokenId};
use ctxserve_cpu::{CpuBackend, CpuKv, CpuMatrix, Precision};
use half::bf16;

/// Layers of the real model.
pub(crate) const LAYERS: usize = 24;
const VOCAB: usize = 201_088;
const HIDDEN: usize = 2880;
const HEADS: usize = 64;
const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 64;
const WINDOW: usize = 128;
const PAGE: usize = 16;
const QKV: usize = (HEADS + 2 * KV_HEADS) * HEAD_DIM;

const ATTENTION: AttentionSpec = AttentionSpec {
    heads: HEADS,
    kv_heads: KV_HEADS,
    head_dim: HEAD_DIM,
    scale: 0.125,
    window: None,
    norm_eps: 1e-5,
};
const EXPERTS: ExpertSpec = ExpertSpec {
    experts: 32,
    top_k: 4,
    hidden: HIDDEN,
    inner: 2880,
    alpha: 1.702,
    limit: 7.0,
    norm_eps: 1e-5,
};

/// Weight bytes that one decoded token reads in all 24 layers and the head.
pub(crate) fn bytes_per_token(precision: Precision) -> f64 {
    let dense = match precision {
        Precision::Exact => 2.0,
        // One byte a weight and a bf16 scale per 32.
        Precision::Int8 => 34.0 / 32.0,
    };
    let attention = HIDDEN * QKV + HEADS * HEAD_DIM * HIDDEN;
    let experts = EXPERTS.top_k * 3 * EXPERTS.inner * HIDDEN;
    let router = 2 * EXPERTS.experts * HIDDEN;
    let layer = attention as f64 * dense + experts as f64 * 17.0 / 32.0 + router as f64;
    LAYERS as f64 * layer + (VOCAB * HIDDEN) as f64 * dense
}

/// One decoder layer.
struct Layer {
    input: AttentionInput<CpuBackend>,
    output: CpuMatrix,
    sinks: Vec<f32>,
    moe: Moe<CpuBackend>,
}

/// The model and its cache.
pub(crate) struct Model {
    backend: CpuBackend,
    embedding: CpuMatrix,
    head: CpuMatrix,
    norm: Vec<f32>,
    layers: Vec<Layer>,
    kv: CpuKv,
    rope: RopeTable,
    context: usize,
}

/// Seconds of one step, by op.
#[derive(Clone, Copy, Debug, Default)]
struct Step {
    embed: f64,
    attention_input: f64,
    attention: f64,
    attention_output: f64,
    experts: f64,
    logits: f64,
    sample: f64,
}

impl Step {
    /// The whole model's time from that of `layers` layers.
    fn scaled(&self, layers: usize) -> f64 {
        let inside = self.attention_input + self.attention + self.attention_output + self.experts;
        self.embed + inside * LAYERS as f64 / layers as f64 + self.logits + self.sample
    }
}

/// What was measured.
#[derive(Debug)]
pub(crate) struct Timings {
    prefill: Step,
    decode: Vec<Step>,
}

impl Timings {
    /// Median seconds of a decoded token.
    pub(crate) fn decode(&self, layers: usize) -> f64 {
        let mut times: Vec<f64> = self.decode.iter().map(|step| step.scaled(layers)).collect();
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
    }

    /// Seconds of the prompt.
    pub(crate) fn prefill(&self, layers: usize) -> f64 {
        self.prefill.scaled(layers)
    }

    /// Milliseconds of each op: of the last decoded token, and of the prompt.
    pub(crate) fn ops_ms(&self) -> serde_json::Value {
        let of = |step: &Step| {
            serde_json::json!({
                "embed": step.embed * 1e3, "attention_input": step.attention_input * 1e3,
                "attention": step.attention * 1e3, "attention_output": step.attention_output * 1e3,
                "experts": step.experts * 1e3, "logits": step.logits * 1e3, "sample": step.sample * 1e3,
            })
        };
        serde_json::json!({ "decode": self.decode.last().map(of), "prefill": of(&self.prefill) })
    }
}

impl Model {
    /// Builds `layers` layers, one at a time, and a cache for `context` positions.
    pub(crate) fn new(mut backend: CpuBackend, layers: usize, context: usize) -> Result<Self> {
        let mut random = Random(20_261_122);
        let b = &mut backend;
        let embedding = b.load_matrix(random.bf16(VOCAB, HIDDEN)?, None, Role::Embedding { head: false })?;
        let head = b.load_matrix(random.bf16(VOCAB, HIDDEN)?, None, Role::Head)?;
        let loaded = (0..layers).map(|_| Layer::new(b, &mut random)).collect::<Result<_>>()?;
        let groups = vec![
            KvGroup { window: Some(WINDOW), layers: (0..layers).step_by(2).collect(), dtype: KvDtype::F32 },
            KvGroup { window: None, layers: (1..layers).step_by(2).collect(), dtype: KvDtype::F32 },
        ];
        let (kv_heads, head_dim) = (KV_HEADS, HEAD_DIM);
        let spec = KvSpec { page_size: PAGE, kv_heads, head_dim, groups };
        let kv = b.allocate_kv(&KvPlan { spec, pages: vec![context.div_ceil(PAGE); 2] })?;
        let frequency = |i: usize| 150_000_f64.powf(-(i as f64) / 32.0);
        let rope = RopeTable { inv_freq: (0..32).map(frequency).collect(), mscale: 1.346_573_6 };
        Ok(Self { embedding, head, norm: vec![1.0; HIDDEN], layers: loaded, kv, rope, context, backend })
    }

    /// Prefills `prompt` tokens in one step and decodes `count` greedily.
    pub(crate) fn measure(&mut self, prompt: usize, count: usize) -> Result<Timings> {
        let tokens: Vec<TokenId> = (0..prompt).map(|at| (at * 7919 % VOCAB) as TokenId).collect();
        // The first step also faults pages in and wakes threads.
        self.step(&tokens[..prompt.min(8)], 0)?;
        let (prefill, mut next) = self.step(&tokens, 0)?;
        let mut decode = Vec::with_capacity(count);
        for position in prompt..prompt + count {
            let (step, id) = self.step(&[next], position)?;
            decode.push(step);
            next = id;
        }
        Ok(Timings { prefill, decode })
    }

    fn step(&mut self, tokens: &[TokenId], start: usize) -> Result<(Step, TokenId)> {
        let pages: Vec<u32> = (0..self.context.div_ceil(PAGE) as u32).collect();
        let batch = Batch {
            tokens: tokens.to_vec(),
            sequences: vec![SequenceSlice {
                key: 0,
                rows: 0..tokens.len(),
                start,
                feed: None,
                tables: Arc::new(vec![PageTable { first: 0, pages }; 2]),
                sample: Some(SampleRow::new(Arc::new(SamplingParams::greedy()))),
            }],
        };
        let (b, mut step) = (&mut self.backend, Step::default());
        b.begin(&batch, &self.kv, VOCAB)?;
        let mut x = timed(&mut step.embed, || b.embed(&self.embedding, &batch))?;
        for (index, layer) in self.layers.iter().enumerate() {
            let window = (index % 2 == 0).then_some(WINDOW);
            let spec = AttentionSpec { window, ..ATTENTION };
            let (kv, rope) = (&mut self.kv, &self.rope);
            let q = timed(&mut step.attention_input, || {
                b.attention_input(index, &layer.input, &spec, rope, &x, kv, &batch)
            })?;
            let heads =
                timed(&mut step.attention, || b.attention(index, &spec, Some(&layer.sinks), &q, kv, &batch))?;
            timed(&mut step.attention_output, || b.attention_output(&layer.output, &heads, &mut x))?;
            timed(&mut step.experts, || b.experts(&layer.moe, &mut x))?;
        }
        let logits = timed(&mut step.logits, || b.logits(&self.norm, 1e-5, &self.head, &x, &batch))?;
        let sampled = timed(&mut step.sample, || {
            let pending = b.sample(&logits, &batch)?;
            b.collect(pending)
        })?;
        let sampled = sampled.into_iter().next().context("no row was sampled")??;
        Ok((step, sampled.id))
    }
}

impl Layer {
    fn new(b: &mut CpuBackend, random: &mut Random) -> Result<Self> {
        let ExpertSpec { experts, hidden, inner, .. } = EXPERTS;
        let weights = ExpertWeights {
            gate_up: random.mxfp4(experts * 2 * inner, hidden)?,
            gate_up_bias: vec![0.01; experts * 2 * inner],
            down: random.mxfp4(experts * hidden, inner)?,
            down_bias: vec![0.01; experts * hidden],
        };
        Ok(Self {
            input: AttentionInput {
                norm: b.load_vector(vec![1.0; HIDDEN])?,
                qkv: b.load_matrix(
                    random.bf16(QKV, HIDDEN)?,
                    Some(vec![0.01; QKV]),
                    Role::Qkv(&ATTENTION),
                )?,
                head_norms: None,
            },
            output: b.load_matrix(
                random.bf16(HIDDEN, HEADS * HEAD_DIM)?,
                Some(vec![0.01; HIDDEN]),
                Role::Output(&ATTENTION),
            )?,
            sinks: b.load_vector(vec![0.5; HEADS])?,
            moe: Moe {
                norm: b.load_vector(vec![1.0; HIDDEN])?,
                router: b.load_matrix(
                    random.bf16(experts, hidden)?,
                    Some(vec![0.0; experts]),
                    Role::Router,
                )?,
                experts: b.load_experts(weights, &EXPERTS)?,
                spec: EXPERTS,
            },
        })
    }
}

fn timed<T>(total: &mut f64, op: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let result = op();
    *total += started.elapsed().as_secs_f64();
    result
}

/// xorshift64*: fast enough for 13 GB.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Values of both signs between 2^-6 and 2^-5, about what 2880 inputs want.
    fn bf16(&mut self, rows: usize, cols: usize) -> Result<Matrix> {
        let mut values = vec![bf16::ZERO; rows * cols];
        for four in values.chunks_mut(4) {
            let bits = self.bits().to_le_bytes();
            for (value, bits) in four.iter_mut().zip(bits.chunks_exact(2)) {
                let bits = u16::from_le_bytes([bits[0], bits[1]]);
                *value = bf16::from_bits(bits & 0x807f | 0x3c80);
            }
        }
        Matrix::new(rows, cols, Elements::Bf16(values)).context("shape")
    }

    /// Random codes with scales of 2^-8 to 2^-7.
    fn mxfp4(&mut self, rows: usize, cols: usize) -> Result<Matrix> {
        let mut codes = vec![0; rows * cols / 2];
        codes.chunks_mut(8).for_each(|c| c.copy_from_slice(&self.bits().to_le_bytes()[..c.len()]));
        let scales = (0..rows * cols / 32).map(|_| 119 + (self.bits() >> 63) as u8).collect();
        Matrix::new(rows, cols, Elements::Mxfp4 { codes, scales }).context("shape")
    }
}
