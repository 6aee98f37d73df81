//! Experts on their way into the layouts that kernels read.

use ctxserve_backend::{DeviceError, ExpertSpec, ExpertWeights};
use ctxserve_core::{Elements, MXFP4_BLOCK, Matrix};

use super::{ALIGN, PANEL, Packer, Tools, discard, shape_error};
use crate::driver::{Buffer, Device};
use crate::ops::pack_mxfp4::{self, Rows, Strips};

/// A stack of experts in MXFP4 strips.
#[derive(Debug)]
pub struct CudaExperts {
    pub(crate) gate_up: Buffer<u8>,
    /// `[experts, 2 * inner padded]`: the largest scale byte of each row.
    pub(crate) gate_up_exponents: Buffer<u8>,
    /// The same of `down`, `[experts, hidden padded]`.
    pub(crate) down_exponents: Buffer<u8>,
    /// `[experts, 2 * inner padded]`: gate, up, gate, up.
    pub(crate) gate_up_bias: Buffer<f32>,
    pub(crate) down: Buffer<u8>,
    /// `[experts, hidden padded]`.
    pub(crate) down_bias: Buffer<f32>,
    pub(crate) spec: ExpertSpec,
    /// Widths, padded.
    pub(crate) hidden: usize,
    pub(crate) inner: usize,
}

impl Packer {
    pub(crate) fn experts(
        &mut self,
        device: &Device,
        weights: ExpertWeights,
        spec: &ExpertSpec,
    ) -> Result<CudaExperts, DeviceError> {
        const OP: &str = "load_experts";
        let ExpertSpec { experts, top_k, hidden, inner, .. } = *spec;
        let shaped = |m: &Matrix, bias: &[f32], out: usize, cols: usize| {
            experts.checked_mul(out) == Some(m.rows()) && m.cols() == cols && bias.len() == m.rows()
        };
        let ExpertWeights { gate_up, gate_up_bias, down, down_bias } = weights;
        if top_k == 0
            || top_k > experts
            || !shaped(&gate_up, &gate_up_bias, 2 * inner, hidden)
            || !shaped(&down, &down_bias, hidden, inner)
        {
            return Err(shape_error(OP, "weights"));
        }
        let (wide, deep) = (hidden.next_multiple_of(PANEL), inner.next_multiple_of(PANEL));
        let mut spread = |bias: &[f32], real: usize, padded: usize| {
            let mut all = vec![0.0; experts * padded];
            all.chunks_mut(padded)
                .zip(bias.chunks(real))
                .for_each(|(to, from)| to[..real].copy_from_slice(from));
            self.upload(device, &all)
        };
        let gate_up_bias = spread(&gate_up_bias, 2 * inner, 2 * deep)?;
        let down_bias = spread(&down_bias, hidden, wide)?;
        let gate_up = self.strips(device, gate_up, experts, Rows::GateUp)?;
        let down = self.strips(device, down, experts, Rows::Down)?;
        let gate_up_exponents = self.exponents(device, &gate_up, experts * 2 * deep, wide)?;
        let down_exponents = self.exponents(device, &down, experts * wide, deep)?;
        self.settle(device)?;
        Ok(CudaExperts {
            gate_up,
            gate_up_exponents,
            down_exponents,
            gate_up_bias,
            down,
            down_bias,
            spec: *spec,
            hidden: wide,
            inner: deep,
        })
    }

    /// The largest scale of each weight row, for the products that need it.
    fn exponents(
        &self,
        device: &Device,
        strips: &Buffer<u8>,
        rows: usize,
        cols: usize,
    ) -> Result<Buffer<u8>, DeviceError> {
        let exponents = device.allocate(rows)?;
        self.gemm.exponents(device, strips, &exponents, rows, cols)?;
        Ok(exponents)
    }

    /// Packs a stack of `experts` matrices, some experts at a time.
    fn strips(
        &mut self,
        device: &Device,
        matrix: Matrix,
        experts: usize,
        kind: Rows,
    ) -> Result<Buffer<u8>, DeviceError> {
        let (rows, cols) = (matrix.rows() / experts, matrix.cols());
        let Elements::Mxfp4 { codes, scales } = matrix.into_elements() else {
            return Err(DeviceError::new("load_experts", "experts are taken as MXFP4 only"));
        };
        let (code_bytes, scale_bytes) = (rows * cols / 2, rows * cols / MXFP4_BLOCK);
        // The rows of a down projection are the columns of the residual stream, padded to whole panels.
        let padded = if kind == Rows::Down { rows.next_multiple_of(PANEL) } else { rows };
        let bytes = Strips::of(kind, padded, cols).bytes();
        let all: Buffer<u8> = device.zeros(experts * bytes)?;
        let whole = if padded == rows { experts } else { 1 };
        let each = (self.chunk / (code_bytes + scale_bytes)).clamp(1, whole);
        let kernel = self.mxfp4;
        let scales_at = (each * code_bytes).next_multiple_of(ALIGN);
        let Tools { uploader, staging } = self.tools(device, scales_at + each * scale_bytes)?;
        for first in (0..experts).step_by(each) {
            let count = each.min(experts - first);
            uploader.write(staging, 0, &codes[first * code_bytes..][..count * code_bytes])?;
            uploader.write(staging, scales_at, &scales[first * scale_bytes..][..count * scale_bytes])?;
            // SAFETY: the views end before what they view does; later ops of the stream alone write there again.
            let (codes, scales, strips) = unsafe {
                (
                    staging.view(0, count * code_bytes)?,
                    staging.view(scales_at, count * scale_bytes)?,
                    all.view(first * bytes, count * bytes)?,
                )
            };
            let call = pack_mxfp4::Call {
                codes: &codes,
                scales: &scales,
                strips: &strips,
                first: 0,
                experts: count,
                rows,
                cols,
                kind,
            };
            kernel.issue(device, &call)?;
        }
        discard((codes, scales), experts * rows * cols);
        Ok(all)
    }
}
