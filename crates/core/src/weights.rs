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
    /// NVIDIA's FP4: E2M1 codes, one E4M3 scale per 16 along a row, one factor per run of rows.
    Nvfp4,
    /// Integers with a scale and an offset per group along a row, as MLX stores them.
    Affine,
}

/// Elements that share one MXFP4 scale.
pub const MXFP4_BLOCK: usize = 32;
/// Elements that share one NVFP4 scale.
pub const NVFP4_BLOCK: usize = 16;

/// Factors of a run of NVFP4 rows: projections that were fused keep their own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nvfp4Run {
    /// Rows of the run.
    pub rows: usize,
    /// Factor of its weights (`weight_scale_2`): a weight is `e2m1(code) * e4m3(scale) * weight`.
    pub weight: f32,
    /// Factor of its inputs (`input_scale`), where the checkpoint was calibrated: activations quantised with it are
    /// `e2m1(code) * e4m3(scale) * input`.
    pub input: Option<f32>,
}

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
    /// Element `2i` of a row is the low nibble of byte `i`; see [`Nvfp4Run`].
    Nvfp4 {
        /// `rows * cols / 2` bytes.
        codes: Vec<u8>,
        /// `rows * cols / 16` E4M3 values, none of them NaN.
        scales: Vec<u8>,
        /// In order; their rows add up to those of the matrix.
        runs: Vec<Nvfp4Run>,
    },
    /// Element `i` of a row is `scale * code + offset` of its group; codes lie in a row from the lowest bit of its first byte on.
    Affine {
        /// Bits of a code: 4 or 8.
        bits: usize,
        /// Elements of a group.
        group: usize,
        /// `rows * cols * bits / 8` bytes.
        codes: Vec<u8>,
        /// `rows * cols / group` values, of either sign.
        scales: Vec<f32>,
        /// As many.
        offsets: Vec<f32>,
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
    /// Pairs elements with their shape; `None` when the lengths disagree, or `cols` is no multiple of the elements that share a
    /// scale.
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
            Elements::Nvfp4 { codes, scales, runs } => {
                let run_rows = runs.iter().try_fold(0_usize, |sum, run| sum.checked_add(run.rows));
                cols.is_multiple_of(NVFP4_BLOCK)
                    && codes.len() == count / 2
                    && scales.len() == count / NVFP4_BLOCK
                    && run_rows == Some(rows)
            }
            Elements::Affine { bits, group, codes, scales, offsets } => {
                matches!(bits, 4 | 8)
                    && *group > 0
                    && group.is_multiple_of(8)
                    && cols.is_multiple_of(*group)
                    && codes.len() == count / 8 * bits
                    && scales.len() == count / group
                    && offsets.len() == scales.len()
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
            Elements::Nvfp4 { .. } => Encoding::Nvfp4,
            Elements::Affine { .. } => Encoding::Affine,
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
