//! Experts on their way into the layouts that kernels read.

use ctxserve_backend::{DeviceError, ExpertSpec, ExpertWeights};
use ctxserve_core::{Elements, Encoding, MXFP4_BLOCK, Matrix};
use half::bf16;

use super::{ALIGN, PANEL, Packer, Tools, decoded, discard, shape_error};
use crate::driver::{Buffer, Device};
use crate::ops::pack_mxfp4::{self, Rows, Strips};
use crate::ops::pack_panels::{self, Source};

/// A stack of experts.
#[derive(Debug)]
pub struct CudaExperts {
    pub(crate) stacks: Stacks,
    /// `[experts, 2 * inner padded]`: gate, up, gate, up.
    pub(crate) gate_up_bias: Buffer<f32>,
    /// `[experts, hidden padded]`.
    pub(crate) down_bias: Buffer<f32>,
    pub(crate) spec: ExpertSpec,
    /// Widths, padded.
    pub(crate) hidden: usize,
    pub(crate) inner: usize,
}

/// The matrices of a stack.
#[derive(Debug)]
pub(crate) enum Stacks {
    /// MXFP4 strips.
    Mxfp4 {
        gate_up: Buffer<u8>,
        /// `[experts, 2 * inner padded]`: the largest scale byte of each row.
        gate_up_exponents: Buffer<u8>,
        down: Buffer<u8>,
        /// `[experts, hidden padded]`.
        down_exponents: Buffer<u8>,
    },
    /// Bits of bf16.
    Bf16 {
        /// Panel layout of `[experts * 2 * inner padded, hidden padded]`, rows in the order of strips.
        gate_up: Buffer<u16>,
        /// Panel layout of `[experts * hidden padded, inner padded]`.
        down: Buffer<u16>,
    },
}

/// The source row of each padded row of one expert in bf16: gates and ups in turns of eight, as in a strip; the rows of a down
/// projection in order. -1 is padding.
fn row_map(kind: Rows, rows: usize) -> Vec<i32> {
    match kind {
        Rows::GateUp => (0..2 * (rows / 2).next_multiple_of(PANEL))
            .map(|at| {
                let source = 2 * (at / 16 * 8 + at % 8) + at % 16 / 8;
                if source < rows { source as i32 } else { -1 }
            })
            .collect(),
        Rows::Down => {
            (0..rows.next_multiple_of(PANEL)).map(|at| if at < rows { at as i32 } else { -1 }).collect()
        }
    }
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
        let stacks = if [&gate_up, &down].map(Matrix::encoding) == [Encoding::Mxfp4; 2] {
            let gate_up = self.strips(device, gate_up, experts, Rows::GateUp)?;
            let down = self.strips(device, down, experts, Rows::Down)?;
            Stacks::Mxfp4 {
                gate_up_exponents: self.exponents(device, &gate_up, experts * 2 * deep, wide)?,
                down_exponents: self.exponents(device, &down, experts * wide, deep)?,
                gate_up,
                down,
            }
        } else {
            Stacks::Bf16 {
                gate_up: self.bf16_stack(device, gate_up, experts, Rows::GateUp)?,
                down: self.bf16_stack(device, down, experts, Rows::Down)?,
            }
        };
        self.settle(device)?;
        Ok(CudaExperts { stacks, gate_up_bias, down_bias, spec: *spec, hidden: wide, inner: deep })
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
            return Err(DeviceError::new("load_experts", "experts are not stored as MXFP4"));
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
    /// Packs a stack of `experts` matrices into panels of bf16, some experts at a time.
    fn bf16_stack(
        &mut self,
        device: &Device,
        matrix: Matrix,
        experts: usize,
        kind: Rows,
    ) -> Result<Buffer<u16>, DeviceError> {
        let (rows, cols) = (matrix.rows() / experts, matrix.cols());
        let values = match matrix.elements() {
            Elements::Bf16(_) => matrix.into_elements(),
            _ => Elements::Bf16(decoded(&matrix)),
        };
        let Elements::Bf16(values) = values else {
            return Err(DeviceError::new("load_experts", "experts that are no floats"));
        };
        let of_one = row_map(kind, rows);
        let (padded, wide) = (of_one.len(), cols.next_multiple_of(PANEL));
        let panels = device.allocate(experts * padded * wide)?;
        let each = (self.chunk / (rows * cols * size_of::<bf16>())).clamp(1, experts);
        let map: Vec<i32> = (0..each)
            .flat_map(|expert| {
                of_one.iter().map(move |&row| if row < 0 { row } else { (expert * rows) as i32 + row })
            })
            .collect();
        let source_at = size_of_val(map.as_slice()).next_multiple_of(ALIGN);
        let kernel = self.panels;
        let Tools { uploader, staging } =
            self.tools(device, source_at + each * rows * cols * size_of::<bf16>())?;
        uploader.write(staging, 0, bytemuck::cast_slice(&map))?;
        for first in (0..experts).step_by(each) {
            let count = each.min(experts - first);
            let part = &values[first * rows * cols..][..count * rows * cols];
            uploader.write(staging, source_at, bytemuck::cast_slice(part))?;
            // SAFETY: the views end before what they view does; later ops of the stream alone write there again.
            let (map, source) =
                unsafe { (staging.view::<i32>(0, map.len())?, staging.view(source_at, part.len())?) };
            let call = pack_panels::Call {
                source: Source::Bf16(&source),
                rows: count * rows,
                cols,
                panels: &panels,
                capacity: experts * padded,
                padded: wide,
                first: first * padded,
                count: count * padded,
                row_map: Some(&map),
                column_map: None,
            };
            kernel.issue(device, &call)?;
        }
        discard(values, experts * rows * cols);
        Ok(panels)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_and_ups_take_turns() {
        let map = row_map(Rows::GateUp, 20);
        assert_eq!(map.len(), 128);
        assert_eq!(map[..16], [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15]);
        assert_eq!(map[16..32], [16, 18, -1, -1, -1, -1, -1, -1, 17, 19, -1, -1, -1, -1, -1, -1]);
        assert!(map[32..].iter().all(|&row| row == -1));
        let down = row_map(Rows::Down, 70);
        assert_eq!((down.len(), down[69], down[70]), (128, 69, -1));
    }
}
