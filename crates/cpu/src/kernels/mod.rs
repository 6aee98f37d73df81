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

pub(crate) use lanes::{PageShape, add_values, page_scores, softmax, swiglu};

use crate::isa::Isa;
use crate::packed::{BLOCK, Line, PANEL, Packed, Panel};
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
        Self { codes: &self.codes[block * BLOCK..], scales: &self.scales[block..], sums: &self.sums[block..] }
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
                    if isa != Isa::Neon && matches!(part, Panel::Mxfp4(..)) {
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

/// An MXFP4 panel as f32 lines, the very values that the direct kernel multiplies by.
fn decode(isa: Isa, panel: Panel<'_>, out: &mut [Line]) {
    match isa {
        // SAFETY: `Isa` is only made by detection of these features.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::Avx512 => unsafe { avx2::decode(panel, out) },
        _ => portable::decode(panel, out),
    }
}
