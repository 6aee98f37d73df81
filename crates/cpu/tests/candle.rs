//! The plain loops against candle's own operators: an oracle that shares no code with them.

use std::sync::Arc;

use candle_core::{D, Device, Tensor};
use candle_nn::ops::{rms_norm, sigmoid, softmax_last_dim};
use candle_nn::rotary_emb::rope;
use ctxserve_backend::conformance::Random;
use ctxserve_backend::{
    AttentionInput, AttentionSpec, Backend, Batch, DeviceError, ExpertSpec, ExpertWeights, KvDtype, KvGroup,
    KvPlan, KvSpec, Moe, PageTable, Role, RopeTable, SampleRow, SequenceSlice,
};
use ctxserve_core::{Elements, Matrix, SamplingParams};
use ctxserve_cpu::CpuBackend;

const TOKENS: usize = 23;
const VOCAB: usize = 50;
const HIDDEN: usize = 96;
const HEADS: usize = 16;
const KV_HEADS: usize = 2;
const DIM: usize = 64;
const WIDTH: usize = HEADS * DIM;
const QKV: usize = (HEADS + 2 * KV_HEADS) * DIM;
const WINDOW: usize = 9;
const EPS: f32 = 1e-5;
const EXPERTS: ExpertSpec =
    ExpertSpec { experts: 8, top_k: 4, hidden: HIDDEN, inner: 40, alpha: 1.702, limit: 7.0, norm_eps: EPS };

/// The layer's weights as vectors, for both sides.
struct Weights {
    embedding: Vec<f32>,
    norms: [Vec<f32>; 3],
    qkv: (Vec<f32>, Vec<f32>),
    output: (Vec<f32>, Vec<f32>),
    sinks: Vec<f32>,
    router: (Vec<f32>, Vec<f32>),
    gate_up: (Vec<f32>, Vec<f32>),
    down: (Vec<f32>, Vec<f32>),
    head: Vec<f32>,
    inv_freq: Vec<f64>,
}

impl Weights {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let r = &mut random;
        let mut norm = || r.vector(HIDDEN, 0.5).into_iter().map(|x| 1.0 + x).collect::<Vec<_>>();
        let norms = [norm(), norm(), norm()];
        let mut pair = |out: usize, cols: usize, bias: f32| {
            (r.vector(out * cols, 1.7 / (cols as f32).sqrt()), r.vector(out, bias))
        };
        let ExpertSpec { experts, inner, .. } = EXPERTS;
        Self {
            norms,
            qkv: pair(QKV, HIDDEN, 0.5),
            output: pair(HIDDEN, WIDTH, 0.5),
            router: pair(experts, HIDDEN, 1.0),
            // Gates beyond the clamp on both sides.
            gate_up: pair(experts * 2 * inner, HIDDEN, 9.0),
            down: pair(experts * HIDDEN, inner, 0.5),
            head: pair(VOCAB, HIDDEN, 0.0).0,
            embedding: pair(VOCAB, HIDDEN, 0.0).0,
            sinks: pair(1, HEADS, 0.0).0.into_iter().map(|x| 6.0 * x).collect(),
            inv_freq: (0..DIM / 2).map(|i| 500_f64.powf(-(i as f64) / 32.0)).collect(),
        }
    }
}

fn ids() -> Vec<u32> {
    (0..TOKENS as u32).map(|i| i * 17 % VOCAB as u32).collect()
}

const MSCALE: f64 = 1.346_573_6;

fn ours(w: &Weights) -> Result<Vec<f32>, DeviceError> {
    let mut b = CpuBackend::plain();
    let matrix = |rows: usize, cols: usize, v: &[f32]| {
        Matrix::new(rows, cols, Elements::F32(v.to_vec())).ok_or_else(|| DeviceError::new("test", "shape"))
    };
    let groups = vec![KvGroup { window: Some(WINDOW), layers: vec![0], dtype: KvDtype::F32 }];
    let spec = KvSpec { page_size: 4, kv_heads: KV_HEADS, head_dim: DIM, groups };
    let mut kv = b.allocate_kv(&KvPlan { spec, pages: vec![6] })?;
    let sample = SampleRow::new(Arc::new(SamplingParams::greedy()));
    let tables = Arc::new(vec![PageTable { first: 0, pages: vec![3, 0, 5, 1, 2, 4] }]);
    let slice = SequenceSlice { key: 0, rows: 0..TOKENS, start: 0, feed: None, tables, sample: Some(sample) };
    let batch = Batch { tokens: ids(), sequences: vec![slice] };
    let spec = AttentionSpec {
        heads: HEADS,
        kv_heads: KV_HEADS,
        head_dim: DIM,
        scale: 0.125,
        window: Some(WINDOW),
        norm_eps: EPS,
    };
    let ExpertSpec { experts, inner, .. } = EXPERTS;
    let input = AttentionInput {
        norm: w.norms[0].clone(),
        qkv: b.load_matrix(matrix(QKV, HIDDEN, &w.qkv.0)?, Some(w.qkv.1.clone()), Role::Qkv(&spec))?,
        head_norms: None,
    };
    let weights = ExpertWeights {
        gate_up: matrix(experts * 2 * inner, HIDDEN, &w.gate_up.0)?,
        gate_up_bias: w.gate_up.1.clone(),
        down: matrix(experts * HIDDEN, inner, &w.down.0)?,
        down_bias: w.down.1.clone(),
    };
    let moe = Moe {
        norm: w.norms[1].clone(),
        router: b.load_matrix(
            matrix(experts, HIDDEN, &w.router.0)?,
            Some(w.router.1.clone()),
            Role::Router,
        )?,
        experts: b.load_experts(weights, &EXPERTS)?,
        spec: EXPERTS,
    };
    let embedding =
        b.load_matrix(matrix(VOCAB, HIDDEN, &w.embedding)?, None, Role::Embedding { head: false })?;
    let output =
        b.load_matrix(matrix(HIDDEN, WIDTH, &w.output.0)?, Some(w.output.1.clone()), Role::Output(&spec))?;
    let head = b.load_matrix(matrix(VOCAB, HIDDEN, &w.head)?, None, Role::Head)?;
    let rope = RopeTable { inv_freq: w.inv_freq.clone(), mscale: MSCALE };
    b.begin(&batch, &kv, VOCAB)?;
    let mut x = b.embed(&embedding, &batch)?;
    let q = b.attention_input(0, &input, &spec, &rope, &x, &mut kv, &batch)?;
    let heads = b.attention(0, &spec, Some(&w.sinks), &q, &kv, &batch)?;
    b.attention_output(&output, &heads, &mut x)?;
    b.experts(&moe, &mut x)?;
    let logits = b.logits(&w.norms[2], EPS, &head, &x, &batch)?;
    b.read_logits(&logits)
}

fn candle(w: &Weights) -> candle_core::Result<Vec<f32>> {
    let device = &Device::Cpu;
    let tensor = |v: &[f32], shape: &[usize]| Tensor::from_slice(v, shape, device);
    let linear = |x: &Tensor, weight: &[f32], bias: &[f32], out: usize, cols: usize| {
        x.matmul(&tensor(weight, &[out, cols])?.t()?)?.broadcast_add(&tensor(bias, &[out])?)
    };
    let rows = Tensor::new(ids(), device)?;
    let x = tensor(&w.embedding, &[VOCAB, HIDDEN])?.index_select(&rows, 0)?;

    // Attention, one full matrix of scores, the sink a column of its own.
    let normed = rms_norm(&x, &tensor(&w.norms[0], &[HIDDEN])?, EPS)?;
    let qkv = linear(&normed, &w.qkv.0, &w.qkv.1, QKV, HIDDEN)?;
    let split = |start: usize, heads: usize| {
        qkv.narrow(1, start, heads * DIM)?.reshape((1, TOKENS, heads, DIM))?.transpose(1, 2)?.contiguous()
    };
    let (q, k, v) = (split(0, HEADS)?, split(WIDTH, KV_HEADS)?, split(WIDTH + KV_HEADS * DIM, KV_HEADS)?);
    let angles: Vec<f64> = (0..TOKENS).flat_map(|p| w.inv_freq.iter().map(move |f| p as f64 * f)).collect();
    let table = |f: fn(f64) -> f64| {
        let values: Vec<f32> = angles.iter().map(|&a| (f(a) * MSCALE) as f32).collect();
        tensor(&values, &[TOKENS, DIM / 2])
    };
    let (cos, sin) = (table(f64::cos)?, table(f64::sin)?);
    let (q, k) = (rope(&q, &cos, &sin)?, rope(&k, &cos, &sin)?);
    let repeat = |t: &Tensor| {
        let shape = (1, KV_HEADS, HEADS / KV_HEADS, TOKENS, DIM);
        t.unsqueeze(2)?.expand(shape)?.contiguous()?.reshape((1, HEADS, TOKENS, DIM))
    };
    let (k, v) = (repeat(&k)?, repeat(&v)?);
    let scores = (q.matmul(&k.transpose(2, 3)?.contiguous()?)? * 0.125)?;
    let mask: Vec<f32> = (0..TOKENS)
        .flat_map(|i| {
            (0..TOKENS).map(move |j| if j <= i && i < j + WINDOW { 0.0 } else { f32::NEG_INFINITY })
        })
        .collect();
    let scores = scores.broadcast_add(&tensor(&mask, &[1, 1, TOKENS, TOKENS])?)?;
    let sinks = tensor(&w.sinks, &[1, HEADS, 1, 1])?.expand((1, HEADS, TOKENS, 1))?.contiguous()?;
    let p = softmax_last_dim(&Tensor::cat(&[&scores, &sinks], D::Minus1)?)?;
    let heads = p.narrow(3, 0, TOKENS)?.contiguous()?.matmul(&v)?;
    let heads = heads.transpose(1, 2)?.contiguous()?.reshape((TOKENS, WIDTH))?;
    let x = (x + linear(&heads, &w.output.0, &w.output.1, HIDDEN, WIDTH)?)?;

    // Experts: every one of them for the last token, weighted by a softmax that is zero off the chosen four.
    let x = x.narrow(0, TOKENS - 1, 1)?;
    let ExpertSpec { experts, inner, alpha, limit, .. } = EXPERTS;
    let normed = rms_norm(&x, &tensor(&w.norms[1], &[HIDDEN])?, EPS)?;
    let router: Vec<f32> =
        linear(&normed, &w.router.0, &w.router.1, experts, HIDDEN)?.flatten_all()?.to_vec1()?;
    let mut sorted = router.clone();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let masked: Vec<f32> =
        router.iter().map(|&g| if g >= sorted[3] { g } else { f32::NEG_INFINITY }).collect();
    let weights: Vec<f32> = softmax_last_dim(&tensor(&masked, &[experts])?)?.to_vec1()?;
    let mut y = x.clone();
    for (e, weight) in weights.into_iter().enumerate() {
        let part = |v: &'_ [f32], n: usize| v[e * n..][..n].to_vec();
        let (up_w, up_b) = (part(&w.gate_up.0, 2 * inner * HIDDEN), part(&w.gate_up.1, 2 * inner));
        let u = linear(&normed, &up_w, &up_b, 2 * inner, HIDDEN)?.reshape((inner, 2))?;
        let (gate, up) = (u.narrow(1, 0, 1)?.minimum(limit)?, u.narrow(1, 1, 1)?.clamp(-limit, limit)?);
        let sigmoid = sigmoid(&(&gate * f64::from(alpha))?)?;
        let a = ((gate * sigmoid)? * (up + 1.0)?)?.reshape((1, inner))?;
        let (down_w, down_b) = (part(&w.down.0, HIDDEN * inner), part(&w.down.1, HIDDEN));
        y = (y + (linear(&a, &down_w, &down_b, HIDDEN, inner)? * f64::from(weight))?)?;
    }
    let normed = rms_norm(&y, &tensor(&w.norms[2], &[HIDDEN])?, EPS)?;
    normed.matmul(&tensor(&w.head, &[VOCAB, HIDDEN])?.t()?)?.flatten_all()?.to_vec1()
}

#[test]
fn a_whole_layer_agrees_with_candle() {
    for seed in [1, 2, 3] {
        let weights = Weights::new(seed);
        let (got, want) = (ours(&weights).unwrap(), candle(&weights).unwrap());
        assert_eq!(got.len(), want.len());
        let square = |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x * x)).sum::<f64>();
        let difference = square(&mut got.iter().zip(&want).map(|(g, w)| g - w));
        let error = (difference / square(&mut want.iter().copied())).sqrt();
        assert!(error < 5e-6, "seed {seed}: relative error {error:e}");
    }
}
