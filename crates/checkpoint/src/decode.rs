//! Packed elements into bfloat16, for backends without a kernel for the encoding.

use ctxserve_core::{E2M1, Elements, MXFP4_BLOCK, Matrix, e8m0};
use half::bf16;

/// The same matrix with bfloat16 elements. Exact for MXFP4 (one significant bit more than the sign and
/// exponent; scales above 2^125 may overflow to infinity), rounded to nearest even for the others.
pub fn to_bf16(matrix: Matrix) -> Matrix {
    let values = match matrix.elements() {
        Elements::Bf16(_) => return matrix,
        Elements::F32(values) => values.iter().copied().map(bf16::from_f32).collect(),
        Elements::Mxfp4 { codes, scales } => mxfp4(codes, scales),
        Elements::Nvfp4 { .. } | Elements::Affine { .. } => rounded(&matrix),
    };
    // The lengths fit by construction, so the matrix is never handed back as it was.
    Matrix::new(matrix.rows(), matrix.cols(), Elements::Bf16(values)).unwrap_or(matrix)
}

/// Row by row through f32.
fn rounded(matrix: &Matrix) -> Vec<bf16> {
    let mut row = vec![0.0; matrix.cols()];
    let mut out = Vec::with_capacity(matrix.rows() * matrix.cols());
    for at in 0..matrix.rows() {
        matrix.decode_row(at, &mut row);
        out.extend(row.iter().copied().map(bf16::from_f32));
    }
    out
}

fn mxfp4(codes: &[u8], scales: &[u8]) -> Vec<bf16> {
    let mut out = Vec::with_capacity(codes.len() * 2);
    for (block, &scale) in codes.chunks_exact(MXFP4_BLOCK / 2).zip(scales) {
        let scale = e8m0(scale);
        let table = E2M1.map(|value| bf16::from_f32(value * scale));
        for &byte in block {
            out.extend([table[usize::from(byte & 15)], table[usize::from(byte >> 4)]]);
        }
    }
    out
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
    fn f32_rounds_to_nearest_even_and_bf16_is_kept() {
        let ties = vec![1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -0.1];
        let matrix = Matrix::new(1, 3, Elements::F32(ties)).unwrap();
        let rounded = to_bf16(matrix);
        let wanted = [0x3f80, 0x3f82, 0xbdcd].map(bf16::from_bits).to_vec();
        assert_eq!(rounded.elements(), &Elements::Bf16(wanted));
        assert_eq!(to_bf16(rounded.clone()), rounded);
    }
}
