//! A small layer, loaded into any backend.

use ctxserve_core::{Elements, Encoding, Matrix, TokenId};
use half::bf16;

use super::random::{Random, matrix};
use super::schedule::singles;
use crate::{
    AttentionInput, AttentionSpec, Backend, Batch, DeviceError, ExpertSpec, ExpertWeights, HeadNorms,
    KvDtype, KvGroup, KvPlan, KvSpec, Mlp, Moe, Role, RopeTable, SampleError, Sampled,
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
    /// Whether query and key heads have norms.
    pub(super) head_norms: bool,
    /// Whether attention's projections are biased.
    pub(super) biased: bool,
    /// Whether a dense layer follows attention, and not experts.
    pub(super) mlp: bool,
    pub(super) experts: usize,
    pub(super) top_k: usize,
    pub(super) inner: usize,
    pub(super) dense: Encoding,
    pub(super) expert: Encoding,
    /// Residual channels beyond those that take the heads.
    pub(super) extra: usize,
    /// Whether fused projections in NVFP4 have inputs of different factors.
    pub(super) unequal: bool,
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

    /// The stage that runs what follows attention.
    pub(super) fn feed_forward(&self) -> Stage {
        if self.mlp { Stage::Mlp } else { Stage::Experts }
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
    head_norms: [Vec<f32>; 2],
    feed_forward: FeedForward,
    copy_hidden: Matrix,
}

/// Host weights of what follows attention.
#[derive(Clone, Debug)]
enum FeedForward {
    Experts { router: (Matrix, Vec<f32>), experts: ExpertWeights },
    Mlp { gate_up: Matrix, down: Matrix },
}

impl FeedForward {
    fn new(shape: Shape, random: &mut Random) -> Result<Self, DeviceError> {
        let Shape { experts, inner, .. } = shape;
        let hidden = shape.hidden();
        if shape.mlp {
            // Gates are about as large as one, of either sign.
            return Ok(Self::Mlp {
                gate_up: fused(random.matrix(2 * inner, hidden, shape.dense)?, shape)?,
                down: silence(random.matrix(hidden, inner, shape.dense)?, 1, hidden)?,
            });
        }
        let gate_up = random.matrix(experts * 2 * inner, hidden, shape.expert)?;
        let down = silence(random.matrix(experts * hidden, inner, shape.expert)?, experts, hidden)?;
        let mut down_bias = random.vector(experts * hidden, 0.5);
        down_bias.iter_mut().step_by(hidden).for_each(|x| *x = 0.0);
        // Gates beyond the clamp on both sides.
        let gate_up_bias = random.vector(experts * 2 * inner, 9.0);
        Ok(Self::Experts {
            // Exact in every backend: near ties of the router see the difference.
            router: (random.matrix(experts, hidden, Encoding::Bf16)?, random.vector(experts, 1.0)),
            experts: ExpertWeights { gate_up, gate_up_bias, down, down_bias },
        })
    }
}

impl Fixture {
    pub(super) fn new(shape: Shape, random: &mut Random) -> Result<Self, DeviceError> {
        let (hidden, width) = (shape.hidden(), shape.width());
        let mut embedding = random.vector(VOCAB * hidden, 1.5);
        embedding.iter_mut().step_by(hidden).for_each(|x| *x = 1.0);
        embedding[POISON as usize * hidden..].fill(f32::NAN);
        let qkv_rows = width + 2 * shape.kv_heads * shape.head_dim;
        let qkv = fused(random.matrix(qkv_rows, hidden, shape.dense)?, shape)?;
        // Output row 0 is zero everywhere: channel 0 witnesses the scale.
        let copy_heads = copy(hidden, width, 1)?;
        let output = silence(random.matrix(hidden, width, shape.dense)?, 1, hidden)?;
        let mut output_bias = random.vector(hidden, 0.5);
        output_bias[0] = 0.0;
        let feed_forward = FeedForward::new(shape, random)?;
        let mut norm = |len: usize| random.vector(len, 0.5).into_iter().map(|x| 1.0 + x).collect();
        let (head_norms, norm) = ([norm(shape.head_dim), norm(shape.head_dim)], norm(hidden));
        Ok(Self {
            shape,
            // Exact in every backend, as the router is.
            embedding: matrix(
                VOCAB,
                hidden,
                Elements::Bf16(embedding.into_iter().map(bf16::from_f32).collect()),
            )?,
            norm,
            qkv: (qkv, random.vector(qkv_rows, 0.5)),
            copy_heads,
            output: (output, output_bias),
            sinks: random.vector(width / shape.head_dim, 3.0),
            head_norms,
            feed_forward,
            copy_hidden: copy(hidden, hidden, 0)?,
        })
    }

    /// Loads everything.
    pub(super) fn load<B: Backend>(&self, mut backend: B) -> Result<Loaded<B>, DeviceError> {
        let b = &mut backend;
        let (spec, attention) = (self.shape.spec(), self.shape.attention());
        let norm = b.load_vector(self.norm.clone())?;
        let after = match self.feed_forward.clone() {
            FeedForward::Experts { router: (router, bias), experts } => After::Experts(Moe {
                norm,
                router: b.load_matrix(router, Some(bias), Role::Router)?,
                experts: b.load_experts(experts, &spec)?,
                spec,
            }),
            FeedForward::Mlp { gate_up, down } => After::Mlp(Mlp {
                norm,
                gate_up: b.load_matrix(gate_up, None, Role::GateUp)?,
                down: b.load_matrix(down, None, Role::Down)?,
                norm_eps: spec.norm_eps,
            }),
        };
        let bias = |values: &Vec<f32>| self.shape.biased.then(|| values.clone());
        let [q, k] = self.head_norms.clone();
        let input = AttentionInput {
            norm: b.load_vector(self.norm.clone())?,
            qkv: b.load_matrix(self.qkv.0.clone(), bias(&self.qkv.1), Role::Qkv(&attention))?,
            head_norms: if self.shape.head_norms {
                Some(HeadNorms { q: b.load_vector(q)?, k: b.load_vector(k)? })
            } else {
                None
            },
        };
        let plan = self.shape.plan();
        let half = self.shape.head_dim / 2;
        let frequency = |i: usize| 10_000_f64.powf(-(i as f64) / half as f64);
        Ok(Loaded {
            embedding: b.load_matrix(self.embedding.clone(), None, Role::Embedding { head: false })?,
            input,
            copy_heads: b.load_matrix(self.copy_heads.clone(), None, Role::Output(&attention))?,
            output: b.load_matrix(self.output.0.clone(), bias(&self.output.1), Role::Output(&attention))?,
            sinks: if self.shape.sinks { Some(b.load_vector(self.sinks.clone())?) } else { None },
            after,
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

/// A matrix of several projections, whose inputs may have different factors.
fn fused(weights: Matrix, shape: Shape) -> Result<Matrix, DeviceError> {
    let (rows, cols) = (weights.rows(), weights.cols());
    let mut elements = weights.into_elements();
    if let (Elements::Nvfp4 { runs, .. }, true) = (&mut elements, shape.unequal)
        && let Some(input) = runs.last_mut().and_then(|run| run.input.as_mut())
    {
        *input *= 1.75;
    }
    matrix(rows, cols, elements)
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
    after: After<B>,
    ones: B::Vector,
    copy_hidden: B::Matrix,
    kv: B::Kv,
    rope: RopeTable,
    /// The layer under test.
    layer: usize,
}

/// What follows attention.
enum After<B: Backend> {
    Experts(Moe<B>),
    Mlp(Mlp<B>),
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
    /// The dense layer alone, attention left out.
    Mlp,
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
        if !matches!(stage, Stage::Embed | Stage::Experts | Stage::Mlp) {
            let q = b.attention_input(layer, &self.input, &spec, &self.rope, &x, &mut self.kv, batch)?;
            if stage == Stage::Queries {
                b.attention_output(&self.copy_heads, &q, &mut x)?;
            } else {
                let heads = b.attention(layer, &spec, self.sinks.as_ref(), &q, &self.kv, batch)?;
                let output = if stage == Stage::Attention { &self.copy_heads } else { &self.output };
                b.attention_output(output, &heads, &mut x)?;
            }
        }
        match (stage, &self.after) {
            (Stage::Next { told: true }, After::Experts(moe)) => {
                b.experts_before(moe, &mut x, (&self.input.norm, spec.norm_eps))?;
            }
            (Stage::Experts | Stage::Mlp | Stage::Layer | Stage::Next { .. }, after) => match after {
                After::Experts(moe) => b.experts(moe, &mut x)?,
                After::Mlp(mlp) => b.mlp(mlp, &mut x)?,
            },
            (Stage::Embed | Stage::Queries | Stage::Attention | Stage::Output, _) => {}
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
