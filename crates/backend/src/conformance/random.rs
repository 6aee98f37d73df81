//! Seeded inputs.

use ctxserve_core::{Elements, Encoding, MXFP4_BLOCK, Matrix, NVFP4_BLOCK, Nvfp4Run};
use half::bf16;

use crate::DeviceError;

/// SplitMix64.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// A stream of its own for every seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `bound`, which is positive.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.bits() % bound as u64) as usize
    }

    /// Uniform in `[-1, 1)`.
    pub fn signed(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
    }

    /// `count` values uniform in `[-scale, scale)`.
    pub fn vector(&mut self, count: usize, scale: f32) -> Vec<f32> {
        (0..count).map(|_| self.signed() * scale).collect()
    }

    /// A random order of `0..count`.
    pub fn order(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        for at in (1..count).rev() {
            order.swap(at, self.below(at + 1));
        }
        order
    }

    /// A matrix whose products with rows of unit size have about unit size.
    ///
    /// # Errors
    /// A shape that the encoding cannot have.
    pub fn matrix(&mut self, rows: usize, cols: usize, encoding: Encoding) -> Result<Matrix, DeviceError> {
        let scale = 1.7 / (cols as f32).sqrt();
        let elements = match encoding {
            Encoding::F32 => Elements::F32(self.vector(rows * cols, scale)),
            Encoding::Bf16 => {
                Elements::Bf16((0..rows * cols).map(|_| bf16::from_f32(self.signed() * scale)).collect())
            }
            Encoding::Mxfp4 => {
                // The middle of three scales makes a code of 3 about 1.7 * scale.
                let middle = (126.0 + (scale * 0.6).log2().round()).clamp(2.0, 250.0) as u8;
                let codes = (0..rows * cols / 2).map(|_| self.bits() as u8).collect();
                let count = rows * cols / MXFP4_BLOCK;
                let scales = (0..count).map(|_| middle - 1 + self.below(3) as u8).collect();
                Elements::Mxfp4 { codes, scales }
            }
            Encoding::Nvfp4 => {
                let codes = (0..rows * cols / 2).map(|_| self.bits() as u8).collect();
                // E4M3 from 0.5 to 1.875, codes of about 3; two runs of rows, as fused projections are.
                let scales = (0..rows * cols / NVFP4_BLOCK).map(|_| 0x30 + self.below(16) as u8).collect();
                // Inputs of unit size and five times that come out at six times the largest scale.
                let input = Some(5.0 / 2688.0);
                let run = |rows, weight| Nvfp4Run { rows, weight, input };
                let runs = vec![run(rows / 2, scale * 0.2), run(rows - rows / 2, scale * 0.15)];
                Elements::Nvfp4 { codes, scales, runs }
            }
            Encoding::Affine => {
                let bits = 4 << self.below(2);
                let groups: Vec<usize> =
                    [32, 64, 128].into_iter().filter(|&group| cols.is_multiple_of(group)).collect();
                // Without any, the matrix is refused below.
                let group = groups.get(self.below(groups.len().max(1))).copied().unwrap_or(32);
                let codes = (0..rows * cols * bits / 8).map(|_| self.bits() as u8).collect();
                // Codes that span about four scales, whatever their width, around zero.
                let most = ((1 << bits) - 1) as f32;
                let scales = self.vector(rows * cols / group, scale * 4.0 / most);
                let offsets = scales.iter().map(|scale| -0.5 * most * scale).collect();
                Elements::Affine { bits, group, codes, scales, offsets }
            }
        };
        matrix(rows, cols, elements)
    }
}

/// A matrix, or an error that names the shape.
pub(super) fn matrix(rows: usize, cols: usize, elements: Elements) -> Result<Matrix, DeviceError> {
    Matrix::new(rows, cols, elements)
        .ok_or_else(|| DeviceError::new("conformance", format!("no matrix of [{rows}, {cols}]")))
}
