//! FP4 codes and the blocks that they come in.

use std::convert::Infallible;

use crate::parallel;

/// Blocks per piece of work.
const PIECE: usize = 1 << 14;

/// An encoded block; of 16 elements only the first half of `codes` counts.
#[derive(Clone, Copy, Default)]
pub(super) struct Block {
    /// Two codes a byte, the first in the low nibble.
    pub(super) codes: [u8; 16],
    pub(super) scale: u8,
    pub(super) error: Error,
}

/// Sums of squares: what is lost, and what there was.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Error {
    pub(super) lost: f64,
    pub(super) all: f64,
}

impl Error {
    pub(super) fn of(values: impl Iterator<Item = (f64, f64)>) -> Self {
        values.fold(Self::default(), |sum, (was, is)| {
            sum + Self { lost: (was - is) * (was - is), all: was * was }
        })
    }

    /// Root of the share that is lost; all of it where there was nothing and is something.
    pub(super) fn relative(self) -> f64 {
        if self.lost == 0.0 { 0.0 } else { (self.lost / self.all).sqrt() }
    }
}

impl std::ops::Add for Error {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { lost: self.lost + other.lost, all: self.all + other.all }
    }
}

/// Codes and scales of a run of elements.
pub(super) struct Packed {
    pub(super) codes: Vec<u8>,
    pub(super) scales: Vec<u8>,
    pub(super) error: Error,
}

/// Encodes `values`, a whole number of blocks of `size` elements, by several threads.
pub(super) fn pack(values: &[f32], size: usize, encode: impl Fn(&[f32]) -> Block + Sync) -> Packed {
    let mut blocks = vec![Block::default(); values.len() / size];
    let Ok(()) = parallel::pieces(&mut blocks, PIECE, |first, blocks| {
        for (block, values) in blocks.iter_mut().zip(values.chunks_exact(size).skip(first)) {
            *block = encode(values);
        }
        Ok::<_, Infallible>(())
    });
    let mut codes = Vec::with_capacity(values.len() / 2);
    blocks.iter().for_each(|block| codes.extend(block.codes.iter().take(size / 2)));
    Packed {
        codes,
        scales: blocks.iter().map(|block| block.scale).collect(),
        // In order, so that the sum does not depend on the threads.
        error: blocks.iter().fold(Error::default(), |sum, block| sum + block.error),
    }
}

/// The E2M1 magnitude nearest to `a`, which is not negative; of two equally near the one whose code is even. Beyond 6 it
/// is 6. Without branches, so that many are rounded at once.
pub(super) fn rounded(a: f32) -> f32 {
    // Numbers of this size are multiples of 1/2, of 1 and of 2: the addition rounds to them, ties to even.
    const HALVES: f32 = 6_291_456.0;
    const ONES: f32 = 2.0 * HALVES;
    const TWOS: f32 = 4.0 * HALVES;
    let (fine, middle, coarse) = ((a + HALVES) - HALVES, (a + ONES) - ONES, (a + TWOS) - TWOS);
    let coarse = if coarse > 6.0 { 6.0 } else { coarse };
    let middle = if a < 4.0 { middle } else { coarse };
    if a < 2.0 { fine } else { middle }
}

/// The code of the E2M1 value nearest to `x`, as [`rounded`] has it.
pub(super) fn code(x: f32) -> u8 {
    const UNITS: f32 = 8_388_608.0;
    let value = rounded(x.abs());
    let upper = if value <= 4.0 { value + 2.0 } else { 7.0 };
    let index = if value < 2.0 { value + value } else { upper };
    // The number is in the lowest bits of one whose last bit counts one.
    let index = (index + UNITS).to_bits() as u8;
    index + if x < 0.0 { 8 } else { 0 }
}

/// Packs the codes of at most 32 elements.
pub(super) fn codes(values: &[f32], code: impl Fn(f32) -> u8) -> [u8; 16] {
    let mut bytes = [0; 16];
    for (byte, pair) in bytes.iter_mut().zip(values.chunks_exact(2)) {
        *byte = pair.iter().rev().fold(0, |byte, &value| byte << 4 | code(value));
    }
    bytes
}

/// The largest magnitude of finite numbers.
pub(super) fn amax(values: &[f32]) -> f32 {
    // Their bits are in the order of their magnitudes.
    f32::from_bits(values.iter().fold(0, |most, value| most.max(value.to_bits() & 0x7fff_ffff)))
}

#[cfg(test)]
mod tests {
    use ctxserve_core::E2M1;

    use super::*;

    #[test]
    fn codes_are_the_nearest_and_ties_are_even() {
        for step in -8000..=8000_i32 {
            let x = step as f32 / 1000.0;
            let found = code(x);
            let distance = |code: usize| (f64::from(E2M1[code]) - f64::from(x)).abs();
            let best = (0..16).map(distance).fold(f64::INFINITY, f64::min);
            assert_eq!(distance(usize::from(found)), best, "{x}");
            let even = (0..16).filter(|&code| distance(code) == best).any(|code| code % 2 == 0);
            let tie = (0..8).filter(|&code| distance(code) == best || distance(code + 8) == best).count() > 1;
            assert!(!tie || (even && found.is_multiple_of(2)), "{x}");
            assert_eq!(found & 8 != 0, x < 0.0, "{x}");
        }
        assert_eq!((code(f32::INFINITY), code(-1e30), code(1e7), code(-0.0), code(-0.1)), (7, 15, 7, 0, 8));
    }

    #[test]
    fn blocks_keep_their_order_whatever_the_threads() {
        let count = PIECE * 3 + 5;
        let values: Vec<f32> = (0..count * 16).map(|i| (i / 16) as f32).collect();
        let packed = pack(&values, 16, |block| {
            let number = block[0] as usize;
            let mut codes = [0; 16];
            codes[7] = (number % 251) as u8;
            Block { codes, scale: (number % 7) as u8, error: Error { lost: 1.0, all: 2.0 } }
        });
        assert_eq!((packed.codes.len(), packed.scales.len()), (count * 8, count));
        assert!(packed.codes.chunks(8).enumerate().all(|(i, codes)| codes[7] == (i % 251) as u8));
        assert!(packed.scales.iter().enumerate().all(|(i, &scale)| scale == (i % 7) as u8));
        assert_eq!(packed.error, Error { lost: count as f64, all: 2.0 * count as f64 });
    }
}
