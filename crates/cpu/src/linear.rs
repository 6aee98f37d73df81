//! Products with weight matrices: the plain definition and the packed driver.

use std::borrow::Cow;

use ctxserve_backend::DeviceError;
use ctxserve_core::Matrix;
use rayon::prelude::*;

use crate::activations::round_to_nvfp4;
use crate::backend::Fast;
use crate::decode::decode_row;
use crate::kernels::{self, Tokens};
use crate::packed::{BLOCK, PANEL, Packed};
use crate::peaks::Peak;
use crate::quantised::{QuantRow, Quantised};
use crate::rows::Rows;

/// Weights as one kind of backend keeps them.
#[derive(Debug)]
pub(crate) enum Weights {
    /// As they came, for the plain loops.
    Plain(Matrix),
    /// For the kernels.
    Packed(Packed),
}

/// A matrix `[out, in]` with an optional bias `[out]`.
#[derive(Debug)]
pub struct CpuMatrix {
    pub(crate) weights: Weights,
    pub(crate) bias: Option<Vec<f32>>,
    /// Rows, and the factor by which their inputs are rounded to NVFP4; empty where they are not.
    pub(crate) input_factors: Vec<(usize, f32)>,
    /// The largest input so far, where inputs are observed.
    pub(crate) peak: Option<Peak>,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

/// `out[r] = weights[first + r] . x`, each product and sum in f64: the definition.
pub(crate) fn plain(weights: &Matrix, first: usize, x: &[f32], out: &mut [f32]) {
    let mut row = vec![0.0; weights.cols()];
    for (r, out) in out.iter_mut().enumerate() {
        decode_row(weights, first + r, &mut row);
        *out = dot(&row, x);
    }
}

/// The inner product, summed in f64 from the first element on.
fn dot(w: &[f32], x: &[f32]) -> f32 {
    let mut sum = 0.0_f64;
    for (&w, &x) in w.iter().zip(x) {
        sum += f64::from(w) * f64::from(x);
    }
    sum as f32
}

/// `x * weights^T + bias`: `[rows, in]` to `[rows, out]`.
pub(crate) fn linear(
    op: &'static str,
    fast: Option<&Fast>,
    matrix: &CpuMatrix,
    x: &Rows,
) -> Result<Rows, DeviceError> {
    x.expect(op, x.rows(), matrix.cols)?;
    if let Some(peak) = &matrix.peak {
        peak.meet(x.data());
    }
    let mut out = match matrix.input_factors.as_slice() {
        [] => product(op, fast, &matrix.weights, x)?,
        factors => rounded_product(op, fast, matrix, factors, x)?,
    };
    if let Some(bias) = &matrix.bias {
        for row in out.data_mut().chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(x, b)| *x += b);
        }
    }
    Ok(out)
}

/// Products of inputs that are rounded to NVFP4: once for each factor that rows have.
fn rounded_product(
    op: &'static str,
    fast: Option<&Fast>,
    matrix: &CpuMatrix,
    factors: &[(usize, f32)],
    x: &Rows,
) -> Result<Rows, DeviceError> {
    let mut out = Rows::zeros(x.rows(), matrix.rows);
    let mut done: Vec<f32> = Vec::new();
    for &(_, factor) in factors {
        if done.contains(&factor) {
            continue;
        }
        done.push(factor);
        let mut rounded = x.clone();
        let round = |row: &mut [f32]| round_to_nvfp4(row, factor);
        match fast {
            None => rounded.data_mut().chunks_exact_mut(matrix.cols).for_each(round),
            Some(fast) => {
                fast.pool.install(|| rounded.data_mut().par_chunks_exact_mut(matrix.cols).for_each(round));
            }
        }
        let product = product(op, fast, &matrix.weights, &rounded)?;
        let mut end = 0;
        for &(rows, of_run) in factors {
            let run = end..end + rows;
            end = run.end;
            for row in (0..x.rows()).filter(|_| of_run == factor) {
                out.row_mut(row)[run.clone()].copy_from_slice(&product.row(row)[run.clone()]);
            }
        }
    }
    Ok(out)
}

/// `x * weights^T`.
fn product(op: &'static str, fast: Option<&Fast>, weights: &Weights, x: &Rows) -> Result<Rows, DeviceError> {
    Ok(match (weights, fast) {
        (Weights::Plain(weights), _) => {
            let mut out = Rows::zeros(x.rows(), weights.rows());
            let mut decoded = vec![0.0; weights.cols()];
            for col in 0..weights.rows() {
                decode_row(weights, col, &mut decoded);
                for row in 0..x.rows() {
                    out.row_mut(row)[col] = dot(&decoded, x.row(row));
                }
            }
            out
        }
        (Weights::Packed(weights), Some(fast)) => fast.linear(weights, x),
        (Weights::Packed(_), None) => {
            return Err(DeviceError::new(op, "packed weights on the plain backend"));
        }
    })
}

/// Rows in the form that a product reads: padded to whole blocks, or quantised.
#[derive(Debug)]
pub(crate) enum Inputs<'a> {
    F32(Cow<'a, [f32]>, usize),
    Int8(Quantised, usize),
}

impl<'a> Inputs<'a> {
    /// Prepares rows of `cols` for weights that want them so, on the current pool.
    pub(crate) fn new(data: &'a [f32], cols: usize, int8: bool) -> Self {
        let (rows, blocks) = (data.len() / cols, cols.div_ceil(BLOCK));
        if int8 {
            let mut quantised = Quantised::new(rows, blocks);
            quantised.fill(data, cols);
            return Self::Int8(quantised, rows);
        }
        if cols.is_multiple_of(BLOCK) {
            return Self::F32(Cow::Borrowed(data), cols);
        }
        let width = blocks * BLOCK;
        let mut padded = vec![0.0; rows * width];
        for (to, from) in padded.chunks_exact_mut(width).zip(data.chunks_exact(cols)) {
            to[..cols].copy_from_slice(from);
        }
        Self::F32(Cow::Owned(padded), width)
    }

    /// Picks rows, in this order.
    pub(crate) fn pick(&self, rows: impl Iterator<Item = usize>) -> Picked<'_> {
        match self {
            Self::F32(data, width) => Picked::F32(rows.map(|r| &data[r * width..][..*width]).collect()),
            Self::Int8(data, _) => Picked::Int8(rows.map(|r| data.row(r)).collect()),
        }
    }

    /// All rows.
    pub(crate) fn all(&self) -> Picked<'_> {
        match self {
            Self::F32(data, width) => Picked::F32(data.chunks_exact(*width).collect()),
            Self::Int8(_, rows) => self.pick(0..*rows),
        }
    }
}

/// Rows picked from [`Inputs`].
#[derive(Debug)]
pub(crate) enum Picked<'a> {
    F32(Vec<&'a [f32]>),
    Int8(Vec<QuantRow<'a>>),
}

impl Picked<'_> {
    pub(crate) fn tokens(&self) -> Tokens<'_> {
        match self {
            Self::F32(rows) => Tokens::F32(rows),
            Self::Int8(rows) => Tokens::Int8(rows),
        }
    }
}

impl Fast {
    fn linear(&self, weights: &Packed, x: &Rows) -> Rows {
        self.pool.install(|| {
            let inputs = Inputs::new(x.data(), x.cols(), weights.takes_int8(self.int8));
            let picked = inputs.all();
            let stride = picked.tokens().len() * PANEL;
            let mut panels = vec![0.0; weights.panels() * stride];
            let chunk = self.chunk(weights.panels());
            panels.par_chunks_mut((chunk * stride).max(1)).enumerate().for_each_init(
                Vec::new,
                |scratch, (at, out)| {
                    kernels::panels(self.isa, weights, at * chunk, picked.tokens(), scratch, out);
                },
            );
            from_panels(panels, x.rows(), PANEL, weights.rows())
        })
    }

    /// Panels per task: enough tasks to balance the threads, few enough to stream, even for pairs.
    pub(crate) fn chunk(&self, panels: usize) -> usize {
        (panels / (16 * self.threads)).clamp(2, 64).next_multiple_of(2)
    }
}

/// `[panels][rows][width]` to `[rows, cols]`, dropping the padding of the last panel.
pub(crate) fn from_panels(mut panels: Vec<f32>, rows: usize, width: usize, cols: usize) -> Rows {
    if rows == 1 {
        panels.truncate(cols);
        return Rows::from_vec(panels, cols);
    }
    let mut out = Rows::zeros(rows, cols);
    out.data_mut().par_chunks_mut(cols).enumerate().for_each(|(row, out)| {
        for (panel, out) in out.chunks_mut(width).enumerate() {
            let from = &panels[(panel * rows + row) * width..];
            out.copy_from_slice(&from[..out.len()]);
        }
    });
    out
}
