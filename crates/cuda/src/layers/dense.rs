//! Products of the dense layers, and the dense feed-forward layer.

use ctxserve_backend::{DeviceError, Mlp};

use super::{is_few, missing};
use crate::backend::{CudaBackend, NormKey, State};
use crate::driver::{Buffer, Device};
use crate::kernels::Kernels;
use crate::ops::{gemm, gemm_nvfp4, gemv_gate_up, gemv_nvfp4, gemv_out, quantise_nvfp4, rms_norm};
use crate::step::Extent;
use crate::weights::{CudaMatrix, Nvfp4};

/// What [`CudaBackend::step_parts`] gives.
pub(super) type Parts<'a> = (&'a Device, &'a mut Kernels, &'a State, Extent);

/// A norm's weight over padded columns and its epsilon.
type Norm<'a> = (&'a Buffer<f32>, f32);

/// What becomes of a product, for any number of rows.
#[derive(Clone, Copy, Debug)]
pub(super) enum Sums<'a> {
    /// Float32 `[rows, outputs]`.
    F32(&'a Buffer<f32>),
    /// Added to float32 `[rows, outputs]`.
    Add(&'a Buffer<f32>),
    /// `silu(gate) * up`: panels, or row-major of few rows.
    SwiGlu(&'a Buffer<u16>),
    /// Heads, rotated; of a matrix in panels.
    Heads(gemm::Heads<'a>),
}

fn few_nvfp4(
    (device, kernels, state, extent): Parts<'_>,
    matrix: &CudaMatrix,
    Nvfp4 { strips, factors }: &Nvfp4,
    input: gemv_nvfp4::Input<'_>,
    y: Sums<'_>,
) -> Result<(), DeviceError> {
    let normed = matches!(input, gemv_nvfp4::Input::Normed { .. });
    let dims = gemv_nvfp4::Dims { rows: extent.rows, cols: matrix.cols, outputs: matrix.padded_rows, normed };
    let output = match y {
        Sums::F32(y) => gemv_nvfp4::Output::F32(y),
        Sums::Add(y) => gemv_nvfp4::Output::Add(y),
        Sums::SwiGlu(y) => gemv_nvfp4::Output::SwiGlu(y),
        Sums::Heads(_) => return Err(missing("attention_input", "the QKV matrix")),
    };
    let live = &state.description.arrays().rows;
    let call = gemv_nvfp4::Call { weights: strips, factors, live, input, output };
    kernels.nvfp4(device, dims)?.issue(device, &call)
}

/// The product of the normed residual stream. `known` is the norm that the op before left, if it did.
pub(super) fn norm_and_multiply(
    op: &'static str,
    (device, kernels, state, extent): Parts<'_>,
    ((weight, eps), known): (Norm<'_>, Option<NormKey>),
    matrix: &CudaMatrix,
    y: Sums<'_>,
) -> Result<(), DeviceError> {
    if let Some(rounding) = &matrix.rounding {
        let few = matrix.nvfp4.as_ref().filter(|_| is_few(state, &extent));
        let normed = &state.work.normed;
        let call = quantise_nvfp4::NormedCall {
            x: &state.work.x,
            weight,
            y: normed,
            live: &state.description.arrays().rows,
            index: None,
            rows: extent.rows,
            cols: matrix.input_cols(),
            capacity: few.is_none().then(|| extent.capacity()),
            eps,
            rounding: rounding.as_call(),
        };
        kernels.quantise(device)?.normed(device, &call)?;
        let parts = (device, kernels, state, extent);
        return match few {
            Some(nvfp4) => few_nvfp4(parts, matrix, nvfp4, gemv_nvfp4::Input::Plain(normed), y),
            None => product(op, parts, matrix, normed, y),
        };
    }
    if let Some(nvfp4) = matrix.nvfp4.as_ref().filter(|_| is_few(state, &extent)) {
        let (x, norm_cols) = (&state.work.x, matrix.cols);
        let input = gemv_nvfp4::Input::Normed { x, weight, norm_cols, eps };
        return few_nvfp4((device, kernels, state, extent), matrix, nvfp4, input, y);
    }
    if let (Sums::SwiGlu(y), Some(weights), true) = (y, &matrix.panels, is_few(state, &extent)) {
        let (cols, inner) = (matrix.cols, matrix.padded_rows / 2);
        let dims = gemv_gate_up::Dims { rows: extent.rows, cols, inner };
        let (x, live) = (&state.work.x, &state.description.arrays().rows);
        let call = gemv_gate_up::Call { weights, norm: weight, x, live, y, norm_cols: cols, eps };
        return kernels.gate_up_dense(device, dims)?.issue(device, &call);
    }
    if known != Some(NormKey::new(weight, eps)) {
        kernels.norm.issue(
            device,
            &rms_norm::Call {
                x: &state.work.x,
                weight,
                y: &state.work.normed,
                live: &state.description.arrays().rows,
                index: None,
                rows: extent.rows,
                cols: matrix.cols,
                capacity: extent.capacity(),
                eps,
            },
        )?;
    }
    product(op, (device, kernels, state, extent), matrix, &state.work.normed, y)
}

/// Rounds inputs in place, if they are to be: panels of `capacity` rows, or row-major.
fn round(
    (device, kernels, state, extent): Parts<'_>,
    matrix: &CudaMatrix,
    x: &Buffer<u16>,
    capacity: Option<usize>,
) -> Result<(), DeviceError> {
    let Some(rounding) = &matrix.rounding else { return Ok(()) };
    let (live, rows, cols) = (&state.description.arrays().rows, extent.rows, matrix.cols);
    let call = quantise_nvfp4::Call { x, live, rows, cols, capacity, rounding: rounding.as_call() };
    kernels.quantise(device)?.issue(device, &call)
}

/// The product of panels, which are rounded in place where the matrix wants them so.
pub(super) fn multiply(
    op: &'static str,
    (device, kernels, state, extent): Parts<'_>,
    matrix: &CudaMatrix,
    x: &Buffer<u16>,
    y: Sums<'_>,
) -> Result<(), DeviceError> {
    round((device, kernels, state, extent), matrix, x, Some(extent.capacity()))?;
    product(op, (device, kernels, state, extent), matrix, x, y)
}

/// The product of panels that are as it wants them.
fn product(
    op: &'static str,
    (device, kernels, state, extent): Parts<'_>,
    matrix: &CudaMatrix,
    x: &Buffer<u16>,
    y: Sums<'_>,
) -> Result<(), DeviceError> {
    let (cols, outs, capacity) = (matrix.cols, matrix.padded_rows, extent.capacity());
    let live = &state.description.arrays().rows;
    if let Some(Nvfp4 { strips, factors }) = &matrix.nvfp4 {
        let y = match y {
            Sums::F32(y) => gemm_nvfp4::Output::F32(y),
            Sums::Add(y) => gemm_nvfp4::Output::Add(y),
            Sums::SwiGlu(y) => gemm_nvfp4::Output::SwiGlu(y),
            Sums::Heads(_) => return Err(missing(op, "the QKV matrix")),
        };
        let call = gemm_nvfp4::Call {
            w: strips,
            factors,
            x,
            y,
            live,
            tokens: extent.rows,
            cols,
            rows: outs,
            capacity,
            stride: outs,
        };
        return kernels.gemm_nvfp4(device)?.issue(device, &call);
    }
    let panels = matrix.panels.as_ref().ok_or_else(|| missing(op, "a matrix"))?;
    // Gate and up were loaded without a bias.
    let (y, bias) = match y {
        Sums::F32(y) => (gemm::Output::F32(y), Some(&matrix.bias)),
        Sums::Add(y) => (gemm::Output::Add(y), Some(&matrix.bias)),
        Sums::SwiGlu(y) => (gemm::Output::SwiGlu(y), None),
        Sums::Heads(heads) => (gemm::Output::Qkv(heads), Some(&matrix.bias)),
    };
    kernels.gemm.issue(
        device,
        &gemm::Call {
            w: panels,
            x,
            bias,
            y,
            live,
            tokens: extent.rows,
            cols,
            w_rows: outs,
            outs,
            capacity,
            stride: outs,
        },
    )
}

/// Adds the product of few row-major rows `x` to the residual stream. They are rounded in place where the matrix wants them so.
pub(super) fn add_few(
    op: &'static str,
    (device, kernels, state, extent): Parts<'_>,
    matrix: &CudaMatrix,
    x: &Buffer<u16>,
) -> Result<(), DeviceError> {
    round((device, kernels, state, extent), matrix, x, None)?;
    if let Some(nvfp4) = &matrix.nvfp4 {
        let input = gemv_nvfp4::Input::Plain(x);
        let y = Sums::Add(&state.work.x);
        return few_nvfp4((device, kernels, state, extent), matrix, nvfp4, input, y);
    }
    let panels = matrix.panels.as_ref().ok_or_else(|| missing(op, "a matrix"))?;
    let dims = gemv_out::Dims { rows: extent.rows, q_width: matrix.cols, hidden: matrix.padded_rows };
    let live = &state.description.arrays().rows;
    let call = gemv_out::Call { weights: panels, bias: &matrix.bias, heads: x, x: &state.work.x, live };
    kernels.out(device, dims)?.issue(device, &call)
}

impl CudaBackend {
    pub(crate) fn issue_mlp(&mut self, mlp: &Mlp<Self>) -> Result<(), DeviceError> {
        const OP: &str = "mlp";
        let normed = self.normed;
        let (device, kernels, state, extent) = self.step_parts(OP)?;
        let Mlp { norm, gate_up, down, norm_eps } = mlp;
        if gate_up.padded_rows != 2 * down.cols || down.padded_rows != gate_up.input_cols() {
            return Err(DeviceError::new(OP, "gate and up do not fit down, or down the residual stream"));
        }
        let work = &state.work;
        norm_and_multiply(
            OP,
            (device, kernels, state, extent),
            (norm.as_norm(*norm_eps), normed),
            gate_up,
            Sums::SwiGlu(&work.dense),
        )?;
        if is_few(state, &extent) {
            return add_few(OP, (device, kernels, state, extent), down, &work.dense);
        }
        multiply(OP, (device, kernels, state, extent), down, &work.dense, Sums::Add(&work.x))
    }
}
