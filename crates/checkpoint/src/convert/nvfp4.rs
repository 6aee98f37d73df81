//! NVFP4 as ModelOpt calibrates weights: the largest element decides the factor of a matrix, the largest of 16 their scale.

use ctxserve_core::{NVFP4_BLOCK, e4m3};

use super::blocks::{Block, Error, Packed, amax, code, codes, pack, rounded};

/// The largest code times the largest scale.
const RANGE: f32 = 6.0 * 448.0;
/// E4M3's 1, the scale of a block of zeros.
const ONE: u8 = 0x38;
/// E4M3's largest.
const MOST: u8 = 0x7e;

/// The factor of matrices (`weight_scale_2`) or of inputs (`input_scale`) whose largest magnitude is `amax`. Nothing but zeros
/// gets 1: readers divide by it.
pub(super) fn factor(amax: f32) -> f32 {
    if amax == 0.0 { 1.0 } else { (amax / RANGE).max(f32::MIN_POSITIVE) }
}

/// Encodes whole rows, one after another.
pub(super) fn encode(values: &[f32], factor: f32) -> Packed {
    pack(values, NVFP4_BLOCK, |values| block(values, factor))
}

fn block(values: &[f32], factor: f32) -> Block {
    let amax = amax(values);
    let scale = match amax / (6.0 * factor) {
        0.0 => ONE,
        // A block far below the matrix's largest has the least scale; zero would lose all of it.
        scale => to_e4m3(scale).max(1),
    };
    let divisor = e4m3(scale) * factor;
    let pairs = values.iter().map(|&was| {
        let is = rounded((was / divisor).abs()) * e4m3(scale) * factor;
        (f64::from(was.abs()), f64::from(is))
    });
    Block { scale, error: Error::of(pairs), codes: codes(values, |value| code(value / divisor)) }
}

/// The E4M3 value nearest to `x`, which is not negative; of two equally near the even one. Beyond 448 it is 448.
fn to_e4m3(x: f32) -> u8 {
    if x < 1.0 / 64.0 {
        // Subnormal: multiples of 2^-9. Eight of them are the first normal value, which is byte 8.
        return (x * 512.0).round_ties_even() as u8;
    }
    let bits = x.to_bits();
    // Seven bits are kept above the twentieth.
    let rounded = (bits + 0x0007_ffff + (bits >> 20 & 1)) >> 20;
    rounded.saturating_sub((127 - 7) << 3).min(u32::from(MOST)) as u8
}

#[cfg(test)]
mod tests {
    use ctxserve_core::{Elements, Matrix, Nvfp4Run};

    use super::*;

    #[test]
    fn e4m3_is_the_nearest_and_ties_are_even() {
        let check = |x: f32| {
            let found = to_e4m3(x);
            let distance = |byte: u8| (f64::from(e4m3(byte)) - f64::from(x)).abs();
            let best = (0..=MOST).map(distance).fold(f64::INFINITY, f64::min);
            let even = (0..=MOST).find(|byte| byte % 2 == 0 && distance(*byte) == best);
            assert!(distance(found) == best && even.is_none_or(|even| even == found), "{x}: {found}");
        };
        for byte in 0..MOST {
            let (a, b) = (e4m3(byte), e4m3(byte + 1));
            for part in [0.0, 0.25, 0.49999, 0.5, 0.50001, 0.75] {
                check(a + (b - a) * part);
            }
        }
        for (x, wanted) in [(0.0, 0), (1.0, ONE), (448.0, MOST), (460.0, MOST), (1e30, MOST), (1e-30, 0)] {
            assert_eq!(to_e4m3(x), wanted, "{x}");
        }
    }

    #[test]
    fn the_error_is_that_of_the_decoded_block() {
        let values: Vec<f32> = (0..64).map(|i| ((i * 37 % 64) as f32 - 31.0) * 0.01).collect();
        let factor = factor(amax(&values));
        let packed = encode(&values, factor);
        let error = packed.error;
        let runs = vec![Nvfp4Run { rows: 1, weight: factor, input: None }];
        let elements = Elements::Nvfp4 { codes: packed.codes, scales: packed.scales, runs };
        let mut found = vec![0.0; 64];
        Matrix::new(1, 64, elements).unwrap().decode_row(0, &mut found);
        let pairs = values.iter().zip(&found).map(|(&was, &is)| (f64::from(was), f64::from(is)));
        // Summed in another order.
        let wanted = Error::of(pairs);
        assert!((error.relative() - wanted.relative()).abs() < 1e-12 && error.relative() < 0.12, "{error:?}");
        // The largest element is held but for the rounding of its factors.
        let pairs = values.iter().zip(&found);
        let (was, is) = pairs.max_by(|a, b| a.0.abs().total_cmp(&b.0.abs())).unwrap();
        assert!(((was - is) / was).abs() < 1e-6, "{was} {is}");
    }

    #[test]
    fn zeros_and_what_is_far_below_the_largest() {
        let mut values = vec![0.0; 48];
        (values[0], values[20]) = (448.0 * 6.0, 1e-4);
        let packed = encode(&values, factor(amax(&values)));
        assert_eq!(packed.scales, [MOST, 1, ONE]);
        assert_eq!((packed.codes[0], packed.codes[10], packed.error.relative() < 1e-6), (7, 0, true));
        assert_eq!((factor(0.0), factor(1e-45)), (1.0, f32::MIN_POSITIVE));
        assert!(encode(&[0.0; 16], 1.0).error == Error::default());
    }
}
