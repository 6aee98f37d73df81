//! The device as the model sees it.

use std::cell::Cell;
use std::collections::HashMap;

use ctxserve_backend::{
    AttentionInput, AttentionSpec, Backend, Batch, DeviceError, ExpertSpec, ExpertWeights, KvPlan, Mlp, Moe,
    Role, RopeTable, SampleError, Sampled,
};
use ctxserve_core::{Encoding, Matrix};

use crate::driver::{Buffer, Device, Graph};
use crate::kernels::Kernels;
use crate::kv::{CudaKv, padded_head};
use crate::layers::RawHeads;
use crate::sampler::{Pending, Sampler};
use crate::step::{Capacity, Description, Extent, Shape};
use crate::weights::{CudaExperts, CudaMatrix, CudaVector, Packer, without_nvfp4};
use crate::workspace::{Widths, Workspace};

/// Rows that a decode step is recorded for; a batch takes the next larger one.
const BUCKETS: [usize; 11] = [1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256];

/// What the operator decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaOptions {
    /// Most rows of a step.
    pub max_rows: usize,
    /// Most sequences of a step.
    pub max_sequences: usize,
    /// Longest sequence.
    pub max_context: usize,
    /// Whether decode steps are recorded and replayed as graphs.
    pub graphs: bool,
    /// Whether inputs of NVFP4 products are rounded to NVFP4 with the checkpoint's factors.
    pub nvfp4_activations: bool,
}

/// `Backend` on one CUDA device.
#[derive(Debug)]
pub struct CudaBackend {
    device: Device,
    options: CudaOptions,
    kernels: Kernels,
    packer: Packer,
    widths: Widths,
    state: Option<State>,
    /// What the grids of the step being issued are made for.
    pub(crate) extent: Extent,
    /// Whether the step being issued was described already: [`Backend::step`] does so before it records.
    described: bool,
    /// The norm that the op before this one left in the workspace, if it did.
    pub(crate) normed: Option<NormKey>,
    #[cfg(feature = "fault-injection")]
    faults: crate::fault::Faults,
}

/// What exists once the KV cache does.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) description: Description,
    pub(crate) work: Workspace,
    pub(crate) widths: Widths,
    pub(crate) sampler: Sampler,
    /// Most rows of a step whose dense layers go through the matrix-vector kernels.
    pub(crate) few_rows: usize,
    pub(crate) rope: Option<(RopeTable, Buffer<f32>)>,
    /// Whether the workspace has the rotations of the step's positions.
    pub(crate) turned: Cell<bool>,
    /// By rows. A bucket runs as it is when it first comes, which loads its kernels; it is recorded when it comes again.
    graphs: HashMap<usize, Option<Graph>>,
}

/// A norm: the address of its weight, and the bits of its epsilon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NormKey(u64, u32);

impl NormKey {
    pub(crate) fn new(weight: &Buffer<f32>, eps: f32) -> Self {
        Self(weight.address(), eps.to_bits())
    }
}

/// The residual stream, of which there is one.
#[derive(Debug)]
pub struct HiddenRows(());

/// Heads of the one step in the making.
#[derive(Debug)]
pub enum HeadRows {
    /// Queries, keys and values as they were multiplied.
    Raw(RawHeads),
    /// Rotated queries, whose keys and values are in the cache.
    Queries,
    /// Rotated queries, with rotated keys, and values, beside them.
    Apart,
    /// Attention's output.
    Attended,
}

/// Logits in the workspace.
#[derive(Clone, Copy, Debug)]
pub struct LogitRows {
    rows: usize,
    vocab: usize,
}

impl CudaBackend {
    /// Loads the kernels onto a device.
    ///
    /// # Errors
    /// No code for this device.
    pub fn new(device: Device, options: CudaOptions) -> Result<Self, DeviceError> {
        let kernels = Kernels::load(&device)?;
        let packer = Packer::new(&device, kernels.experts, options.nvfp4_activations)?;
        let (widths, extent) = (Widths::default(), Extent::default());
        Ok(Self {
            device,
            options,
            kernels,
            packer,
            widths,
            state: None,
            extent,
            described: false,
            normed: None,
            #[cfg(feature = "fault-injection")]
            faults: crate::fault::Faults::new()?,
        })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What an op needs of the step in the making.
    pub(crate) fn step_parts(
        &mut self,
        op: &'static str,
    ) -> Result<(&Device, &mut Kernels, &State, Extent), DeviceError> {
        let Some(state) = &self.state else {
            return Err(DeviceError::new(op, "the KV cache was never allocated"));
        };
        // Every op may change what was normed.
        self.normed = None;
        Ok((&self.device, &mut self.kernels, state, self.extent))
    }

    /// Puts the rotary frequencies on the device; every layer of a model has the same.
    pub(crate) fn load_rope(&mut self, rope: &RopeTable) -> Result<(), DeviceError> {
        const OP: &str = "attention_input";
        let Some(state) = &mut self.state else {
            return Err(DeviceError::new(OP, "the KV cache was never allocated"));
        };
        if state.rope.as_ref().is_some_and(|(known, _)| known == rope) {
            return Ok(());
        }
        let half = padded_head(OP, 2 * rope.inv_freq.len())?.max(state.widths.head()) / 2;
        // The angle is rounded to f32 before its cosine is taken, as in the reference.
        let mut values: Vec<f32> = rope.inv_freq.iter().map(|&f| f as f32).collect();
        values.resize(half, 0.0);
        state.turned.set(false);
        state.rope = Some((rope.clone(), self.device.upload(&values)?));
        Ok(())
    }

    /// The rows that a step is recorded for, if it can be.
    fn bucket(&self, shape: &Shape) -> Option<usize> {
        let most = self.options.max_sequences.min(self.options.max_rows);
        let fits = self.options.graphs && shape.is_decode() && shape.logits == shape.rows && shape.rows > 0;
        BUCKETS.into_iter().find(|&rows| rows >= shape.rows && rows <= most).filter(|_| fits)
    }

    fn check(&self, batch: &Batch, kv: &CudaKv, vocab: usize) -> Result<(), DeviceError> {
        #[cfg(feature = "fault-injection")]
        let batch = &self.faults.batch(batch);
        let plan = kv.plan();
        batch.check(&plan.spec, &plan.pages, vocab).map_err(|e| DeviceError::new("begin", e.to_string()))
    }

    /// Issues the description of a batch and sets the extent.
    fn describe_batch(&mut self, batch: &Batch, bucket: Option<usize>) -> Result<(), DeviceError> {
        let Some(state) = &mut self.state else {
            return Err(DeviceError::new("begin", "the KV cache was never allocated"));
        };
        state.turned.set(false);
        let shape = state.description.begin(&self.device, batch, &self.kernels.heads.prefill)?;
        self.extent = match bucket {
            Some(rows) => Extent { rows, decode: rows, prefill: 0, logits: rows, narrowed: false },
            None => Extent::from(shape),
        };
        Ok(())
    }

    fn issue_sampling(&mut self) -> Result<(), DeviceError> {
        let logits = self.extent.logits;
        let Some(state) = &mut self.state else {
            return Err(DeviceError::new("sample", "the KV cache was never allocated"));
        };
        state.sampler.issue(&state.work.logits, logits)
    }
}

impl Backend for CudaBackend {
    type Matrix = CudaMatrix;
    type Experts = CudaExperts;
    type Vector = CudaVector;
    type Kv = CudaKv;
    type Hidden = HiddenRows;
    type Heads = HeadRows;
    type Logits = LogitRows;
    type Pending = Pending;

    fn describe(&self) -> String {
        let facts = self.device.facts();
        let (major, minor) = facts.capability;
        let rounded = if self.options.nvfp4_activations { ", NVFP4 activations" } else { "" };
        format!("{} (compute capability {major}.{minor}){rounded}", facts.name)
    }

    fn steps_in_flight(&self) -> usize {
        2
    }

    fn accepts(&self, encoding: Encoding) -> bool {
        matches!(encoding, Encoding::Bf16 | Encoding::Mxfp4 | Encoding::Nvfp4)
    }

    fn load_matrix(
        &mut self,
        matrix: Matrix,
        bias: Option<Vec<f32>>,
        role: Role<'_>,
    ) -> Result<CudaMatrix, DeviceError> {
        let loaded = self.packer.matrix(&self.device, matrix, bias, role)?;
        let widths = &mut self.widths;
        widths.nvfp4 |= loaded.nvfp4.is_some();
        let roundings = loaded.rounding.as_ref().map_or(0, |rounding| rounding.factors.len());
        widths.roundings = widths.roundings.max(roundings);
        match role {
            Role::Qkv(spec) => {
                widths.hidden = widths.hidden.max(loaded.input_cols());
                widths.heads = widths.heads.max(spec.heads);
                widths.kv_heads = widths.kv_heads.max(spec.kv_heads);
                widths.head_dim = widths.head_dim.max(spec.head_dim);
            }
            Role::Embedding { head: true } | Role::Head => {
                widths.hidden = widths.hidden.max(loaded.cols);
                widths.vocab = widths.vocab.max(loaded.rows);
            }
            Role::Down => widths.dense = widths.dense.max(loaded.cols),
            Role::Embedding { head: false } | Role::Output(_) | Role::Router | Role::GateUp => {}
        }
        Ok(loaded)
    }

    fn load_vector(&mut self, values: Vec<f32>) -> Result<CudaVector, DeviceError> {
        self.packer.vector(&self.device, values)
    }

    fn load_experts(
        &mut self,
        weights: ExpertWeights,
        spec: &ExpertSpec,
    ) -> Result<CudaExperts, DeviceError> {
        let ExpertWeights { gate_up, down, .. } = weights;
        let packed = [&gate_up, &down].iter().any(|matrix| matrix.encoding() == Encoding::Nvfp4);
        if packed && self.options.nvfp4_activations {
            return Err(DeviceError::new(
                "load_experts",
                "activations of experts are not quantised to NVFP4",
            ));
        }
        // There are kernels for dense layers in NVFP4 only. Packed anew in MXFP4 the experts would lose as much again as they did once.
        let (gate_up, down) = (without_nvfp4(gate_up)?, without_nvfp4(down)?);
        let weights = ExpertWeights { gate_up, down, ..weights };
        let loaded = self.packer.experts(&self.device, weights, spec)?;
        let widths = &mut self.widths;
        widths.hidden = widths.hidden.max(loaded.hidden);
        widths.inner = widths.inner.max(loaded.inner);
        widths.experts = widths.experts.max(spec.experts);
        widths.top_k = widths.top_k.max(spec.top_k);
        Ok(loaded)
    }

    fn allocate_kv(&mut self, plan: &KvPlan) -> Result<CudaKv, DeviceError> {
        self.packer.finish();
        #[cfg(feature = "fault-injection")]
        self.faults.allocation(&self.device)?;
        let kv = CudaKv::new(&self.device, plan)?;
        self.kernels.turn_to_heads(&self.device, self.widths.head())?;
        let (rows, sequences) = (self.options.max_rows, self.options.max_sequences);
        let capacity = Capacity::new(rows, sequences, self.options.max_context);
        let widths = self.widths;
        self.state = Some(State {
            description: Description::new(&self.device, capacity, plan)?,
            work: Workspace::new(&self.device, &widths, capacity)?,
            widths,
            sampler: Sampler::new(&self.device, sequences, widths.vocab, widths.stride())?,
            few_rows: widths.few_rows(self.device.facts()),
            rope: None,
            turned: Cell::new(false),
            graphs: HashMap::new(),
        });
        self.device.synchronize()?;
        Ok(kv)
    }

    fn begin(&mut self, batch: &Batch, kv: &CudaKv, vocab: usize) -> Result<(), DeviceError> {
        self.check(batch, kv, vocab)?;
        if self.described {
            return Ok(());
        }
        self.describe_batch(batch, None)
    }

    fn embed(&mut self, table: &CudaMatrix, _batch: &Batch) -> Result<HiddenRows, DeviceError> {
        self.issue_embed(table)?;
        Ok(HiddenRows(()))
    }

    fn attention_input(
        &mut self,
        layer: usize,
        weights: &AttentionInput<Self>,
        spec: &AttentionSpec,
        rope: &RopeTable,
        _x: &HiddenRows,
        kv: &mut CudaKv,
        _batch: &Batch,
    ) -> Result<HeadRows, DeviceError> {
        self.issue_attention_input(layer, weights, spec, rope, kv)
    }

    fn narrow(
        &mut self,
        layer: usize,
        q: &mut HeadRows,
        _x: &mut HiddenRows,
        _batch: &Batch,
    ) -> Result<(), DeviceError> {
        self.issue_narrow(layer, q)
    }

    fn attention(
        &mut self,
        layer: usize,
        spec: &AttentionSpec,
        sinks: Option<&CudaVector>,
        q: &HeadRows,
        kv: &CudaKv,
        _batch: &Batch,
    ) -> Result<HeadRows, DeviceError> {
        self.issue_attention(layer, spec, sinks, q, kv)?;
        Ok(HeadRows::Attended)
    }

    fn attention_output(
        &mut self,
        output: &CudaMatrix,
        heads: &HeadRows,
        _x: &mut HiddenRows,
    ) -> Result<(), DeviceError> {
        self.issue_attention_output(output, heads)
    }

    fn experts(&mut self, moe: &Moe<Self>, _x: &mut HiddenRows) -> Result<(), DeviceError> {
        self.issue_experts(moe, None)
    }

    fn experts_before(
        &mut self,
        moe: &Moe<Self>,
        _x: &mut HiddenRows,
        (norm, eps): (&CudaVector, f32),
    ) -> Result<(), DeviceError> {
        self.issue_experts(moe, Some(norm.as_norm(eps)))
    }

    fn mlp(&mut self, mlp: &Mlp<Self>, _x: &mut HiddenRows) -> Result<(), DeviceError> {
        self.issue_mlp(mlp)
    }

    fn logits(
        &mut self,
        norm: &CudaVector,
        norm_eps: f32,
        head: &CudaMatrix,
        _x: &HiddenRows,
        batch: &Batch,
    ) -> Result<LogitRows, DeviceError> {
        self.issue_logits(norm, norm_eps, head)?;
        Ok(LogitRows { rows: batch.logit_rows().count(), vocab: head.rows })
    }

    fn sample(&mut self, _logits: &LogitRows, batch: &Batch) -> Result<Pending, DeviceError> {
        if let Some(state) = &mut self.state {
            state.sampler.upload(batch)?;
        }
        self.issue_sampling()?;
        self.download()
    }

    fn collect(&mut self, pending: Pending) -> Result<Vec<Result<Sampled, SampleError>>, DeviceError> {
        let outcome = pending.wait();
        self.device.report_times()?;
        outcome
    }

    fn step(
        &mut self,
        kv: &mut CudaKv,
        batch: &Batch,
        forward: &mut dyn FnMut(&mut Self, &mut CudaKv) -> Result<LogitRows, DeviceError>,
    ) -> Result<Pending, DeviceError> {
        #[cfg(feature = "fault-injection")]
        self.faults.step(&self.device)?;
        let Some(rows) = self.bucket(&Shape::of(batch)) else {
            let logits = forward(self, kv)?;
            return self.sample(&logits, batch);
        };
        self.check(batch, kv, self.widths.vocab)?;
        self.describe_batch(batch, Some(rows))?;
        let Some(state) = &mut self.state else {
            return Err(DeviceError::new("begin", "the KV cache was never allocated"));
        };
        state.sampler.upload(batch)?;
        match state.graphs.get(&rows) {
            Some(Some(graph)) => graph.launch()?,
            seen => {
                let record = seen.is_some();
                self.described = true;
                let issued = self.issue_or_record(record, kv, forward);
                self.described = false;
                let graph = issued?;
                if let Some(state) = &mut self.state {
                    state.graphs.insert(rows, graph);
                }
            }
        }
        self.download()
    }

    fn read_logits(&mut self, logits: &LogitRows) -> Result<Vec<f32>, DeviceError> {
        let Some(state) = &self.state else {
            return Err(DeviceError::new("read_logits", "the KV cache was never allocated"));
        };
        let stride = state.widths.stride();
        let padded = state.work.logits.read(0, logits.rows * stride)?;
        Ok(padded.chunks(stride.max(1)).flat_map(|row| row[..logits.vocab].iter().copied()).collect())
    }
}

impl CudaBackend {
    /// Issues a whole step, or records it and then issues the recording.
    fn issue_or_record(
        &mut self,
        record: bool,
        kv: &mut CudaKv,
        forward: &mut dyn FnMut(&mut Self, &mut CudaKv) -> Result<LogitRows, DeviceError>,
    ) -> Result<Option<Graph>, DeviceError> {
        if !record {
            forward(self, kv)?;
            self.issue_sampling()?;
            return Ok(None);
        }
        let device = self.device.clone();
        let graph = device.capture(|| {
            forward(self, kv)?;
            self.issue_sampling()
        })?;
        graph.launch()?;
        Ok(Some(graph))
    }

    fn download(&mut self) -> Result<Pending, DeviceError> {
        match &mut self.state {
            Some(state) => state.sampler.download(),
            None => Err(DeviceError::new("sample", "the KV cache was never allocated")),
        }
    }
}
