//! What the encodings mean: elements to f32.

use crate::{Elements, MXFP4_BLOCK, Matrix, NVFP4_BLOCK};

/// Values of the sixteen E2M1 codes: bit 3 is the sign.
pub const E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The power of two of an E8M0 byte; 255 is NaN. Byte 0 is a subnormal of f32.
pub fn e8m0(byte: u8) -> f32 {
    match byte {
        0 => f32::from_bits(0x0040_0000),
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(byte) << 23),
    }
}

/// The value of an E4M3 byte (bias 7, no infinities; 0x7f and 0xff are NaN).
pub fn e4m3(byte: u8) -> f32 {
    let magnitude = byte & 0x7f;
    let value = match (magnitude >> 3, magnitude & 7) {
        (15, 7) => f32::NAN,
        (0, mantissa) => f32::from(mantissa) / 512.0,
        // Exponent and mantissa are in f32's places but for the bias.
        _ => f32::from_bits((u32::from(magnitude) << 20) + ((127 - 7) << 23)),
    };
    if byte & 0x80 == 0 { value } else { -value }
}

impl Matrix {
    /// Decodes row `row` into `out`, `[cols]`. Products of codes and block scales are exact; the factor of an NVFP4 run and the
    /// offset of an affine group round once more, to nearest.
    ///
    /// # Panics
    /// When `row` or the length of `out` is not the matrix's: slices are cut by them.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        let cols = self.cols();
        let start = row * cols;
        match self.elements() {
            Elements::F32(values) => out.copy_from_slice(&values[start..start + cols]),
            Elements::Bf16(values) => {
                out.iter_mut().zip(&values[start..start + cols]).for_each(|(x, value)| *x = value.to_f32());
            }
            Elements::Mxfp4 { codes, scales } => {
                let blocks = &scales[start / MXFP4_BLOCK..(start + cols) / MXFP4_BLOCK];
                decode_e2m1(&codes[start / 2..(start + cols) / 2], out, MXFP4_BLOCK, |at| e8m0(blocks[at]));
            }
            Elements::Nvfp4 { codes, scales, runs } => {
                let blocks = &scales[start / NVFP4_BLOCK..(start + cols) / NVFP4_BLOCK];
                decode_e2m1(&codes[start / 2..(start + cols) / 2], out, NVFP4_BLOCK, |at| e4m3(blocks[at]));
                let mut end = 0;
                let run = runs.iter().find(|run| {
                    end += run.rows;
                    row < end
                });
                let factor = run.map_or(1.0, |run| run.weight);
                out.iter_mut().for_each(|x| *x *= factor);
            }
            Elements::Affine { bits, group, codes, scales, offsets } => {
                let codes = &codes[start * bits / 8..(start + cols) * bits / 8];
                let groups = out.chunks_mut(*group).zip(codes.chunks(group * bits / 8));
                for ((out, codes), at) in groups.zip(start / group..) {
                    let (scale, offset) = (scales[at], offsets[at]);
                    let value = |code: u8| scale * f32::from(code) + offset;
                    if *bits == 4 {
                        for (pair, &byte) in out.chunks_mut(2).zip(codes) {
                            let values = [value(byte & 15), value(byte >> 4)];
                            pair.iter_mut().zip(values).for_each(|(x, value)| *x = value);
                        }
                    } else {
                        out.iter_mut().zip(codes).for_each(|(x, &code)| *x = value(code));
                    }
                }
            }
        }
    }
}

/// Pairs of codes, low nibble first, times the scale of their block.
fn decode_e2m1(codes: &[u8], out: &mut [f32], block: usize, scale: impl Fn(usize) -> f32) {
    for (at, (out, codes)) in out.chunks_mut(block).zip(codes.chunks(block / 2)).enumerate() {
        let scale = scale(at);
        for (pair, &byte) in out.chunks_mut(2).zip(codes) {
            let values = [E2M1[usize::from(byte & 15)], E2M1[usize::from(byte >> 4)]];
            pair.iter_mut().zip(values).for_each(|(x, value)| *x = value * scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::Nvfp4Run;

    fn row(matrix: &Matrix, row: usize) -> Vec<f32> {
        let mut out = vec![f32::NAN; matrix.cols()];
        matrix.decode_row(row, &mut out);
        out
    }

    #[test]
    fn e4m3_is_what_its_bits_say() {
        for byte in 0..=255_u8 {
            let (exponent, mantissa) = (i32::from(byte >> 3 & 15), f64::from(byte & 7));
            let magnitude = match exponent {
                0 => mantissa / 8.0 * 2_f64.powi(-6),
                _ => (1.0 + mantissa / 8.0) * 2_f64.powi(exponent - 7),
            };
            let value = if byte & 0x80 == 0 { magnitude } else { -magnitude };
            let found = e4m3(byte);
            assert!(if byte & 0x7f == 0x7f { found.is_nan() } else { f64::from(found) == value }, "{byte}");
        }
    }

    #[test]
    fn low_nibbles_come_first_and_scales_are_powers_of_two() {
        let mut codes = vec![0; 16];
        codes[0] = 0x7a;
        codes[15] = 0xf1;
        let matrix = Matrix::new(1, 32, Elements::Mxfp4 { codes, scales: vec![128] }).unwrap();
        let out = row(&matrix, 0);
        assert_eq!((out[0], out[1], out[30], out[31]), (-2.0, 12.0, 1.0, -12.0));
        assert_eq!((e8m0(127), e8m0(0), e8m0(254)), (1.0, 2.0_f32.powi(-127), 2.0_f32.powi(127)));
    }

    #[test]
    fn runs_of_nvfp4_rows_have_their_own_factor() {
        // 0x38 is 1, 0x40 is 2.
        let scales = vec![0x38, 0x40, 0x38, 0x40, 0x38, 0x40];
        let run = |rows, weight| Nvfp4Run { rows, weight, input: None };
        let elements =
            Elements::Nvfp4 { codes: vec![0x92; 48], scales, runs: vec![run(2, 0.5), run(1, -3.0)] };
        let matrix = Matrix::new(3, 32, elements).unwrap();
        assert_eq!((row(&matrix, 1)[0], row(&matrix, 1)[1], row(&matrix, 1)[16]), (0.5, -0.25, 1.0));
        assert_eq!((row(&matrix, 2)[0], row(&matrix, 2)[31]), (-3.0, 3.0));
    }

    #[test]
    fn affine_groups_have_scale_and_offset() {
        let elements = |bits, codes| Elements::Affine {
            bits,
            group: 8,
            codes,
            scales: vec![0.5, -2.0],
            offsets: vec![1.0, 10.0],
        };
        let four = Matrix::new(1, 16, elements(4, vec![0x21, 0, 0, 0, 0xf0, 0, 0, 0])).unwrap();
        let out = row(&four, 0);
        assert_eq!((out[0], out[1], out[2], out[8], out[9]), (1.5, 2.0, 1.0, 10.0, -20.0));
        let mut codes = vec![0; 16];
        codes[8] = 255;
        let eight = Matrix::new(1, 16, elements(8, codes)).unwrap();
        assert_eq!((row(&eight, 0)[0], row(&eight, 0)[8]), (1.0, -500.0));
        assert!(Matrix::new(1, 12, elements(8, vec![0; 12])).is_none());
    }

    #[test]
    fn floats_are_as_they_are() {
        let matrix = Matrix::new(2, 1, Elements::Bf16(vec![bf16::ONE, bf16::from_f32(-2.0)])).unwrap();
        assert_eq!(row(&matrix, 1), [-2.0]);
        assert_eq!(row(&Matrix::new(1, 1, Elements::F32(vec![0.1])).unwrap(), 0), [0.1]);
    }
}
