//! Dense NVFP4 weights on their way into strips.

use ctxserve_backend::{DeviceError, Role};
use ctxserve_core::{Elements, Matrix, Nvfp4Run};

use super::{ALIGN, Layout, Packer, Tools, decoded, shape_error};
use crate::driver::{Buffer, Device};
use crate::ops::attention::HEAD_DIMS;
use crate::ops::pack_nvfp4::{self, strip_bytes};

/// A matrix in NVFP4 strips.
#[derive(Debug)]
pub(crate) struct Nvfp4 {
    pub(crate) strips: Buffer<u8>,
    /// `[rows padded]`, in the strips' order: what each row's sum is multiplied by.
    pub(crate) factors: Buffer<f32>,
}

/// Whether a matrix stays as it is stored: a projection without a bias whose columns are not permuted.
pub(super) fn stays(matrix: &Matrix, biased: bool, role: Role<'_>) -> bool {
    let straight = match role {
        Role::Qkv(_) | Role::GateUp | Role::Down => true,
        Role::Output(spec) => HEAD_DIMS.contains(&spec.head_dim),
        Role::Embedding { .. } | Role::Router | Role::Head => false,
    };
    straight && !biased && matches!(matrix.elements(), Elements::Nvfp4 { .. })
}

/// NVFP4 as bf16, and all else as it is.
pub(crate) fn without_nvfp4(matrix: Matrix) -> Result<Matrix, DeviceError> {
    if !matches!(matrix.elements(), Elements::Nvfp4 { .. }) {
        return Ok(matrix);
    }
    let (rows, cols, values) = (matrix.rows(), matrix.cols(), decoded(&matrix));
    Matrix::new(rows, cols, Elements::Bf16(values)).ok_or_else(|| shape_error("load_experts", "weights"))
}

/// The factor of each row of the strips.
fn factors(runs: &[Nvfp4Run], layout: &Layout) -> Vec<f32> {
    let of_source: Vec<f32> = runs.iter().flat_map(|run| std::iter::repeat_n(run.weight, run.rows)).collect();
    let source = |row| match &layout.row_map {
        Some(map) => map.get(row).and_then(|&source| usize::try_from(source).ok()),
        None => Some(row),
    };
    let factor = |row| source(row).and_then(|source| of_source.get(source)).copied().unwrap_or_default();
    (0..layout.rows).map(factor).collect()
}

impl Packer {
    /// Strips of a matrix in host memory, and the factors of its rows; `None` where it is stored in another way.
    pub(super) fn nvfp4(
        &mut self,
        device: &Device,
        matrix: &Matrix,
        layout: &Layout,
    ) -> Result<Option<Nvfp4>, DeviceError> {
        let Elements::Nvfp4 { codes, scales, runs } = matrix.elements() else { return Ok(None) };
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let row_map = layout.row_map.as_deref().unwrap_or_default();
        let codes_at = size_of_val(row_map).next_multiple_of(ALIGN);
        let scales_at = codes_at + codes.len().next_multiple_of(ALIGN);
        let strips = device.allocate(strip_bytes(layout.rows, layout.cols))?;
        let factors = self.upload(device, &factors(runs, layout))?;
        let kernel = self.nvfp4;
        let Tools { uploader, staging } = self.tools(device, scales_at + scales.len())?;
        uploader.write(staging, 0, bytemuck::cast_slice(row_map))?;
        uploader.write(staging, codes_at, codes)?;
        uploader.write(staging, scales_at, scales)?;
        // SAFETY: the views end before what they view does; later ops of the stream alone write there again.
        let (map, codes, scales) = unsafe {
            (
                staging.view::<i32>(0, row_map.len())?,
                staging.view(codes_at, codes.len())?,
                staging.view(scales_at, scales.len())?,
            )
        };
        kernel.issue(
            device,
            &pack_nvfp4::Call {
                codes: &codes,
                scales: &scales,
                rows,
                cols,
                strips: &strips,
                first: 0,
                count: layout.rows,
                row_map: layout.row_map.as_ref().map(|_| &map),
            },
        )?;
        Ok(Some(Nvfp4 { strips, factors }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_follow_their_rows() {
        let run = |rows, weight| Nvfp4Run { rows, weight, input: None };
        let mut layout = Layout { rows: 16, cols: 64, row_map: Some(vec![3, -1, 0, 2, 1]), col_map: None };
        layout.row_map.as_mut().unwrap().resize(16, -1);
        let found = factors(&[run(2, 0.5), run(2, 0.25)], &layout);
        assert_eq!(found[..6], [0.25, 0.0, 0.5, 0.25, 0.5, 0.0]);
        let layout = Layout { row_map: None, ..layout };
        assert_eq!(factors(&[run(3, 2.0)], &layout)[..4], [2.0, 2.0, 2.0, 0.0]);
    }
}
