//! The backend: what it owns, and which op lives in which file.

use std::num::NonZeroUsize;

use ctxserve_backend::{
    AttentionInput, AttentionSpec, Backend, Batch, DeviceError, ExpertSpec, ExpertWeights, KvPlan, Mlp, Moe,
    Role, RopeTable, SampleError, Sampled,
};
use ctxserve_core::{Elements, Encoding, Matrix, Nvfp4Run};
use rayon::ThreadPool;

use crate::isa::Isa;
use crate::kv::CpuKv;
use crate::linear::{CpuMatrix, Weights};
use crate::ops::{self, CpuExperts};
use crate::packed::Packed;
use crate::peaks::InputPeaks;
use crate::rows::Rows;

/// How products with weights are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// f32 activations, weights as they are stored and decoded to f32 in registers, f32 accumulation.
    #[default]
    Exact,
    /// Activations quantised to int8 per 32 inputs, FP4 codes used as integers, other matrices of more than 256
    /// rows (all but routers) quantised to int8 at load. Faster, about 1 % relative error per product.
    Int8,
}

/// What activations of products with NVFP4 matrices are rounded to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ActivationQuant {
    /// Nothing: weights alone are quantised.
    #[default]
    None,
    /// NVFP4 with the checkpoint's input factors, as hardware with FP4 products computes. Slower than without: it is there to
    /// tell what such hardware would answer.
    Nvfp4,
}

/// How to build a [`CpuBackend`].
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuOptions {
    /// Worker threads; `None` is one per available core.
    pub threads: Option<NonZeroUsize>,
    /// See [`Precision`].
    pub precision: Precision,
    /// See [`ActivationQuant`].
    pub activations: ActivationQuant,
    /// Instructions to use instead of the best ones; ignored where the machine lacks them.
    pub isa: Option<Isa>,
}

/// The CPU as a device.
#[derive(Debug)]
pub struct CpuBackend {
    pub(crate) fast: Option<Fast>,
    activations: ActivationQuant,
    peaks: Option<InputPeaks>,
}

/// What the kernels need: threads, instructions, precision.
#[derive(Debug)]
pub(crate) struct Fast {
    pub(crate) pool: ThreadPool,
    pub(crate) threads: usize,
    pub(crate) isa: Isa,
    pub(crate) int8: bool,
}

/// Matrices of at most this many rows stay exact: a router's near ties are worth more than its bytes.
const EXACT_ROWS: usize = 256;

impl CpuBackend {
    /// The serving backend.
    ///
    /// # Errors
    /// The operating system gives no threads, or options exclude one another.
    pub fn new(options: CpuOptions) -> Result<Self, DeviceError> {
        let CpuOptions { precision, activations, .. } = options;
        if precision == Precision::Int8 && activations == ActivationQuant::Nvfp4 {
            return Err(DeviceError::new("cpu", "activations are either int8 or NVFP4"));
        }
        let threads = options
            .threads
            .map_or_else(|| std::thread::available_parallelism().map_or(1, Into::into), Into::into);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|index| format!("ctxserve-cpu-{index}"))
            .build()
            .map_err(|e| DeviceError::new("cpu", e.to_string()))?;
        let asked = options.isa.filter(|isa| Isa::available().contains(isa));
        let isa = asked.unwrap_or_else(Isa::detect);
        let fast = Some(Fast { pool, threads, isa, int8: precision == Precision::Int8 });
        Ok(Self { fast, activations, peaks: None })
    }

    /// The definitions: plain loops on one thread.
    pub fn plain() -> Self {
        Self::plain_with(ActivationQuant::None)
    }

    /// The same, with activations rounded.
    pub fn plain_with(activations: ActivationQuant) -> Self {
        Self { fast: None, activations, peaks: None }
    }

    /// From now on, keeps the largest input of each matrix that is loaded. Experts are not observed, their router is.
    pub fn observe_inputs(&mut self) -> InputPeaks {
        self.peaks.get_or_insert_default().clone()
    }

    /// The factors by which inputs of `matrix` are to be quantised, with the rows that each holds for; empty where they
    /// are not.
    pub(crate) fn input_factors(&self, matrix: &Matrix) -> Result<Vec<(usize, f32)>, DeviceError> {
        let Elements::Nvfp4 { runs, .. } = matrix.elements() else { return Ok(Vec::new()) };
        if self.activations == ActivationQuant::None {
            return Ok(Vec::new());
        }
        let factor = |run: &Nvfp4Run| {
            let what = "its inputs were not calibrated for NVFP4: the checkpoint has no factors for them";
            Ok((run.rows, run.input.ok_or_else(|| DeviceError::new("load_matrix", what))?))
        };
        runs.iter().map(factor).collect()
    }

    /// Packs for the kernels, or keeps as it is for the plain loops.
    pub(crate) fn keep(&self, matrix: Matrix, groups: usize, int8: bool) -> Result<Weights, DeviceError> {
        match &self.fast {
            None => Ok(Weights::Plain(matrix)),
            Some(fast) => fast.pool.install(|| Packed::new(matrix, groups, int8)).map(Weights::Packed),
        }
    }
}

impl Backend for CpuBackend {
    type Matrix = CpuMatrix;
    type Experts = CpuExperts;
    type Vector = Vec<f32>;
    type Kv = CpuKv;
    type Hidden = Rows;
    type Heads = Rows;
    type Logits = Rows;
    type Pending = Vec<Result<Sampled, SampleError>>;

    fn describe(&self) -> String {
        match &self.fast {
            None => "CPU, plain loops".to_owned(),
            Some(Fast { threads, isa, int8, .. }) => {
                let precision = match self.activations {
                    ActivationQuant::Nvfp4 => "NVFP4 activations",
                    ActivationQuant::None if *int8 => "int8 activations",
                    ActivationQuant::None => "exact",
                };
                format!("CPU, {isa}, {threads} threads, {precision}")
            }
        }
    }

    fn accepts(&self, _encoding: Encoding) -> bool {
        true
    }

    fn load_matrix(
        &mut self,
        matrix: Matrix,
        bias: Option<Vec<f32>>,
        role: Role<'_>,
    ) -> Result<CpuMatrix, DeviceError> {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        if rows == 0 || cols == 0 || bias.as_ref().is_some_and(|bias| bias.len() != rows) {
            return Err(DeviceError::new(
                "load_matrix",
                format!("no matrix, or no bias for [{rows}, {cols}]"),
            ));
        }
        let int8 = self.fast.as_ref().is_some_and(|fast| fast.int8) && rows > EXACT_ROWS;
        let input_factors = self.input_factors(&matrix)?;
        let peak = self.peaks.as_ref().map(|peaks| peaks.add(role));
        Ok(CpuMatrix { weights: self.keep(matrix, 1, int8)?, bias, input_factors, peak, rows, cols })
    }

    fn load_vector(&mut self, values: Vec<f32>) -> Result<Vec<f32>, DeviceError> {
        Ok(values)
    }

    fn load_experts(&mut self, weights: ExpertWeights, spec: &ExpertSpec) -> Result<CpuExperts, DeviceError> {
        CpuExperts::load(self, weights, spec)
    }

    fn allocate_kv(&mut self, plan: &KvPlan) -> Result<CpuKv, DeviceError> {
        CpuKv::new(plan)
    }

    fn begin(&mut self, batch: &Batch, kv: &CpuKv, vocab: usize) -> Result<(), DeviceError> {
        if batch.sequences.iter().any(|slice| slice.feed.is_some()) {
            return Err(DeviceError::new(
                "begin",
                "the CPU runs one step at a time and feeds none to the next",
            ));
        }
        let plan = kv.plan();
        batch.check(&plan.spec, &plan.pages, vocab).map_err(|e| DeviceError::new("begin", e.to_string()))
    }

    fn embed(&mut self, table: &CpuMatrix, batch: &Batch) -> Result<Rows, DeviceError> {
        ops::embed(table, batch)
    }

    fn attention_input(
        &mut self,
        layer: usize,
        weights: &AttentionInput<Self>,
        spec: &AttentionSpec,
        rope: &RopeTable,
        x: &Rows,
        kv: &mut CpuKv,
        batch: &Batch,
    ) -> Result<Rows, DeviceError> {
        ops::attention_input(self, layer, weights, spec, rope, x, kv, batch)
    }

    fn narrow(
        &mut self,
        _layer: usize,
        q: &mut Rows,
        x: &mut Rows,
        batch: &Batch,
    ) -> Result<(), DeviceError> {
        // Where inputs are observed, all of them are.
        if self.peaks.is_some() {
            return Ok(());
        }
        for rows in [q, x] {
            rows.expect("narrow", batch.tokens.len(), rows.cols())?;
            *rows = rows.of(batch.logit_rows());
        }
        Ok(())
    }

    fn attention(
        &mut self,
        layer: usize,
        spec: &AttentionSpec,
        sinks: Option<&Vec<f32>>,
        q: &Rows,
        kv: &CpuKv,
        batch: &Batch,
    ) -> Result<Rows, DeviceError> {
        ops::attention(self, layer, spec, sinks.map(Vec::as_slice), q, kv, batch)
    }

    fn attention_output(
        &mut self,
        output: &CpuMatrix,
        heads: &Rows,
        x: &mut Rows,
    ) -> Result<(), DeviceError> {
        ops::attention_output(self, output, heads, x)
    }

    fn experts(&mut self, moe: &Moe<Self>, x: &mut Rows) -> Result<(), DeviceError> {
        ops::experts(self, moe, x)
    }

    fn mlp(&mut self, mlp: &Mlp<Self>, x: &mut Rows) -> Result<(), DeviceError> {
        ops::mlp(self, mlp, x)
    }

    fn logits(
        &mut self,
        norm: &Vec<f32>,
        norm_eps: f32,
        head: &CpuMatrix,
        x: &Rows,
        batch: &Batch,
    ) -> Result<Rows, DeviceError> {
        ops::logits(self, norm, norm_eps, head, x, batch)
    }

    fn sample(&mut self, logits: &Rows, batch: &Batch) -> Result<Self::Pending, DeviceError> {
        ops::sample(self, logits, batch)
    }

    fn collect(&mut self, pending: Self::Pending) -> Result<Vec<Result<Sampled, SampleError>>, DeviceError> {
        Ok(pending)
    }

    fn read_logits(&mut self, logits: &Rows) -> Result<Vec<f32>, DeviceError> {
        Ok(logits.data().to_vec())
    }
}
