//! Weights as the SIMD kernels stream them: panels of 16 output rows, interleaved a dword per row.
//!
//! A [`Line`] is one cache line: dword `r` belongs to row `r` of the panel and holds 1 (f32), 2 (bf16), 4 (8 bits)
//! or 8 (4 bits) consecutive inputs of that row. A vector lane is thus a row, every output element is one chain of
//! additions in the order of its inputs, and neither the number of tokens nor the split over threads can change it.

use std::ops::Range;

use ctxserve_backend::DeviceError;
use ctxserve_core::{Elements, MXFP4_BLOCK, Matrix, NVFP4_BLOCK};
use half::bf16;
use rayon::prelude::*;

use crate::decode::{E2M1, decode_row, e4m3, e8m0};

/// Output rows of a panel.
pub(crate) const PANEL: usize = 16;
/// Inputs of a block; inputs are padded with zeros to whole blocks.
pub(crate) const BLOCK: usize = MXFP4_BLOCK;
/// NVFP4 scales of a block.
pub(crate) const HALVES: usize = BLOCK / NVFP4_BLOCK;

/// One dword per row of a panel.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u32; PANEL]);

/// How the dwords of a line are read, with the block scales of each panel row.
#[derive(Debug)]
pub(crate) enum Kind {
    /// One input a line.
    F32,
    /// Two inputs a line, the lower one in the lower half.
    Bf16,
    /// Eight inputs a line, low nibble first; E8M0 scales.
    Mxfp4(Vec<[u8; PANEL]>),
    /// Eight inputs a line, low nibble first; E4M3 scales of half blocks, and a factor a row.
    Nvfp4 { scales: Vec<[u8; PANEL]>, factors: Vec<[f32; PANEL]> },
    /// Four or eight inputs a line, lowest bits first; scales and offsets of groups of `blocks` blocks.
    Affine { bits: usize, blocks: usize, groups: Vec<AffineGroup> },
    /// Four inputs a line in the order of [`quantised_order`]; bf16 scales.
    Int8(Vec<[bf16; PANEL]>),
}

/// Scales and offsets of the rows of a panel: a weight is `scale * code + offset`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AffineGroup {
    pub(crate) scales: [f32; PANEL],
    pub(crate) offsets: [f32; PANEL],
}

/// Affine weights of a panel, or some of its blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Affine<'a> {
    pub(crate) lines: &'a [Line],
    groups: &'a [AffineGroup],
    /// Blocks of a group.
    blocks: usize,
    /// Blocks before these.
    first: usize,
}

impl<'a> Affine<'a> {
    /// The group of one of these blocks.
    pub(crate) fn group(&self, block: usize) -> &'a AffineGroup {
        &self.groups[(self.first + block) / self.blocks]
    }
}

impl Kind {
    /// Lines of a block.
    fn lines(&self) -> usize {
        match self {
            Self::F32 => BLOCK,
            Self::Bf16 => BLOCK / 2,
            Self::Mxfp4(_) | Self::Nvfp4 { .. } => BLOCK / 8,
            Self::Affine { bits, .. } => BLOCK * bits / 32,
            Self::Int8(_) => BLOCK / 4,
        }
    }
}

/// Place of input `k` among the int8 codes of its row: of every eight, the even ones come first, because that is
/// how the low and high nibbles of an MXFP4 dword fall apart.
pub(crate) fn quantised_order(k: usize) -> usize {
    let within = k % 8;
    k - within + within / 2 + (within % 2) * 4
}

/// A stack of matrices `[groups][rows, cols]`, packed.
#[derive(Debug)]
pub(crate) struct Packed {
    rows: usize,
    cols: usize,
    lines: Vec<Line>,
    kind: Kind,
}

/// The weights of one panel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Panel<'a> {
    F32(&'a [Line]),
    Bf16(&'a [Line]),
    Mxfp4(&'a [Line], &'a [[u8; PANEL]]),
    Nvfp4(&'a [Line], &'a [[u8; PANEL]], &'a [f32; PANEL]),
    Affine4(Affine<'a>),
    Affine8(Affine<'a>),
    Int8(&'a [Line], &'a [[bf16; PANEL]]),
}

impl<'a> Panel<'a> {
    /// Blocks of inputs.
    pub(crate) fn blocks(&self) -> usize {
        match self {
            Self::F32(lines) => lines.len() / BLOCK,
            Self::Bf16(lines) => lines.len() / (BLOCK / 2),
            Self::Mxfp4(_, scales) => scales.len(),
            Self::Nvfp4(_, scales, _) => scales.len() / HALVES,
            Self::Affine4(affine) => affine.lines.len() / (BLOCK / 8),
            Self::Affine8(affine) => affine.lines.len() / (BLOCK / 4),
            Self::Int8(_, scales) => scales.len(),
        }
    }

    /// Whether weights are codes that take work to read.
    pub(crate) fn is_coded(&self) -> bool {
        !matches!(self, Self::F32(_) | Self::Bf16(_) | Self::Int8(..))
    }

    /// Some of its blocks.
    pub(crate) fn part(&self, blocks: Range<usize>) -> Self {
        let lines = |per_block: usize| blocks.start * per_block..blocks.end * per_block;
        let affine = |all: &Affine<'a>, per_block: usize| Affine {
            lines: &all.lines[lines(per_block)],
            first: all.first + blocks.start,
            ..*all
        };
        match self {
            Self::F32(all) => Self::F32(&all[lines(BLOCK)]),
            Self::Bf16(all) => Self::Bf16(&all[lines(BLOCK / 2)]),
            Self::Mxfp4(all, scales) => Self::Mxfp4(&all[lines(BLOCK / 8)], &scales[blocks]),
            Self::Nvfp4(all, scales, factors) => {
                Self::Nvfp4(&all[lines(BLOCK / 8)], &scales[lines(HALVES)], factors)
            }
            Self::Affine4(all) => Self::Affine4(affine(all, BLOCK / 8)),
            Self::Affine8(all) => Self::Affine8(affine(all, BLOCK / 4)),
            Self::Int8(all, scales) => Self::Int8(&all[lines(BLOCK / 4)], &scales[blocks]),
        }
    }
}

impl Packed {
    /// Packs `matrix`, which stacks `groups` matrices, on the current thread pool. With `int8`, weights that are no FP4 are
    /// quantised to 8 bits a weight and one scale per block. Affine weights whose groups are not whole blocks become f32.
    pub(crate) fn new(matrix: Matrix, groups: usize, int8: bool) -> Result<Self, DeviceError> {
        let cols = matrix.cols();
        if groups == 0 || cols == 0 || !matrix.rows().is_multiple_of(groups) {
            return Err(DeviceError::new("load", "a matrix without columns, or an uneven stack"));
        }
        let rows = matrix.rows() / groups;
        let panels = groups * rows.div_ceil(PANEL);
        let mut packed = Self { rows, cols, lines: Vec::new(), kind: Kind::F32 };
        let blocks = panels * packed.blocks();
        packed.kind = match matrix.elements() {
            Elements::Mxfp4 { .. } => Kind::Mxfp4(reserved(blocks, [0; PANEL])?),
            Elements::Nvfp4 { .. } => Kind::Nvfp4 {
                scales: reserved(HALVES * blocks, [0; PANEL])?,
                factors: reserved(panels, [0.0; PANEL])?,
            },
            _ if int8 => Kind::Int8(reserved(blocks, [bf16::ZERO; PANEL])?),
            Elements::Affine { bits, group, .. } if group.is_multiple_of(BLOCK) => {
                let none = AffineGroup { scales: [0.0; PANEL], offsets: [0.0; PANEL] };
                let groups = reserved(panels * (cols / group), none)?;
                Kind::Affine { bits: *bits, blocks: group / BLOCK, groups }
            }
            Elements::Bf16(_) => Kind::Bf16,
            Elements::F32(_) | Elements::Affine { .. } => Kind::F32,
        };
        let lines = blocks * packed.kind.lines();
        packed.lines = reserved(lines, Line([0; PANEL]))?;
        packed.fill(&matrix);
        Ok(packed)
    }

    fn fill(&mut self, matrix: &Matrix) {
        let (rows, per_group, blocks) = (self.rows, self.rows.div_ceil(PANEL), self.blocks());
        let source = |panel: usize, lane: usize| {
            let local = panel % per_group * PANEL + lane;
            (local < rows).then(|| panel / per_group * rows + local)
        };
        let stride = blocks * self.kind.lines();
        let panels = self.lines.par_chunks_mut(stride.max(1)).enumerate();
        match &mut self.kind {
            Kind::Mxfp4(scales) => {
                panels.zip(scales.par_chunks_mut(blocks)).for_each(|((panel, lines), scales)| {
                    for lane in 0..PANEL {
                        if let Some(row) = source(panel, lane) {
                            pack_mxfp4(matrix, row, lane, lines, scales);
                        }
                    }
                });
            }
            Kind::Int8(scales) => {
                panels.zip(scales.par_chunks_mut(blocks)).for_each(|((panel, lines), scales)| {
                    let mut values = vec![0.0; blocks * BLOCK];
                    for lane in 0..PANEL {
                        if let Some(row) = source(panel, lane) {
                            decode_row(matrix, row, &mut values[..matrix.cols()]);
                            pack_int8(&values, lane, lines, scales);
                        }
                    }
                });
            }
            Kind::Nvfp4 { scales, factors } => {
                let scales = scales.par_chunks_mut(HALVES * blocks).zip(factors);
                panels.zip(scales).for_each(|((panel, lines), (scales, factors))| {
                    for (lane, factor) in factors.iter_mut().enumerate() {
                        if let Some(row) = source(panel, lane) {
                            *factor = pack_nvfp4(matrix, row, lane, lines, scales);
                        }
                    }
                });
            }
            Kind::Affine { groups, blocks: per_group, .. } => {
                panels.zip(groups.par_chunks_mut(blocks / *per_group)).for_each(
                    |((panel, lines), groups)| {
                        for lane in 0..PANEL {
                            if let Some(row) = source(panel, lane) {
                                pack_affine(matrix, row, lane, lines, groups);
                            }
                        }
                    },
                );
            }
            Kind::F32 | Kind::Bf16 => panels.for_each(|(panel, lines)| {
                for lane in 0..PANEL {
                    if let Some(row) = source(panel, lane) {
                        pack_float(matrix, row, lane, lines);
                    }
                }
            }),
        }
    }

    /// Blocks of a row, the padded last one included.
    pub(crate) fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK)
    }

    /// Rows of one matrix of the stack.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Panels of one matrix of the stack.
    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Whether the kernels want int8 activations: always for int8 weights, on request for FP4.
    pub(crate) fn takes_int8(&self, asked: bool) -> bool {
        match self.kind {
            Kind::Int8(_) => true,
            Kind::Mxfp4(_) | Kind::Nvfp4 { .. } => asked,
            Kind::F32 | Kind::Bf16 | Kind::Affine { .. } => false,
        }
    }

    /// The `panel`-th of all panels, counted through the stack.
    pub(crate) fn panel(&self, panel: usize) -> Panel<'_> {
        let blocks = self.blocks();
        let stride = blocks * self.kind.lines();
        let lines = &self.lines[panel * stride..][..stride];
        match &self.kind {
            Kind::F32 => Panel::F32(lines),
            Kind::Bf16 => Panel::Bf16(lines),
            Kind::Mxfp4(scales) => Panel::Mxfp4(lines, &scales[panel * blocks..][..blocks]),
            Kind::Nvfp4 { scales, factors } => {
                Panel::Nvfp4(lines, &scales[HALVES * panel * blocks..][..HALVES * blocks], &factors[panel])
            }
            Kind::Affine { bits, blocks: per_group, groups } => {
                let count = blocks / per_group;
                let groups = &groups[panel * count..][..count];
                let affine = Affine { lines, groups, blocks: *per_group, first: 0 };
                if *bits == 4 { Panel::Affine4(affine) } else { Panel::Affine8(affine) }
            }
            Kind::Int8(scales) => Panel::Int8(lines, &scales[panel * blocks..][..blocks]),
        }
    }

    /// Decodes one row of the first matrix of the stack (an embedding).
    pub(crate) fn read_row(&self, row: usize, out: &mut [f32]) {
        let lane = row % PANEL;
        let dword = |lines: &[Line], line: usize| lines[line].0[lane];
        let affine = |affine: &Affine<'_>, k: usize, code: u32| {
            let group = affine.group(k / BLOCK);
            group.scales[lane] * code as f32 + group.offsets[lane]
        };
        match self.panel(row / PANEL) {
            Panel::F32(lines) => {
                out.iter_mut().enumerate().for_each(|(k, x)| *x = f32::from_bits(dword(lines, k)));
            }
            Panel::Bf16(lines) => out.iter_mut().enumerate().for_each(|(k, x)| {
                let pair = dword(lines, k / 2);
                *x = f32::from_bits(if k % 2 == 0 { pair << 16 } else { pair & 0xffff_0000 });
            }),
            Panel::Mxfp4(lines, scales) => out.iter_mut().enumerate().for_each(|(k, x)| {
                let code = dword(lines, k / 8) >> (4 * (k % 8)) & 15;
                *x = E2M1[code as usize] * e8m0(scales[k / BLOCK][lane]);
            }),
            Panel::Nvfp4(lines, scales, factors) => out.iter_mut().enumerate().for_each(|(k, x)| {
                let code = dword(lines, k / 8) >> (4 * (k % 8)) & 15;
                *x = E2M1[code as usize] * e4m3(scales[k / NVFP4_BLOCK][lane]) * factors[lane];
            }),
            Panel::Affine4(all) => out.iter_mut().enumerate().for_each(|(k, x)| {
                *x = affine(&all, k, dword(all.lines, k / 8) >> (4 * (k % 8)) & 15);
            }),
            Panel::Affine8(all) => out.iter_mut().enumerate().for_each(|(k, x)| {
                *x = affine(&all, k, dword(all.lines, k / 4) >> (8 * (k % 4)) & 255);
            }),
            Panel::Int8(lines, scales) => out.iter_mut().enumerate().for_each(|(k, x)| {
                let place = quantised_order(k);
                let code = dword(lines, place / 4).to_le_bytes()[place % 4].cast_signed();
                *x = f32::from(code) * scales[k / BLOCK][lane].to_f32();
            }),
        }
    }
}

/// `count` copies of `value`, or an error where there is no memory for them.
fn reserved<T: Clone>(count: usize, value: T) -> Result<Vec<T>, DeviceError> {
    let mut values = Vec::new();
    values.try_reserve_exact(count).map_err(|e| DeviceError::new("load", e.to_string()))?;
    values.resize(count, value);
    Ok(values)
}

fn pack_float(matrix: &Matrix, row: usize, lane: usize, lines: &mut [Line]) {
    let cols = matrix.cols();
    match matrix.elements() {
        Elements::F32(values) => {
            let values = &values[row * cols..][..cols];
            lines.iter_mut().zip(values).for_each(|(line, x)| line.0[lane] = x.to_bits());
        }
        Elements::Bf16(values) => {
            let values = values[row * cols..][..cols].chunks(2);
            lines.iter_mut().zip(values).for_each(|(line, pair)| {
                let high = pair.get(1).map_or(0, |x| u32::from(x.to_bits()));
                line.0[lane] = u32::from(pair[0].to_bits()) | high << 16;
            });
        }
        Elements::Mxfp4 { .. } | Elements::Nvfp4 { .. } | Elements::Affine { .. } => {
            let mut values = vec![0.0; cols];
            decode_row(matrix, row, &mut values);
            lines.iter_mut().zip(values).for_each(|(line, x)| line.0[lane] = x.to_bits());
        }
    }
}

fn pack_mxfp4(matrix: &Matrix, row: usize, lane: usize, lines: &mut [Line], into: &mut [[u8; PANEL]]) {
    let Elements::Mxfp4 { codes, scales } = matrix.elements() else { return };
    let cols = matrix.cols();
    pack_codes(&codes[row * cols / 2..][..cols / 2], lane, lines);
    let scales = &scales[row * cols / BLOCK..][..cols / BLOCK];
    into.iter_mut().zip(scales).for_each(|(panel, &scale)| panel[lane] = scale);
}

/// Packs a row and returns its factor.
fn pack_nvfp4(matrix: &Matrix, row: usize, lane: usize, lines: &mut [Line], into: &mut [[u8; PANEL]]) -> f32 {
    let Elements::Nvfp4 { codes, scales, runs } = matrix.elements() else { return 0.0 };
    let cols = matrix.cols();
    pack_codes(&codes[row * cols / 2..][..cols / 2], lane, lines);
    let scales = &scales[row * cols / NVFP4_BLOCK..][..cols / NVFP4_BLOCK];
    into.iter_mut().zip(scales).for_each(|(panel, &scale)| panel[lane] = scale);
    let mut end = 0;
    let run = runs.iter().find(|run| {
        end += run.rows;
        row < end
    });
    run.map_or(0.0, |run| run.weight)
}

fn pack_affine(matrix: &Matrix, row: usize, lane: usize, lines: &mut [Line], into: &mut [AffineGroup]) {
    let Elements::Affine { bits, codes, scales, offsets, .. } = matrix.elements() else { return };
    let (bytes, groups) = (matrix.cols() * bits / 8, into.len());
    pack_codes(&codes[row * bytes..][..bytes], lane, lines);
    let pairs = scales[row * groups..].iter().zip(&offsets[row * groups..]);
    for (group, (&scale, &offset)) in into.iter_mut().zip(pairs) {
        (group.scales[lane], group.offsets[lane]) = (scale, offset);
    }
}

/// Codes of a row, as they are stored, four bytes a line.
fn pack_codes(codes: &[u8], lane: usize, lines: &mut [Line]) {
    lines.iter_mut().zip(codes.chunks_exact(4)).for_each(|(line, four)| {
        line.0[lane] = u32::from_le_bytes([four[0], four[1], four[2], four[3]]);
    });
}

fn pack_int8(values: &[f32], lane: usize, lines: &mut [Line], into: &mut [[bf16; PANEL]]) {
    let blocks = values.chunks_exact(BLOCK).zip(lines.chunks_exact_mut(BLOCK / 4)).zip(into);
    for ((values, lines), scales) in blocks {
        let peak = values.iter().fold(0.0_f32, |peak, x| peak.max(x.abs()));
        // Rounded up to bf16, so that the largest weight still fits 127 steps.
        let scale = f32::from_bits((peak / 127.0).to_bits().saturating_add(0xffff) & 0xffff_0000);
        scales[lane] = bf16::from_f32(scale);
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        for (k, x) in values.iter().enumerate() {
            let code = (x * inverse).round().clamp(-127.0, 127.0) as i8;
            let place = quantised_order(k);
            lines[place / 4].0[lane] |= u32::from(code.cast_unsigned()) << (8 * (place % 4));
        }
    }
}

#[cfg(test)]
mod tests;
