//! A small layer, loaded into any backend.

use ctxserve_core::{Elements, Encoding, Matrix, TokenId};
use half::bf16;

use super::random::{Random, matrix};
use super::schedule::singles;
use crate::{
    AttentionInput, AttentionSpec, Backend, Batch, DeviceError, ExpertSpec, ExpertWeights, KvDtype, KvGroup,
    KvPlan, KvSpec, Moe, Role, RopeTable, SampleError, Sampled,
};

/// Ids of the fixture's vocabulary; the last one's embedding is NaN.
pub(super) const VOCAB: usize = 64;
/// The id whose embedding is NaN.
pub(super) const POISON: TokenId = VOCAB as TokenId - 1;

/// What varies between cases.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) kv_heads: usize,
    /// Query heads per key/value head.
    pub(super) group: usize,
    pub(super) head_dim: usize,
    pub(super) window: Option<usize>,
    pub(super) sinks: bool,
    pub(super) page_size: usize,
    pub(super) kv: KvDtype,
    /// Pages beyond those that three long sequences take: one for each further sequence.
    pub(super) spare_pages: usize,
    pub(super) experts: usize,
    pub(super) top_k: usize,
    pub(super) inner: usize,
    pub(super) dense: Encoding,
    pub(super) expert: Encoding,
    /// Residual channels beyond those that take the heads.
    pub(super) extra: usize,
}

impl Shape {
    pub(super) fn attention(&self) -> AttentionSpec {
        AttentionSpec {
            heads: self.kv_heads * self.group,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            window: self.window,
            norm_eps: 1e-5,
        }
    }

    fn width(&self) -> usize {
        self.kv_heads * self.group * self.head_dim
    }

    pub(super) fn hidden(&self) -> usize {
        self.width() + self.extra
    }

    fn spec(&self) -> ExpertSpec {
        ExpertSpec {
            experts: self.experts,
            top_k: self.top_k,
            hidden: self.hidden(),
            inner: self.inner,
            alpha: 1.702,
            limit: 7.0,
            norm_eps: 1e-5,
        }
    }

    /// Two groups, so that pool offsets matter: the layer under test is layer 1, second of the first group.
    pub(super) fn plan(&self) -> KvPlan {
        let groups = vec![
            KvGroup { window: self.window, layers: vec![0, 1], dtype: self.kv },
            KvGroup { window: None, layers: vec![2], dtype: self.kv },
        ];
        let Self { page_size, kv_heads, head_dim, .. } = *self;
        let spec = KvSpec { page_size, kv_heads, head_dim, groups };
        // Enough for every schedule.
        KvPlan { spec, pages: vec![192_usize.div_ceil(page_size) + self.spare_pages; 2] }
    }
}

/// Host weights of a shape.
#[derive(Clone, Debug)]
pub(super) struct Fixture {
    pub(super) shape: Shape,
    embedding: Matrix,
    norm: Vec<f32>,
    qkv: (Matrix, Vec<f32>),
    copy_heads: Matrix,
    output: (Matrix, Vec<f32>),
    sinks: Vec<f32>,
    router: (Matrix, Vec<f32>),
    experts: ExpertWeights,
    copy_hidden: Matrix,
}

impl Fixture {
    pub(super) fn new(shape: Shape, random: &mut Random) -> Result<Self, DeviceError> {
        let (hidden, width) = (shape.hidden(), shape.width());
        let mut embedding = random.vector(VOCAB * hidden, 1.5);
        embedding.iter_mut().step_by(hidden).for_each(|x| *x = 1.0);
        embedding[POISON as usize * hidden..].fill(f32::NAN);
        let qkv_rows = width + 2 * shape.kv_heads * shape.head_dim;
        let qkv = random.matrix(qkv_rows, hidden, shape.dense)?;
        // Output row 0 is zero everywhere: channel 0 witnesses the scale.
        let copy_heads = copy(hidden, width, 1)?;
        let output = silence(random.matrix(hidden, width, shape.dense)?, 1, hidden)?;
        let mut output_bias = random.vector(hidden, 0.5);
        output_bias[0] = 0.0;
        let (experts, inner) = (shape.experts, shape.inner);
        let gate_up = random.matrix(experts * 2 * inner, hidden, shape.expert)?;
        let down = silence(random.matrix(experts * hidden, inner, shape.expert)?, experts, hidden)?;
        let mut down_bias = random.vector(experts * hidden, 0.5);
        down_bias.iter_mut().step_by(hidden).for_each(|x| *x = 0.0);
        // Gates beyond the clamp on both sides.
        let gate_up_bias = random.vector(experts * 2 * inner, 9.0);
        Ok(Self {
            shape,
            // Exact in every backend, as the router is: near ties of the router see the difference.
            embedding: matrix(
                VOCAB,
                hidden,
                Elements::Bf16(embedding.into_iter().map(bf16::from_f32).collect()),
            )?,
            norm: random.vector(hidden, 0.5).into_iter().map(|x| 1.0 + x).collect(),
            qkv: (qkv, random.vector(qkv_rows, 0.5)),
            copy_heads,
            output: (output, output_bias),
            sinks: random.vector(width / shape.head_dim, 3.0),
            router: (random.matrix(experts, hidden, Encoding::Bf16)?, random.vector(experts, 1.0)),
            experts: ExpertWeights { gate_up, gate_up_bias, down, down_bias },
            copy_hidden: copy(hidden, hidden, 0)?,
        })
    }

    /// Loads everything.
    pub(super) fn load<B: Backend>(&self, mut backend: B) -> Result<Loaded<B>, DeviceError> {
        let b = &mut backend;
        let (spec, attention) = (self.shape.spec(), self.shape.attention());
        let moe = Moe {
            norm: b.load_vector(self.norm.clone())?,
            router: b.load_matrix(self.router.0.clone(), Some(self.router.1.clone()), Role::Router)?,
            experts: b.load_experts(self.experts.clone(), &spec)?,
            spec,
        };
        let input = AttentionInput {
            norm: b.load_vector(self.norm.clone())?,
            qkv: b.load_matrix(self.qkv.0.clone(), Some(self.qkv.1.clone()), Role::Qkv(&attention))?,
            head_norms: None,
        };
        let plan = self.shape.plan();
        let half = self.shape.head_dim / 2;
        let frequency = |i: usize| 10_000_f64.powf(-(i as f64) / half as f64);
        Ok(Loaded {
            embedding: b.load_matrix(self.embedding.clone(), None, Role::Embedding { head: false })?,
            input,
            copy_heads: b.load_matrix(self.copy_heads.clone(), None, Role::Output(&attention))?,
            output: b.load_matrix(
                self.output.0.clone(),
                Some(self.output.1.clone()),
                Role::Output(&attention),
            )?,
            sinks: if self.shape.sinks { Some(b.load_vector(self.sinks.clone())?) } else { None },
            moe,
            ones: b.load_vector(vec![1.0; self.shape.hidden()])?,
            copy_hidden: b.load_matrix(self.copy_hidden.clone(), None, Role::Head)?,
            kv: b.allocate_kv(&plan)?,
            plan,
            rope: RopeTable { inv_freq: (0..half).map(frequency).collect(), mscale: 1.25 },
            shape: self.shape,
            layer: 1,
            backend,
        })
    }
}

/// `[rows, cols]` with ones at `(i + shift, i)`.
fn copy(rows: usize, cols: usize, shift: usize) -> Result<Matrix, DeviceError> {
    let mut values = vec![0.0; rows * cols];
    for col in 0..cols.min(rows - shift) {
        values[(col + shift) * cols + col] = 1.0;
    }
    matrix(rows, cols, Elements::F32(values))
}

/// Zeroes row 0 of each of `groups` matrices of `rows` rows.
fn silence(weights: Matrix, groups: usize, rows: usize) -> Result<Matrix, DeviceError> {
    let (all, cols) = (weights.rows(), weights.cols());
    let mut elements = weights.into_elements();
    for start in (0..groups).map(|group| group * rows * cols) {
        match &mut elements {
            Elements::F32(values) => values[start..start + cols].fill(0.0),
            Elements::Bf16(values) => values[start..start + cols].fill(bf16::ZERO),
            Elements::Mxfp4 { codes, .. } | Elements::Nvfp4 { codes, .. } => {
                codes[start / 2..(start + cols) / 2].fill(0);
            }
            Elements::Affine { group, scales, offsets, .. } => {
                let groups = start / *group..(start + cols) / *group;
                scales[groups.clone()].fill(0.0);
                offsets[groups].fill(0.0);
            }
        }
    }
    matrix(all, cols, elements)
}

/// A fixture in a backend's memory.
pub(super) struct Loaded<B: Backend> {
    pub(super) backend: B,
    pub(super) shape: Shape,
    pub(super) plan: KvPlan,
    embedding: B::Matrix,
    input: AttentionInput<B>,
    copy_heads: B::Matrix,
    output: B::Matrix,
    sinks: Option<B::Vector>,
    moe: Moe<B>,
    ones: B::Vector,
    copy_hidden: B::Matrix,
    kv: B::Kv,
    rope: RopeTable,
    /// The layer under test.
    layer: usize,
}

/// How far through the layer a case goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// Embedding and logits alone.
    Embed,
    /// Rotated queries, copied to the residual stream.
    Queries,
    /// Attention's output, copied likewise.
    Attention,
    /// The output projection of attention.
    Output,
    /// The experts alone, attention left out.
    Experts,
    /// The whole layer.
    Layer,
    /// The whole layer, and the queries of one that follows, whose norm the experts are told or not.
    Next { told: bool },
}

impl<B: Backend> Loaded<B> {
    /// Puts another layer under test, and its group's window into the shape.
    pub(super) fn turn_to(&mut self, layer: usize) {
        self.layer = layer;
        let place = self.plan.spec.place(layer);
        self.shape.window = place.and_then(|(group, _)| self.plan.spec.groups[group].window);
    }

    /// Runs a step up to `stage` and reads the residual stream, normed, of every row.
    pub(super) fn run(&mut self, batch: &Batch, stage: Stage) -> Result<Vec<Vec<f32>>, DeviceError> {
        let (spec, layer) = (self.shape.attention(), self.layer);
        let b = &mut self.backend;
        b.begin(batch, &self.kv, VOCAB)?;
        let mut x = b.embed(&self.embedding, batch)?;
        if !matches!(stage, Stage::Embed | Stage::Experts) {
            let q = b.attention_input(layer, &self.input, &spec, &self.rope, &x, &mut self.kv, batch)?;
            if stage == Stage::Queries {
                b.attention_output(&self.copy_heads, &q, &mut x)?;
            } else {
                let heads = b.attention(layer, &spec, self.sinks.as_ref(), &q, &self.kv, batch)?;
                let output = if stage == Stage::Attention { &self.copy_heads } else { &self.output };
                b.attention_output(output, &heads, &mut x)?;
            }
        }
        match stage {
            Stage::Experts | Stage::Layer | Stage::Next { told: false } => b.experts(&self.moe, &mut x)?,
            Stage::Next { told: true } => {
                b.experts_before(&self.moe, &mut x, (&self.input.norm, spec.norm_eps))?;
            }
            Stage::Embed | Stage::Queries | Stage::Attention | Stage::Output => {}
        }
        if matches!(stage, Stage::Next { .. }) {
            let q = b.attention_input(layer, &self.input, &spec, &self.rope, &x, &mut self.kv, batch)?;
            b.attention_output(&self.copy_heads, &q, &mut x)?;
        }
        let reading = singles(batch.tokens.clone(), self.plan.spec.groups.len());
        b.begin(&reading, &self.kv, VOCAB)?;
        let logits = b.logits(&self.ones, 1e-12, &self.copy_hidden, &x, &reading)?;
        let values = b.read_logits(&logits)?;
        Ok(values.chunks(self.shape.hidden()).map(<[f32]>::to_vec).collect())
    }

    /// Writes a step's keys and values, and nothing else.
    pub(super) fn write(&mut self, batch: &Batch) -> Result<(), DeviceError> {
        let (spec, b) = (self.shape.attention(), &mut self.backend);
        b.begin(batch, &self.kv, VOCAB)?;
        let x = b.embed(&self.embedding, batch)?;
        b.attention_input(1, &self.input, &spec, &self.rope, &x, &mut self.kv, batch)?;
        Ok(())
    }

    /// Samples from the normed embeddings of the batch's tokens.
    pub(super) fn sample(&mut self, batch: &Batch) -> Result<Vec<Result<Sampled, SampleError>>, DeviceError> {
        let pending = self.start(batch)?;
        self.backend.collect(pending)
    }

    /// Starts what [`Loaded::sample`] waits for.
    pub(super) fn start(&mut self, batch: &Batch) -> Result<B::Pending, DeviceError> {
        let b = &mut self.backend;
        b.begin(batch, &self.kv, VOCAB)?;
        let x = b.embed(&self.embedding, batch)?;
        let logits = b.logits(&self.ones, 1e-12, &self.copy_hidden, &x, batch)?;
        b.sample(&logits, batch)
    }
}
