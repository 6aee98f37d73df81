//! Dense NVFP4 weights on their way into strips.

use ctxserve_backend::{DeviceError, Role};
use ctxserve_core::{Elements, Matrix, NVFP4_BLOCK, Nvfp4Run};

use super::{ALIGN, Layout, PANEL, Packer, Tools, decoded, shape_error};
use crate::driver::{Buffer, Device};
use crate::ops::attention::HEAD_DIMS;
use crate::ops::pack_nvfp4::{self, strip_bytes};
use crate::ops::quantise_nvfp4::{FACTORS, MOST_PARTS, Rounding};

/// A matrix in NVFP4 strips.
#[derive(Debug)]
pub(crate) struct Nvfp4 {
    pub(crate) strips: Buffer<u8>,
    /// `[rows padded]`, in the strips' order: what each row's sum is multiplied by.
    pub(crate) factors: Buffer<f32>,
}

/// How inputs of a product are rounded to NVFP4.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct InputRounding {
    /// Different factors of the matrix's rows. Inputs are rounded by each, side by side.
    pub(crate) factors: Vec<f32>,
    /// Whether rounded inputs are multiplied by their factor; otherwise the matrix has it in those of its rows.
    scaled: bool,
}

impl InputRounding {
    pub(crate) fn as_call(&self) -> Rounding<'_> {
        Rounding { factors: &self.factors, scaled: self.scaled }
    }
}

/// How inputs of a matrix are to be rounded by the checkpoint's factors, and the matrix that takes them so; as it is, and `None`, where it is
/// not stored in NVFP4 or not multiplied.
///
/// Projections that were fused may have inputs of different factors. Such a matrix becomes as wide as all of them together, each row zero
/// but for the columns of its own factor: one product does for all, whatever kernel it goes through.
pub(super) fn with_rounded_inputs(
    matrix: Matrix,
    biased: bool,
    role: Role<'_>,
) -> Result<(Matrix, Option<InputRounding>), DeviceError> {
    const OP: &str = "load_matrix";
    let refused = |what: &str| Err(DeviceError::new(OP, what.to_owned()));
    let several = match role {
        Role::Qkv(_) | Role::GateUp => true,
        Role::Output(_) | Role::Down | Role::Head | Role::Embedding { head: true } => false,
        Role::Embedding { head: false } => return Ok((matrix, None)),
        Role::Router if matches!(matrix.elements(), Elements::Nvfp4 { .. }) => {
            return refused("there are no kernels that round inputs of a router to NVFP4");
        }
        Role::Router => return Ok((matrix, None)),
    };
    let scaled = !stays(&matrix, biased, role);
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let (mut codes, mut scales, mut runs) = match matrix.into_elements() {
        Elements::Nvfp4 { codes, scales, runs } => (codes, scales, runs),
        other => {
            let matrix = Matrix::new(rows, cols, other).ok_or_else(|| shape_error(OP, "weights"))?;
            return Ok((matrix, None));
        }
    };
    let mut factors = Vec::new();
    // Of each row, which of them it has.
    let mut of_rows = Vec::with_capacity(rows);
    for run in &mut runs {
        let Some(factor) = run.input else {
            return refused(
                "its inputs were not calibrated for NVFP4: the checkpoint has no factors for them",
            );
        };
        let known = factors.iter().position(|&known| known == factor);
        let at = known.unwrap_or(factors.len());
        if known.is_none() {
            factors.push(factor);
        }
        of_rows.extend(std::iter::repeat_n(at, run.rows));
        if !scaled {
            run.weight *= factor;
        }
        if !FACTORS.contains(&factor) || !run.weight.is_normal() {
            return refused("a factor of its inputs is beyond what kernels compute with");
        }
    }
    if factors.len() > if several { MOST_PARTS } else { 1 } {
        return refused("its rows have inputs of more factors than there are kernels for");
    }
    let mut wide = cols;
    if factors.len() > 1 {
        // Whole panels each.
        let padded = cols.next_multiple_of(PANEL);
        wide = factors.len() * padded;
        codes = spread(&codes, &of_rows, cols / 2, padded / 2, wide / 2);
        scales = spread(&scales, &of_rows, cols / NVFP4_BLOCK, padded / NVFP4_BLOCK, wide / NVFP4_BLOCK);
    }
    let matrix = Matrix::new(rows, wide, Elements::Nvfp4 { codes, scales, runs });
    Ok((matrix.ok_or_else(|| shape_error(OP, "weights"))?, Some(InputRounding { factors, scaled })))
}

/// Rows of `from` bytes at place `at[row] * each` of rows of `to` zeros.
fn spread(bytes: &[u8], at: &[usize], from: usize, each: usize, to: usize) -> Vec<u8> {
    let mut wide = vec![0; at.len() * to];
    for ((wide, bytes), at) in wide.chunks_mut(to).zip(bytes.chunks(from)).zip(at) {
        wide[at * each..][..from].copy_from_slice(bytes);
    }
    wide
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

    fn nvfp4(rows: [usize; 3], inputs: [Option<f32>; 3]) -> Matrix {
        const COLS: usize = 80;
        let all: usize = rows.iter().sum();
        let codes = (0..all * COLS / 2).map(|at| (at * 37 + 11) as u8).collect();
        let scales = (0..all * COLS / 16).map(|at| 0x30 + (at % 16) as u8).collect();
        let run = |at: usize| Nvfp4Run { rows: rows[at], weight: 0.5 + at as f32, input: inputs[at] };
        let runs = vec![run(0), run(1), run(2)];
        Matrix::new(all, COLS, Elements::Nvfp4 { codes, scales, runs }).unwrap()
    }

    fn row(matrix: &Matrix, at: usize) -> Vec<f32> {
        let mut row = vec![0.0; matrix.cols()];
        matrix.decode_row(at, &mut row);
        row
    }

    /// Inputs of q and v have one factor, those of k another.
    #[test]
    fn rows_meet_inputs_of_their_own_factor() {
        let matrix = nvfp4([6, 4, 6], [Some(0.25), Some(0.125), Some(0.25)]);
        let (wide, rounding) = with_rounded_inputs(matrix.clone(), false, Role::GateUp).unwrap();
        assert_eq!(rounding, Some(InputRounding { factors: vec![0.25, 0.125], scaled: false }));
        assert_eq!((wide.rows(), wide.cols()), (16, 256));
        for at in 0..16 {
            let (part, factor) = if (6..10).contains(&at) { (128, 0.125) } else { (0, 0.25) };
            let mut wanted = vec![0.0; 256];
            row(&matrix, at).iter().enumerate().for_each(|(col, w)| wanted[part + col] = w * factor);
            assert_eq!(row(&wide, at), wanted, "row {at}");
        }
        let (same, rounding) =
            with_rounded_inputs(nvfp4([6, 4, 6], [Some(0.25); 3]), false, Role::Down).unwrap();
        assert_eq!((same.cols(), rounding.unwrap().factors), (80, vec![0.25]));
    }

    /// What becomes bf16 on the device has no factors of rows: inputs have theirs.
    #[test]
    fn weights_that_do_not_stay_keep_their_factors() {
        let matrix = nvfp4([6, 4, 6], [Some(0.25); 3]);
        let (same, rounding) = with_rounded_inputs(matrix.clone(), false, Role::Head).unwrap();
        assert_eq!((same, rounding.unwrap().scaled), (matrix, true));
    }

    #[test]
    fn inputs_that_cannot_be_rounded_are_refused() {
        let refused = |inputs, role| {
            with_rounded_inputs(nvfp4([6, 4, 6], inputs), false, role).unwrap_err().to_string()
        };
        assert!(refused([Some(1.0), None, Some(1.0)], Role::GateUp).contains("not calibrated"));
        assert!(refused([Some(1.0), Some(2.0), Some(1.0)], Role::Down).contains("more factors"));
        assert!(refused([Some(1e-35); 3], Role::GateUp).contains("beyond"));
        assert!(refused([Some(1.0); 3], Role::Router).contains("router"));
        let floats = Matrix::new(2, 2, Elements::F32(vec![1.0; 4])).unwrap();
        assert_eq!(with_rounded_inputs(floats.clone(), false, Role::GateUp).unwrap(), (floats, None));
        let table = nvfp4([6, 4, 6], [None; 3]);
        let role = Role::Embedding { head: false };
        assert_eq!(with_rounded_inputs(table.clone(), false, role).unwrap(), (table, None));
    }
}
