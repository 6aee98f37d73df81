//! Inner products of packed panels with tokens, one file per instruction set: the only home of `unsafe`.
//!
//! Every kernel adds the inputs of an output element in the same order however many tokens it is given, so results
//! are bitwise independent of the batch. Instruction sets differ from one another by rounding only.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod lanes;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

pub(crate) use lanes::{PageShape, add_values, page_scores, silu, softmax, swiglu};

use crate::isa::Isa;
use crate::packed::{BLOCK, HALVES, Line, PANEL, Packed, Panel};
use crate::quantised::QuantRow;

/// The tokens of a product: exact, or quantised.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Tokens<'a> {
    /// Rows padded with zeros to whole blocks.
    F32(&'a [&'a [f32]]),
    /// Rows as int8 blocks.
    Int8(&'a [QuantRow<'a>]),
}

impl Tokens<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F32(rows) => rows.len(),
            Self::Int8(rows) => rows.len(),
        }
    }
}

/// FP4 codes: lines, scales (E8M0 of blocks in MXFP4, E4M3 of half blocks in NVFP4), and the factors of NVFP4 rows.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
type Fp4<'a> = (&'a [Line], &'a [[u8; PANEL]], &'a [f32; PANEL]);
/// For MXFP4, which has no factors.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const NO_FACTORS: &[f32; PANEL] = &[1.0; PANEL];

/// Parts of a block of FP4 that have a scale of their own.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const fn parts(nvfp4: bool) -> usize {
    if nvfp4 { HALVES } else { 1 }
}

/// `2^exponent`.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const fn exp2(exponent: i32) -> f32 {
    f32::from_bits(((127 + exponent) as u32) << 23)
}

/// What E4M3's exponent and mantissa are short of when they are read as f32's: the difference of the biases.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const E4M3_EXPONENT: i32 = 127 - 7;

/// The inputs of one token.
trait Row: Copy {
    /// All but the first `from`, whole blocks.
    fn skip(self, from: usize) -> Self;
}

impl Row for &[f32] {
    fn skip(self, from: usize) -> Self {
        &self[from..]
    }
}

impl Row for QuantRow<'_> {
    fn skip(self, from: usize) -> Self {
        let block = from / BLOCK;
        let sums = &self.sums[HALVES * block..];
        Self { codes: &self.codes[block * BLOCK..], scales: &self.scales[block..], sums }
    }
}

/// From this many tokens on, a panel is worked off in parts that stay in the first-level cache, and decoded to f32
/// once instead of once per register block.
const MANY: usize = 8;
/// Blocks of such a part: 16 KiB of f32 weights.
const PART: usize = 8;

/// Adds panels `first..` of `weights` times all tokens to `out`, `[panels][tokens][16]`. `scratch` is kept between
/// calls.
pub(crate) fn panels(
    isa: Isa,
    weights: &Packed,
    first: usize,
    tokens: Tokens<'_>,
    scratch: &mut Vec<Line>,
    out: &mut [f32],
) {
    let stride = tokens.len() * PANEL;
    match tokens {
        Tokens::F32([x]) => {
            for (pair, out) in out.chunks_mut(2 * PANEL).enumerate() {
                let panel = weights.panel(first + 2 * pair);
                if out.len() == 2 * PANEL {
                    f32_pair(isa, [panel, weights.panel(first + 2 * pair + 1)], x, out);
                } else {
                    f32_panel(isa, panel, &[x], 0, out);
                }
            }
        }
        Tokens::F32(x) => {
            for (index, out) in out.chunks_mut(stride).enumerate() {
                let panel = weights.panel(first + index);
                if x.len() < MANY {
                    f32_panel(isa, panel, x, 0, out);
                    continue;
                }
                for block in (0..weights.blocks()).step_by(PART) {
                    let mut part = panel.part(block..(block + PART).min(weights.blocks()));
                    if isa != Isa::Neon && part.is_coded() {
                        scratch.resize(part.blocks() * BLOCK, Line([0; PANEL]));
                        decode(isa, part, scratch);
                        part = Panel::F32(scratch);
                    }
                    f32_panel(isa, part, x, block * BLOCK, out);
                }
            }
        }
        Tokens::Int8(x) => {
            for (index, out) in out.chunks_mut(stride).enumerate() {
                int8_panel(isa, weights.panel(first + index), x, out);
            }
        }
    }
}

/// Adds one panel times tokens, whose inputs start at `from`, to `[tokens][16]`.
fn f32_panel(isa: Isa, panel: Panel<'_>, x: &[&[f32]], from: usize, out: &mut [f32]) {
    match isa {
        // SAFETY: `Isa` is only made by detection of these features.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::f32_panel(panel, x, from, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::f32_panel(panel, x, from, out) },
        // SAFETY: NEON is part of AArch64.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => unsafe { neon::f32_panel(panel, x, from, out) },
        _ => portable::f32_panel(panel, x, from, out),
    }
}

/// Adds two panels times one token to `[2][16]`: twice as many chains in flight.
fn f32_pair(isa: Isa, panels: [Panel<'_>; 2], x: &[f32], out: &mut [f32]) {
    match isa {
        // SAFETY: `Isa` is only made by detection of these features.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::f32_pair(panels, x, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::f32_pair(panels, x, out) },
        _ => {
            for (panel, out) in panels.into_iter().zip(out.chunks_mut(PANEL)) {
                f32_panel(isa, panel, &[x], 0, out);
            }
        }
    }
}

/// Adds one panel times quantised tokens to `[tokens][16]`.
fn int8_panel(isa: Isa, panel: Panel<'_>, x: &[QuantRow<'_>], out: &mut [f32]) {
    match isa {
        // SAFETY: `Isa` is only made by detection of these features.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::int8_panel(panel, x, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::int8_panel(panel, x, out) },
        // SAFETY: NEON is part of AArch64.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => unsafe { neon::int8_panel(panel, x, out) },
        _ => portable::int8_panel(panel, x, out),
    }
}

/// A panel of codes as f32 lines, the very values that the direct kernel multiplies by.
fn decode(isa: Isa, panel: Panel<'_>, out: &mut [Line]) {
    match isa {
        // SAFETY: `Isa` is only made by detection of these features.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::Avx512 => unsafe { avx2::decode(panel, out) },
        _ => portable::decode(panel, out),
    }
}
