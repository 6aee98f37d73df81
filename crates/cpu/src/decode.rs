//! Stored weights to f32, element by element: what the encodings mean.

use ctxserve_core::Matrix;
pub(crate) use ctxserve_core::{E2M1, e4m3, e8m0};

/// Decodes a row of `matrix` into `out` (`[cols]`).
pub(crate) fn decode_row(matrix: &Matrix, row: usize, out: &mut [f32]) {
    matrix.decode_row(row, out);
}
