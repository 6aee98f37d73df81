//! MXFP4: 32 elements share a power of two.
//!
//! The power is one of two, whichever loses less (sum of squares): the smallest that leaves no element above 6, or half of
//! that, which clips the largest and rounds the others more finely. Relative error of blocks of random numbers, root of mean
//! squares over 400,000 blocks:
//!
//! | elements | floor(log2 amax) - 2 | ceil(log2(amax / 6)) | round(log2(amax / 6)) | better of two |
//! |---|---|---|---|---|
//! | Gaussian | 0.1150 | 0.1154 | 0.1215 | 0.1116 |
//! | Gaussian, blocks of different width | 0.1155 | 0.1168 | 0.1210 | 0.1117 |
//! | Laplace | 0.1267 | 0.1321 | 0.1331 | 0.1227 |
//! | Student's t, 4 degrees | 0.1313 | 0.1393 | 0.1375 | 0.1275 |
//! | Student's t, 2 degrees | 0.1511 | 0.1378 | 0.1602 | 0.1295 |
//!
//! More candidates on either side gain nothing in the fourth digit. `tests/data/make_convert.py` measures again, and
//! defines the same encoding once more in numpy.

use ctxserve_core::{MXFP4_BLOCK, Matrix, e8m0};

use super::blocks::{Block, Error, Packed, amax, code, codes, pack, rounded};

/// Least exponent of a scale.
const LEAST: i32 = -127;

/// Encodes whole rows, one after another.
pub(super) fn encode(values: &[f32]) -> Packed {
    pack(values, MXFP4_BLOCK, block)
}

/// Codes and scales of a matrix of whole blocks, as [`encode`] has them, by this thread alone, a row at a time.
pub(crate) fn encode_rows(matrix: &Matrix) -> (Vec<u8>, Vec<u8>) {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let mut codes = Vec::with_capacity(rows * cols / 2);
    let mut scales = Vec::with_capacity(rows * cols / MXFP4_BLOCK);
    let mut wide = vec![0.0; cols];
    for row in 0..rows {
        matrix.decode_row(row, &mut wide);
        for block in wide.chunks_exact(MXFP4_BLOCK).map(block) {
            codes.extend(block.codes);
            scales.push(block.scale);
        }
    }
    (codes, scales)
}

fn block(values: &[f32]) -> Block {
    let amax = amax(values);
    if amax == 0.0 {
        return Block::default();
    }
    let high = unclipped(amax);
    let low = (high - 1).max(LEAST);
    let (high_lost, low_lost) = (lost(values, high), lost(values, low));
    // Losses are in units of the scale, and `low` has half of it.
    let lower = low_lost * 0.25 < high_lost && low < high;
    let (exponent, lost) = if lower { (low, low_lost) } else { (high, high_lost) };
    let inverse = inverse(exponent);
    let all = sum_of(values, |value| (value * inverse) * (value * inverse));
    let unit = 4_f64.powi(exponent);
    Block {
        codes: codes(values, |value| code(value * inverse)),
        scale: (exponent - LEAST) as u8,
        error: Error { lost: f64::from(lost) * unit, all: f64::from(all) * unit },
    }
}

/// The least exponent whose scale brings `amax` to 6 or below: `ceil(log2(amax / 6))` without rounding.
fn unclipped(amax: f32) -> i32 {
    let bits = amax.to_bits();
    // amax = m * 2^k with m in 1..2, and 6 = 1.5 * 2^2. Where f32 is subnormal the least exponent is what remains.
    let k = (bits >> 23) as i32 - 127;
    let above = bits & 0x007f_ffff > 0x0040_0000;
    (k - 2 + i32::from(above)).max(LEAST)
}

fn inverse(exponent: i32) -> f32 {
    e8m0((127 - exponent) as u8)
}

/// The sum of squares that a scale loses, in units of the scale.
fn lost(values: &[f32], exponent: i32) -> f32 {
    let inverse = inverse(exponent);
    sum_of(values, |value| {
        let scaled = (value * inverse).abs();
        let lost = scaled - rounded(scaled);
        lost * lost
    })
}

/// A sum over a block in a fixed order: eight running sums, then their sum in pairs.
fn sum_of(values: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    let mut sums = [0.0_f32; 8];
    for values in values.chunks_exact(8) {
        sums.iter_mut().zip(values).for_each(|(sum, &value)| *sum += term(value));
    }
    let [a, b, c, d, e, f, g, h] = sums;
    ((a + b) + (c + d)) + ((e + f) + (g + h))
}

#[cfg(test)]
mod tests {
    use ctxserve_core::{E2M1, Elements, Matrix};

    use super::*;

    fn decoded(packed: Packed, count: usize) -> Vec<f32> {
        let elements = Elements::Mxfp4 { codes: packed.codes, scales: packed.scales };
        let matrix = Matrix::new(1, count, elements).unwrap();
        let mut out = vec![0.0; count];
        matrix.decode_row(0, &mut out);
        out
    }

    #[test]
    fn what_can_be_held_exactly_is() {
        for exponent in [-127, -126, -3, 0, 1, 100, 125] {
            let scale = 2_f64.powi(exponent);
            let values: Vec<f32> =
                (0..32).map(|i| (f64::from(E2M1[i % 16]) * scale) as f32).filter(|x| x.is_finite()).collect();
            let packed = encode(&values);
            assert_eq!(packed.error.lost, 0.0, "2^{exponent}");
            assert_eq!(decoded(packed, 32), values, "2^{exponent}");
        }
    }

    #[test]
    fn exponents_at_the_edges_of_six() {
        let next = |x: f32| f32::from_bits(x.to_bits() + 1);
        for (amax, wanted) in [
            (6.0, 0),
            (next(6.0), 1),
            (4.0, 0),
            (3.0, -1),
            (next(3.0), 0),
            (1.0, -2),
            (1e-45, -127),
            (f32::MAX, 126),
        ] {
            assert_eq!(unclipped(amax), wanted, "{amax}");
        }
    }

    #[test]
    fn the_error_is_that_of_the_decoded_block_and_the_least_of_all_scales() {
        let mut state = 7_u64;
        let mut random = move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 40) as f32 / 16_777_216.0 - 0.5) * 4.0
        };
        for _ in 0..2000 {
            let values: Vec<f32> = (0..32).map(|_| random() * random() * random()).collect();
            let packed = encode(&values);
            let error = packed.error;
            let found = decoded(packed, 32);
            let pairs = values.iter().zip(&found).map(|(&was, &is)| (f64::from(was), f64::from(is)));
            let wanted = Error::of(pairs);
            assert!((error.lost - wanted.lost).abs() <= wanted.lost * 1e-5, "{error:?} {wanted:?}");
            assert!((error.all - wanted.all).abs() <= wanted.all * 1e-5);
            let high = unclipped(amax(&values));
            for exponent in high - 3..high + 3 {
                let lost = f64::from(lost(&values, exponent)) * 4_f64.powi(exponent);
                assert!(error.lost <= lost * (1.0 + 1e-5), "2^{exponent} loses {lost}, not {}", error.lost);
            }
        }
    }

    #[test]
    fn nothing_is_nothing() {
        let packed = encode(&[0.0, -0.0].repeat(16));
        assert_eq!((packed.codes, packed.scales, packed.error), (vec![0; 16], vec![0], Error::default()));
    }
}
