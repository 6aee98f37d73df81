//! Weights as the SIMD kernels stream them: panels of 16 output rows, interleaved a dword per row.
//!
//! A [`Line`] is one cache line: dword `r` belongs to row `r` of the panel and holds 1 (f32), 2 (bf16), 4 (int8)
//! or 8 (MXFP4) consecutive inputs of that row. A vector lane is thus a row, every output element is one chain of
//! additions in the order of its inputs, and neither the number of tokens nor the split over threads can change it.

use std::ops::Range;

use ctxserve_backend::DeviceError;
use ctxserve_core::{Elements, Encoding, MXFP4_BLOCK, Matrix};
use half::bf16;
use rayon::prelude::*;

use crate::decode::decode_row;

/// Output rows of a panel.
pub(crate) const PANEL: usize = 16;
/// Inputs of a block; inputs are padded with zeros to whole blocks.
pub(crate) const BLOCK: usize = MXFP4_BLOCK;

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
    /// Four inputs a line in the order of [`quantised_order`]; bf16 scales.
    Int8(Vec<[bf16; PANEL]>),
}

impl Kind {
    /// Lines of a block.
    fn lines(&self) -> usize {
        match self {
            Self::F32 => BLOCK,
            Self::Bf16 => BLOCK / 2,
            Self::Mxfp4(_) => BLOCK / 8,
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
    Int8(&'a [Line], &'a [[bf16; PANEL]]),
}

impl Panel<'_> {
    /// Blocks of inputs.
    pub(crate) fn blocks(&self) -> usize {
        match self {
            Self::F32(lines) => lines.len() / BLOCK,
            Self::Bf16(lines) => lines.len() / (BLOCK / 2),
            Self::Mxfp4(_, scales) => scales.len(),
            Self::Int8(_, scales) => scales.len(),
        }
    }

    /// Some of its blocks.
    pub(crate) fn part(&self, blocks: Range<usize>) -> Self {
        let lines = |per_block: usize| blocks.start * per_block..blocks.end * per_block;
        match self {
            Self::F32(all) => Self::F32(&all[lines(BLOCK)]),
            Self::Bf16(all) => Self::Bf16(&all[lines(BLOCK / 2)]),
            Self::Mxfp4(all, scales) => Self::Mxfp4(&all[lines(BLOCK / 8)], &scales[blocks]),
            Self::Int8(all, scales) => Self::Int8(&all[lines(BLOCK / 4)], &scales[blocks]),
        }
    }
}

impl Packed {
    /// Packs `matrix`, which stacks `groups` matrices, on the current thread pool. With `int8`, f32 and bf16
    /// weights are quantised to 8 bits a weight and one scale per block.
    pub(crate) fn new(matrix: Matrix, groups: usize, int8: bool) -> Result<Self, DeviceError> {
        let cols = matrix.cols();
        if groups == 0 || cols == 0 || !matrix.rows().is_multiple_of(groups) {
            return Err(DeviceError::new("load", "a matrix without columns, or an uneven stack"));
        }
        let rows = matrix.rows() / groups;
        let panels = groups * rows.div_ceil(PANEL);
        let mut packed = Self { rows, cols, lines: Vec::new(), kind: Kind::F32 };
        let blocks = panels * packed.blocks();
        match matrix.encoding() {
            Encoding::Mxfp4 => packed.kind = Kind::Mxfp4(reserved(blocks, [0; PANEL])?),
            _ if int8 => packed.kind = Kind::Int8(reserved(blocks, [bf16::ZERO; PANEL])?),
            Encoding::Bf16 => packed.kind = Kind::Bf16,
            Encoding::F32 => packed.kind = Kind::F32,
            Encoding::Nvfp4 | Encoding::Affine => {
                return Err(DeviceError::new("load", "this encoding is not packed"));
            }
        }
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

    /// Whether the kernels want int8 activations: always for int8 weights, on request for MXFP4.
    pub(crate) fn takes_int8(&self, asked: bool) -> bool {
        match self.kind {
            Kind::Int8(_) => true,
            Kind::Mxfp4(_) => asked,
            Kind::F32 | Kind::Bf16 => false,
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
            Kind::Int8(scales) => Panel::Int8(lines, &scales[panel * blocks..][..blocks]),
        }
    }

    /// Decodes one row of the first matrix of the stack (an embedding).
    pub(crate) fn read_row(&self, row: usize, out: &mut [f32]) {
        let lane = row % PANEL;
        let dword = |lines: &[Line], line: usize| lines[line].0[lane];
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
                *x = crate::decode::E2M1[code as usize] * crate::decode::e8m0(scales[k / BLOCK][lane]);
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
        Elements::Mxfp4 { .. } | Elements::Nvfp4 { .. } | Elements::Affine { .. } => {}
    }
}

fn pack_mxfp4(matrix: &Matrix, row: usize, lane: usize, lines: &mut [Line], into: &mut [[u8; PANEL]]) {
    let Elements::Mxfp4 { codes, scales } = matrix.elements() else { return };
    let cols = matrix.cols();
    let codes = codes[row * cols / 2..][..cols / 2].chunks_exact(4);
    lines.iter_mut().zip(codes).for_each(|(line, four)| {
        line.0[lane] = u32::from_le_bytes([four[0], four[1], four[2], four[3]]);
    });
    let scales = &scales[row * cols / BLOCK..][..cols / BLOCK];
    into.iter_mut().zip(scales).for_each(|(panel, &scale)| panel[lane] = scale);
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
