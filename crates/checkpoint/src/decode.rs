//! Packed elements into bfloat16, for backends without a kernel for the encoding.

use std::convert::Infallible;

use bytemuck::Pod;
use ctxserve_core::{E2M1, Elements, MXFP4_BLOCK, Matrix, e8m0};
use half::bf16;

use crate::parallel;
use crate::values::PIECE;

/// The same matrix with bfloat16 elements. Exact for MXFP4 (one significant bit more than the sign and
/// exponent; scales above 2^125 may overflow to infinity), rounded to nearest even for the others.
pub fn to_bf16(matrix: Matrix) -> Matrix {
    let values = match matrix.elements() {
        Elements::Bf16(_) => return matrix,
        Elements::Mxfp4 { codes, scales } => by_rows(&matrix, |first, out| {
            let blocks = first * (matrix.cols() / MXFP4_BLOCK)..;
            let (codes, scales) = (&codes[blocks.start * MXFP4_BLOCK / 2..], &scales[blocks]);
            mxfp4(codes, scales, out);
        }),
        Elements::F32(_) | Elements::Nvfp4 { .. } | Elements::Affine { .. } => {
            by_rows(&matrix, |first, out| {
                let mut wide = vec![0.0; matrix.cols()];
                for (row, out) in (first..).zip(out.chunks_mut(matrix.cols())) {
                    matrix.decode_row(row, &mut wide);
                    out.iter_mut().zip(&wide).for_each(|(out, &wide)| *out = bf16::from_f32(wide));
                }
            })
        }
    };
    // The lengths fit by construction, so the matrix is never handed back as it was.
    Matrix::new(matrix.rows(), matrix.cols(), Elements::Bf16(values)).unwrap_or(matrix)
}

/// All elements as f32, row by row.
pub(crate) fn to_f32(matrix: &Matrix) -> Vec<f32> {
    by_rows(matrix, |first, out| {
        for (row, out) in (first..).zip(out.chunks_mut(matrix.cols())) {
            matrix.decode_row(row, out);
        }
    })
}

/// Calls `fill(first row, rows)` until all elements are filled.
fn by_rows<T: Pod + Send>(matrix: &Matrix, fill: impl Fn(usize, &mut [T]) + Sync) -> Vec<T> {
    let cols = matrix.cols();
    let mut out = vec![T::zeroed(); matrix.rows() * cols];
    if let Some(rows) = (PIECE / size_of::<T>()).checked_div(cols) {
        let piece = rows.max(1) * cols;
        let Ok(()) = parallel::pieces(&mut out, piece, |at, out| {
            fill(at / cols, out);
            Ok::<_, Infallible>(())
        });
    }
    out
}

fn mxfp4(codes: &[u8], scales: &[u8], out: &mut [bf16]) {
    let blocks = out.chunks_exact_mut(MXFP4_BLOCK).zip(codes.chunks_exact(MXFP4_BLOCK / 2));
    for ((out, codes), &scale) in blocks.zip(scales) {
        let scale = e8m0(scale);
        let table = E2M1.map(|value| bf16::from_f32(value * scale));
        for (pair, &byte) in out.chunks_exact_mut(2).zip(codes) {
            pair[0] = table[usize::from(byte & 15)];
            pair[1] = table[usize::from(byte >> 4)];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The value of a code from the definition of E2M1 (bias 1, subnormal 0.5), in f64.
    fn e2m1(code: u8) -> f64 {
        let sign = if code & 8 == 0 { 1.0 } else { -1.0 };
        let (exponent, mantissa) = (i32::from((code >> 1) & 3), f64::from(code & 1));
        let magnitude =
            if exponent == 0 { mantissa * 0.5 } else { (1.0 + mantissa / 2.0) * 2_f64.powi(exponent - 1) };
        sign * magnitude
    }

    #[test]
    fn every_code_at_every_scale_is_exact() {
        // One row per scale; the block holds each code twice, in both nibbles.
        let block: Vec<u8> = (0..16).map(|code| code | (15 - code) << 4).collect();
        let scales: Vec<u8> = (0..=254).collect();
        let codes = block.repeat(255);
        let matrix = Matrix::new(255, 32, Elements::Mxfp4 { codes, scales }).unwrap();
        let Elements::Bf16(values) = to_bf16(matrix).into_elements() else { panic!("bf16") };
        for (row, values) in values.chunks_exact(32).enumerate() {
            for (i, pair) in values.chunks_exact(2).enumerate() {
                for (value, code) in [(pair[0], i as u8), (pair[1], 15 - i as u8)] {
                    let exact = e2m1(code) * 2_f64.powi(row as i32 - 127);
                    // Beyond the range of f32 and bf16 alike.
                    let wanted = if exact.abs() >= 2_f64.powi(128) { exact * f64::INFINITY } else { exact };
                    assert_eq!(value.to_f64(), wanted, "scale {row} code {code}");
                }
            }
        }
    }

    #[test]
    fn every_row_is_decoded_whatever_the_pieces() {
        let (rows, cols) = (3000, 1024);
        let values: Vec<f32> = (0..rows * cols).map(|i| (i / cols) as f32).collect();
        let scales: Vec<u8> = (0..rows * cols / 32).map(|i| 100 + (i / (cols / 32) % 50) as u8).collect();
        let packed = Elements::Mxfp4 { codes: vec![0x22; rows * cols / 2], scales };
        for (elements, wanted) in [
            (Elements::F32(values), (|row| bf16::from_f32(row as f32)) as fn(usize) -> bf16),
            (packed, |row| bf16::from_f32(2_f32.powi(row as i32 % 50 - 27))),
        ] {
            let matrix = to_bf16(Matrix::new(rows, cols, elements).unwrap());
            let Elements::Bf16(values) = matrix.elements() else { panic!("bf16") };
            let whole = |(row, values): (usize, &[bf16])| values.iter().all(|&value| value == wanted(row));
            assert!(values.chunks(cols).enumerate().all(whole));
        }
        let empty = to_bf16(Matrix::new(3, 0, Elements::F32(Vec::new())).unwrap());
        assert_eq!((empty.rows(), empty.encoding()), (3, ctxserve_core::Encoding::Bf16));
    }

    #[test]
    fn f32_rounds_to_nearest_even_and_bf16_is_kept() {
        let ties = vec![1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -0.1];
        let matrix = Matrix::new(1, 3, Elements::F32(ties)).unwrap();
        let rounded = to_bf16(matrix);
        let wanted = [0x3f80, 0x3f82, 0xbdcd].map(bf16::from_bits).to_vec();
        assert_eq!(rounded.elements(), &Elements::Bf16(wanted));
        assert_eq!(to_bf16(rounded.clone()), rounded);
    }
}
