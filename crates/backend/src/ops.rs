//! The ops.

use ctxserve_core::{Encoding, Matrix};
use thiserror::Error;

use crate::{Batch, KvPlan, SampleError, Sampled};

/// The device or its memory failed. Not a request's fault and not recoverable by one.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{op}: {what}")]
pub struct DeviceError {
    /// The op that failed.
    pub op: &'static str,
    /// The device's own words.
    pub what: String,
}

impl DeviceError {
    /// Builds one.
    pub fn new(op: &'static str, what: impl Into<String>) -> Self {
        Self { op, what: what.into() }
    }
}

/// Rotary angles: `cos` and `sin` of a position are `mscale * cos(position * inv_freq[i])` and the same with
/// sine; halves of a head rotate against each other (NeoX).
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    /// `head_dim / 2` inverse frequencies, radians per position.
    pub inv_freq: Vec<f64>,
    /// Factor on cos and sin (YaRN's attention scaling); 1 without YaRN.
    pub mscale: f64,
}

/// How a layer attends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads; query head `h` reads key/value head `h / (heads / kv_heads)`.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Factor on `q . k`.
    pub scale: f32,
    /// Keys seen, the query's own included; `None` is full causal.
    pub window: Option<usize>,
    /// RMSNorm epsilon of the norm before it.
    pub norm_eps: f32,
}

/// What a matrix is for, so that a device can lay it out for that.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Role<'a> {
    /// The table of [`Backend::embed`]; with `head`, also the LM head of [`Backend::logits`].
    Embedding {
        /// Whether it is both.
        head: bool,
    },
    /// [`AttentionInput::qkv`] of layers that attend so.
    Qkv(&'a AttentionSpec),
    /// The output projection of layers that attend so.
    Output(&'a AttentionSpec),
    /// [`Moe::router`].
    Router,
    /// [`Mlp::gate_up`].
    GateUp,
    /// [`Mlp::down`].
    Down,
    /// The LM head of [`Backend::logits`].
    Head,
}

/// Weights of norm + QKV.
#[derive(Debug)]
pub struct AttentionInput<B: Backend + ?Sized> {
    /// RMSNorm weight `[hidden]`.
    pub norm: B::Vector,
    /// Rows q, then k, then v: `[(heads + 2 * kv_heads) * head_dim, hidden]`, biased or not.
    pub qkv: B::Matrix,
    /// Norms of each query and key head before they are rotated, with the epsilon of the layer's norm (Qwen3).
    pub head_norms: Option<HeadNorms<B>>,
}

/// RMSNorm weights `[head_dim]`, shared by the heads of a layer.
#[derive(Debug)]
pub struct HeadNorms<B: Backend + ?Sized> {
    /// Of query heads.
    pub q: B::Vector,
    /// Of key heads.
    pub k: B::Vector,
}

/// Weights of norm + dense SwiGLU.
#[derive(Debug)]
pub struct Mlp<B: Backend + ?Sized> {
    /// RMSNorm weight `[hidden]`.
    pub norm: B::Vector,
    /// `[2 * inner, hidden]`: all rows of gate, then all rows of up.
    pub gate_up: B::Matrix,
    /// `[hidden, inner]`.
    pub down: B::Matrix,
    /// RMSNorm epsilon.
    pub norm_eps: f32,
}

/// Static facts of a mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertSpec {
    /// Experts.
    pub experts: usize,
    /// Experts per token; their logits alone enter the softmax.
    pub top_k: usize,
    /// Hidden width.
    pub hidden: usize,
    /// Width between the two products.
    pub inner: usize,
    /// `a` of `gate * sigmoid(a * gate) * (up + 1)`.
    pub alpha: f32,
    /// Clamp: `gate <= limit`, `-limit <= up <= limit`.
    pub limit: f32,
    /// RMSNorm epsilon of the norm before it.
    pub norm_eps: f32,
}

/// Expert weights on the host.
#[derive(Clone, Debug)]
pub struct ExpertWeights {
    /// `[experts * 2 * inner, hidden]`: of each expert, row `2i` is gate `i` and row `2i + 1` is up `i`.
    pub gate_up: Matrix,
    /// `[experts * 2 * inner]`, in the same order.
    pub gate_up_bias: Vec<f32>,
    /// `[experts * hidden, inner]`.
    pub down: Matrix,
    /// `[experts * hidden]`, added inside the routing weight.
    pub down_bias: Vec<f32>,
}

/// Weights of norm + router + experts.
#[derive(Debug)]
pub struct Moe<B: Backend + ?Sized> {
    /// RMSNorm weight `[hidden]`.
    pub norm: B::Vector,
    /// `[experts, hidden]`, biased.
    pub router: B::Matrix,
    /// The experts.
    pub experts: B::Experts,
    /// Their static facts.
    pub spec: ExpertSpec,
}

/// A device. Every op is batch-wide; rows never influence one another except through attention within
/// one sequence, so an answer does not depend on its neighbours.
pub trait Backend: Send + 'static {
    /// A matrix with an optional bias, laid out as the device likes it.
    type Matrix: Send;
    /// A stack of experts.
    type Experts: Send;
    /// A float vector: norm weights, sinks.
    type Vector: Send;
    /// The KV pools.
    type Kv: Send;
    /// The residual stream `[rows, hidden]`.
    type Hidden;
    /// Rotated queries, or attention's output: `[rows, heads * head_dim]`.
    type Heads;
    /// `[logit rows, vocab]`.
    type Logits;
    /// A step that is under way: what [`Backend::collect`] waits for. Dropping one uncollected is harmless.
    type Pending: Send;

    /// One line for logs: device, instruction set or compute capability, threads.
    fn describe(&self) -> String;

    /// How many steps may be under way at once, at least 1: started by [`Backend::begin`] and not yet collected. Steps
    /// take effect one after the other in the order they were started, so pages that a later step reuses are free
    /// for it when it runs. A backend that says 1 is never given a [`crate::SequenceSlice::feed`].
    fn steps_in_flight(&self) -> usize {
        1
    }

    /// Whether matrices of this encoding are taken as they are.
    fn accepts(&self, encoding: Encoding) -> bool;

    /// Takes a matrix `[out, in]` and its bias `[out]`.
    ///
    /// # Errors
    /// Out of memory, an encoding that [`Backend::accepts`] refuses, or a shape that contradicts the role.
    fn load_matrix(
        &mut self,
        matrix: Matrix,
        bias: Option<Vec<f32>>,
        role: Role<'_>,
    ) -> Result<Self::Matrix, DeviceError>;

    /// Takes a vector.
    ///
    /// # Errors
    /// Out of memory.
    fn load_vector(&mut self, values: Vec<f32>) -> Result<Self::Vector, DeviceError>;

    /// Takes a stack of experts.
    ///
    /// # Errors
    /// Out of memory, shapes that contradict `spec`, or an encoding that [`Backend::accepts`] refuses.
    fn load_experts(
        &mut self,
        weights: ExpertWeights,
        spec: &ExpertSpec,
    ) -> Result<Self::Experts, DeviceError>;

    /// Takes the memory of the KV pools, once.
    ///
    /// # Errors
    /// Out of memory.
    fn allocate_kv(&mut self, plan: &KvPlan) -> Result<Self::Kv, DeviceError>;

    /// Starts a step: checks the batch against the pools and uploads it. Later ops of the step get the same batch,
    /// which is gone after the last of them. A step that was started and never sampled is abandoned.
    ///
    /// # Errors
    /// A batch that breaks [`Batch::check`], or a device fault.
    fn begin(&mut self, batch: &Batch, kv: &Self::Kv, vocab: usize) -> Result<(), DeviceError>;

    /// Rows of the table `[vocab, hidden]` for the batch's tokens.
    ///
    /// # Errors
    /// A device fault.
    fn embed(&mut self, table: &Self::Matrix, batch: &Batch) -> Result<Self::Hidden, DeviceError>;

    /// `RMSNorm(x)` times QKV, plus bias; q and k rotated; k and v written to the layer's pages. Returns q.
    ///
    /// # Errors
    /// A device fault.
    #[allow(clippy::too_many_arguments)]
    fn attention_input(
        &mut self,
        layer: usize,
        weights: &AttentionInput<Self>,
        spec: &AttentionSpec,
        rope: &RopeTable,
        x: &Self::Hidden,
        kv: &mut Self::Kv,
        batch: &Batch,
    ) -> Result<Self::Heads, DeviceError>;

    /// Called in the last layer once its keys and values are written, where some rows have no logits: nothing needs those rows any
    /// more. A device may drop them from `q` and `x`; the layer's other ops and the logits are then those of the rows that are left.
    ///
    /// # Errors
    /// A device fault.
    fn narrow(
        &mut self,
        _layer: usize,
        _q: &mut Self::Heads,
        _x: &mut Self::Hidden,
        _batch: &Batch,
    ) -> Result<(), DeviceError> {
        Ok(())
    }

    /// Causal attention of each row over its sequence's pages. `sinks` is one logit per query head, unscaled,
    /// that joins the softmax denominator and has no value.
    ///
    /// # Errors
    /// A device fault.
    fn attention(
        &mut self,
        layer: usize,
        spec: &AttentionSpec,
        sinks: Option<&Self::Vector>,
        q: &Self::Heads,
        kv: &Self::Kv,
        batch: &Batch,
    ) -> Result<Self::Heads, DeviceError>;

    /// `x += heads * O^T + bias`.
    ///
    /// # Errors
    /// A device fault.
    fn attention_output(
        &mut self,
        output: &Self::Matrix,
        heads: &Self::Heads,
        x: &mut Self::Hidden,
    ) -> Result<(), DeviceError>;

    /// `x += MoE(RMSNorm(x))`: top-k routing, softmax over the chosen logits, clamped SwiGLU, weighted sum.
    ///
    /// # Errors
    /// A device fault.
    fn experts(&mut self, moe: &Moe<Self>, x: &mut Self::Hidden) -> Result<(), DeviceError>;

    /// [`Backend::experts`], told the norm (weight and epsilon) that the next op begins with, which a device may compute along.
    ///
    /// # Errors
    /// A device fault.
    fn experts_before(
        &mut self,
        moe: &Moe<Self>,
        x: &mut Self::Hidden,
        _next: (&Self::Vector, f32),
    ) -> Result<(), DeviceError> {
        self.experts(moe, x)
    }

    /// `x += down * (silu(gate) * up)` of `RMSNorm(x)`.
    ///
    /// # Errors
    /// A device fault.
    fn mlp(&mut self, mlp: &Mlp<Self>, x: &mut Self::Hidden) -> Result<(), DeviceError>;

    /// `RMSNorm(x)` times the LM head, for the batch's logit rows only.
    ///
    /// # Errors
    /// A device fault.
    fn logits(
        &mut self,
        norm: &Self::Vector,
        norm_eps: f32,
        head: &Self::Matrix,
        x: &Self::Hidden,
        batch: &Batch,
    ) -> Result<Self::Logits, DeviceError>;

    /// Starts picking one token per logit row, and with that ends the step: the last op of every step, also of one
    /// that samples nothing. What a row picks stays on the device for the feeds of the next step; a row that
    /// cannot pick leaves some id of the vocabulary there, and whatever is computed from it is thrown away.
    ///
    /// # Errors
    /// A device fault.
    fn sample(&mut self, logits: &Self::Logits, batch: &Batch) -> Result<Self::Pending, DeviceError>;

    /// Waits until a step has ended, and answers one outcome per sampling row of its batch. A row can fail without
    /// harm to the others. Steps are collected in the order they were started.
    ///
    /// # Errors
    /// A device fault.
    fn collect(&mut self, pending: Self::Pending) -> Result<Vec<Result<Sampled, SampleError>>, DeviceError>;

    /// A whole step: `forward` issues its ops up to the logits, [`Backend::begin`] included. A device may record what is
    /// issued and replay it for later batches of the same shape without calling `forward` again, so `forward` must
    /// depend on nothing but the batch.
    ///
    /// # Errors
    /// What the ops return.
    #[allow(clippy::type_complexity, reason = "a name for the closure's type would hide what it is")]
    fn step(
        &mut self,
        kv: &mut Self::Kv,
        batch: &Batch,
        forward: &mut dyn FnMut(&mut Self, &mut Self::Kv) -> Result<Self::Logits, DeviceError>,
    ) -> Result<Self::Pending, DeviceError> {
        let logits = forward(self, kv)?;
        self.sample(&logits, batch)
    }

    /// Copies logits `[logit rows, vocab]` to the host, for tests and self-checks.
    ///
    /// # Errors
    /// A device fault.
    fn read_logits(&mut self, logits: &Self::Logits) -> Result<Vec<f32>, DeviceError>;
}
