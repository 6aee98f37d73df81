//! Stored weights to f32, element by element: what the encodings mean.

use ctxserve_core::{Elements, MXFP4_BLOCK, Matrix};

/// Values of the sixteen E2M1 codes.
pub(crate) const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The power of two of an E8M0 byte; 255 is NaN and refused by checkpoints.
pub(crate) fn e8m0(scale: u8) -> f32 {
    match scale {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(scale) << 23),
    }
}

/// Decodes a row of `matrix` into `out` (`[cols]`).
pub(crate) fn decode_row(matrix: &Matrix, row: usize, out: &mut [f32]) {
    let cols = matrix.cols();
    match matrix.elements() {
        Elements::F32(values) => out.copy_from_slice(&values[row * cols..][..cols]),
        Elements::Bf16(values) => {
            out.iter_mut().zip(&values[row * cols..][..cols]).for_each(|(x, value)| *x = value.to_f32());
        }
        Elements::Mxfp4 { codes, scales } => {
            let codes = &codes[row * cols / 2..][..cols / 2];
            let scales = &scales[row * cols / MXFP4_BLOCK..][..cols / MXFP4_BLOCK];
            for (k, x) in out.iter_mut().enumerate() {
                let code = codes[k / 2] >> (4 * (k % 2)) & 15;
                *x = E2M1[code as usize] * e8m0(scales[k / MXFP4_BLOCK]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low_nibbles_come_first_and_scales_are_powers_of_two() {
        let mut codes = vec![0; 16];
        codes[0] = 0x7a;
        codes[15] = 0xf1;
        let elements = Elements::Mxfp4 { codes, scales: vec![128] };
        let matrix = Matrix::new(1, 32, elements).unwrap();
        let mut out = [0.0; 32];
        decode_row(&matrix, 0, &mut out);
        assert_eq!((out[0], out[1], out[30], out[31]), (-2.0, 12.0, 1.0, -12.0));
        assert_eq!((e8m0(127), e8m0(0), e8m0(254)), (1.0, 2.0_f32.powi(-127), 2.0_f32.powi(127)));
    }
}
