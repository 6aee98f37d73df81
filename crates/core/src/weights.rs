//! Weights in host memory on their way from a checkpoint to a device.

use half::bf16;

/// How the elements of a matrix are stored. A backend says which it takes as they are; the rest are decoded
/// to [`Encoding::Bf16`] on the way (checkpoint formats know how).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// IEEE single precision.
    F32,
    /// bfloat16.
    Bf16,
    /// OCP microscaling FP4: E2M1 codes, one E8M0 scale byte per 32 along a row.
    Mxfp4,
}

/// Elements that share one MXFP4 scale.
pub const MXFP4_BLOCK: usize = 32;

/// The elements of a [`Matrix`], row-major.
#[derive(Clone, Debug, PartialEq)]
pub enum Elements {
    /// `rows * cols` values.
    F32(Vec<f32>),
    /// `rows * cols` values.
    Bf16(Vec<bf16>),
    /// Element `2i` of a row is the low nibble of byte `i`; value `e2m1(code) * 2^(scale - 127)`.
    Mxfp4 {
        /// `rows * cols / 2` bytes.
        codes: Vec<u8>,
        /// `rows * cols / 32` bytes, none of them 255 (NaN).
        scales: Vec<u8>,
    },
}

/// A matrix `[rows, cols]` = `[out, in]`. Expert stacks are one matrix with `rows = experts * out`.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    rows: usize,
    cols: usize,
    elements: Elements,
}

impl Matrix {
    /// Pairs elements with their shape; `None` when the lengths disagree (or MXFP4 with `cols % 32 != 0`).
    pub fn new(rows: usize, cols: usize, elements: Elements) -> Option<Self> {
        let count = rows.checked_mul(cols)?;
        let fits = match &elements {
            Elements::F32(values) => values.len() == count,
            Elements::Bf16(values) => values.len() == count,
            Elements::Mxfp4 { codes, scales } => {
                cols.is_multiple_of(MXFP4_BLOCK)
                    && codes.len() == count / 2
                    && scales.len() == count / MXFP4_BLOCK
            }
        };
        fits.then_some(Self { rows, cols, elements })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How it is stored.
    pub fn encoding(&self) -> Encoding {
        match self.elements {
            Elements::F32(_) => Encoding::F32,
            Elements::Bf16(_) => Encoding::Bf16,
            Elements::Mxfp4 { .. } => Encoding::Mxfp4,
        }
    }

    /// The stored elements.
    pub fn elements(&self) -> &Elements {
        &self.elements
    }

    /// Gives the stored elements away.
    pub fn into_elements(self) -> Elements {
        self.elements
    }
}
