//! Weights on their way into the layouts that kernels read.

use std::borrow::Cow;

use ctxserve_backend::{AttentionSpec, DeviceError, ExpertSpec, ExpertWeights, Role};
use ctxserve_core::{Elements, MXFP4_BLOCK, Matrix};
use half::bf16;

use crate::driver::{Buffer, Device};
use crate::ops::attention::HEAD_DIM;
use crate::ops::moe_gemm::MoeGemm;
use crate::ops::pack_mxfp4::{self, PackMxfp4, Rows, Strips};
use crate::ops::pack_panels::{self, PackPanels, Source};

/// Widths are padded to whole panels.
pub(crate) const PANEL: usize = 64;
/// Bytes of codes that are packed at a time: the staging buffer's bound.
const STAGING: usize = 256 << 20;

/// A matrix in one or two layouts.
#[derive(Debug)]
pub struct CudaMatrix {
    /// Row-major `[rows, cols padded]`, bits of bf16: embeddings, routers.
    pub(crate) plain: Option<Buffer<u16>>,
    /// Panel layout of `[rows padded, cols padded]`, bits of bf16: everything that is multiplied in bulk.
    pub(crate) panels: Option<Buffer<u16>>,
    /// `[rows padded]`, in the panels' order; zeros without a bias.
    pub(crate) bias: Buffer<f32>,
    /// Output features.
    pub(crate) rows: usize,
    /// The same in the panels.
    pub(crate) padded_rows: usize,
    /// Input features, padded.
    pub(crate) cols: usize,
}

/// A vector, padded with zeros to whole panels.
#[derive(Debug)]
pub struct CudaVector {
    pub(crate) values: Buffer<f32>,
    /// Present where it is padded: the values times `sqrt(len / padded)`. A norm over all padded columns with these and
    /// with epsilon times `len / padded` is the norm over the real ones.
    scaled: Option<Buffer<f32>>,
    pub(crate) len: usize,
}

impl CudaVector {
    /// The weight of a norm over padded columns, and its epsilon.
    pub(crate) fn as_norm(&self, eps: f32) -> (&Buffer<f32>, f32) {
        match &self.scaled {
            None => (&self.values, eps),
            Some(scaled) => (scaled, eps * self.len as f32 / scaled.len() as f32),
        }
    }
}

/// A stack of experts in MXFP4 strips.
#[derive(Debug)]
pub struct CudaExperts {
    pub(crate) gate_up: Buffer<u8>,
    /// `[experts, 2 * inner padded]`: the largest scale byte of each row.
    pub(crate) gate_up_exponents: Option<Buffer<u8>>,
    /// The same of `down`, `[experts, hidden padded]`.
    pub(crate) down_exponents: Option<Buffer<u8>>,
    /// `[experts, 2 * inner padded]`: gate, up, gate, up.
    pub(crate) gate_up_bias: Buffer<f32>,
    pub(crate) down: Buffer<u8>,
    /// `[experts, hidden padded]`.
    pub(crate) down_bias: Buffer<f32>,
    pub(crate) spec: ExpertSpec,
    /// Widths, padded.
    pub(crate) hidden: usize,
    pub(crate) inner: usize,
}

/// Packs weights as they are loaded.
#[derive(Debug)]
pub(crate) struct Packer {
    panels: PackPanels,
    mxfp4: PackMxfp4,
    gemm: Option<MoeGemm>,
    codes: Option<Buffer<u8>>,
}

fn shape_error(op: &'static str, what: &str) -> DeviceError {
    DeviceError::new(op, format!("{what} contradict the layer's shape"))
}

/// Source rows of the QKV matrix in the order of the panels: in q and k heads rotary pairs side by side, heads padded.
fn qkv_rows(spec: &AttentionSpec) -> Vec<i32> {
    let half = spec.head_dim / 2;
    let heads = spec.heads + 2 * spec.kv_heads;
    let mut map = vec![-1; heads * HEAD_DIM];
    for (head, rows) in map.chunks_mut(HEAD_DIM).enumerate() {
        let first = head * spec.head_dim;
        let rotated = head < spec.heads + spec.kv_heads;
        for at in 0..spec.head_dim {
            let place = match (rotated, at < half) {
                (true, true) => 2 * at,
                (true, false) => 2 * (at - half) + 1,
                (false, _) => natural(at, half),
            };
            rows[place] = (first + at) as i32;
        }
    }
    map
}

/// Where element `at` of a head is once kernels have it in their natural order: the second half begins in the middle of
/// the padded head, as rotation leaves it.
fn natural(at: usize, half: usize) -> usize {
    if at < half { at } else { HEAD_DIM / 2 + at - half }
}

/// Source columns of the output projection: heads padded.
fn output_cols(spec: &AttentionSpec) -> Vec<i32> {
    let mut map = vec![-1; spec.heads * HEAD_DIM];
    for (head, cols) in map.chunks_mut(HEAD_DIM).enumerate() {
        for at in 0..spec.head_dim {
            cols[natural(at, spec.head_dim / 2)] = (head * spec.head_dim + at) as i32;
        }
    }
    map
}

impl Packer {
    pub(crate) fn new(device: &Device, gemm: Option<MoeGemm>) -> Result<Self, DeviceError> {
        Ok(Self { panels: PackPanels::load(device)?, mxfp4: PackMxfp4::load(device)?, gemm, codes: None })
    }

    /// Lets go of the staging memory once everything is loaded.
    pub(crate) fn finish(&mut self) {
        self.codes = None;
    }

    pub(crate) fn matrix(
        &mut self,
        device: &Device,
        matrix: Matrix,
        bias: Option<Vec<f32>>,
        role: Role<'_>,
    ) -> Result<CudaMatrix, DeviceError> {
        const OP: &str = "load_matrix";
        let (rows, real_cols) = (matrix.rows(), matrix.cols());
        if rows == 0 || real_cols == 0 || bias.as_ref().is_some_and(|bias| bias.len() != rows) {
            return Err(shape_error(OP, "rows, columns and bias"));
        }
        let (row_map, col_map) = match role {
            Role::Qkv(spec) => (Some(qkv_rows(spec)), None),
            Role::Output(spec) => (None, Some(output_cols(spec))),
            Role::Embedding { .. } | Role::Router | Role::Head => (None, None),
        };
        let agrees = match role {
            Role::Qkv(spec) => rows == (spec.heads + 2 * spec.kv_heads) * spec.head_dim,
            Role::Output(spec) => real_cols == spec.heads * spec.head_dim,
            Role::Embedding { .. } | Role::Router | Role::Head => true,
        };
        if !agrees {
            return Err(shape_error(OP, "rows and columns"));
        }
        let cols = col_map.as_ref().map_or(real_cols.next_multiple_of(PANEL), Vec::len);
        // The rows of an output projection are the columns of the residual stream.
        let padded_rows = match (&row_map, role) {
            (Some(map), _) => map.len(),
            (None, Role::Output(_)) => rows.next_multiple_of(PANEL),
            (None, _) => rows.next_multiple_of(8),
        };
        let mut padded_bias = vec![0.0; padded_rows];
        for (at, place) in padded_bias.iter_mut().enumerate() {
            let source = row_map.as_ref().map_or(at, |map| usize::try_from(map[at]).unwrap_or(usize::MAX));
            *place = bias.as_ref().and_then(|bias| bias.get(source)).copied().unwrap_or_default();
        }
        let source = Stored::new(device, &matrix)?;
        let panels = match role {
            Role::Embedding { head: false } | Role::Router => None,
            _ => {
                let panels = device.allocate(padded_rows * cols)?;
                let row_map = row_map.map(|map| device.upload(&map)).transpose()?;
                let column_map = col_map.map(|map| device.upload(&map)).transpose()?;
                let call = pack_panels::Call {
                    source: source.as_source(),
                    rows,
                    cols: real_cols,
                    panels: &panels,
                    capacity: padded_rows,
                    padded: cols,
                    first: 0,
                    count: padded_rows,
                    row_map: row_map.as_ref(),
                    column_map: column_map.as_ref(),
                };
                self.panels.issue(device, &call)?;
                device.synchronize()?;
                Some(panels)
            }
        };
        let plain = match (role, source) {
            (Role::Embedding { .. } | Role::Router, Stored::Bf16(values)) if cols == real_cols => {
                Some(values)
            }
            (Role::Embedding { .. } | Role::Router, _) => Some(device.upload(&rows_of(&matrix, cols))?),
            _ => None,
        };
        let bias = device.upload(&padded_bias)?;
        Ok(CudaMatrix { plain, panels, bias, rows, padded_rows, cols })
    }

    pub(crate) fn vector(&self, device: &Device, mut values: Vec<f32>) -> Result<CudaVector, DeviceError> {
        let len = values.len();
        let padded = len.next_multiple_of(PANEL);
        values.resize(padded, 0.0);
        let factor = (len as f64 / padded.max(1) as f64).sqrt();
        let scaled: Vec<f32> = values.iter().map(|&v| (f64::from(v) * factor) as f32).collect();
        let scaled = if len == padded { None } else { Some(device.upload(&scaled)?) };
        Ok(CudaVector { values: device.upload(&values)?, scaled, len })
    }

    pub(crate) fn experts(
        &mut self,
        device: &Device,
        weights: ExpertWeights,
        spec: &ExpertSpec,
    ) -> Result<CudaExperts, DeviceError> {
        const OP: &str = "load_experts";
        let ExpertSpec { experts, top_k, hidden, inner, .. } = *spec;
        let shaped = |m: &Matrix, bias: &[f32], out: usize, cols: usize| {
            experts.checked_mul(out) == Some(m.rows()) && m.cols() == cols && bias.len() == m.rows()
        };
        let ExpertWeights { gate_up, gate_up_bias, down, down_bias } = weights;
        if top_k == 0
            || top_k > experts
            || !shaped(&gate_up, &gate_up_bias, 2 * inner, hidden)
            || !shaped(&down, &down_bias, hidden, inner)
        {
            return Err(shape_error(OP, "weights"));
        }
        let (wide, deep) = (hidden.next_multiple_of(PANEL), inner.next_multiple_of(PANEL));
        let spread = |bias: &[f32], real: usize, padded: usize| {
            let mut all = vec![0.0; experts * padded];
            all.chunks_mut(padded)
                .zip(bias.chunks(real))
                .for_each(|(to, from)| to[..real].copy_from_slice(from));
            device.upload(&all)
        };
        let gate_up = self.strips(device, gate_up, experts, Rows::GateUp)?;
        let down = self.strips(device, down, experts, Rows::Down)?;
        Ok(CudaExperts {
            gate_up_exponents: self.exponents(device, &gate_up, experts * 2 * deep, wide)?,
            down_exponents: self.exponents(device, &down, experts * wide, deep)?,
            gate_up,
            gate_up_bias: spread(&gate_up_bias, 2 * inner, 2 * deep)?,
            down,
            down_bias: spread(&down_bias, hidden, wide)?,
            spec: *spec,
            hidden: wide,
            inner: deep,
        })
    }

    /// The largest scale of each weight row, for the products that need it.
    fn exponents(
        &self,
        device: &Device,
        strips: &Buffer<u8>,
        rows: usize,
        cols: usize,
    ) -> Result<Option<Buffer<u8>>, DeviceError> {
        let Some(gemm) = &self.gemm else { return Ok(None) };
        let exponents = device.allocate(rows)?;
        gemm.exponents(device, strips, &exponents, rows, cols)?;
        device.synchronize()?;
        Ok(Some(exponents))
    }

    /// Packs a stack of `experts` matrices, some experts at a time.
    fn strips(
        &mut self,
        device: &Device,
        matrix: Matrix,
        experts: usize,
        kind: Rows,
    ) -> Result<Buffer<u8>, DeviceError> {
        let (rows, cols) = (matrix.rows() / experts, matrix.cols());
        let Elements::Mxfp4 { codes, scales } = matrix.into_elements() else {
            return Err(DeviceError::new("load_experts", "experts are taken as MXFP4 only"));
        };
        let (code_bytes, scale_bytes) = (rows * cols / 2, rows * cols / MXFP4_BLOCK);
        // The rows of a down projection are the columns of the residual stream, padded to whole panels.
        let padded = if kind == Rows::Down { rows.next_multiple_of(PANEL) } else { rows };
        let bytes = Strips::of(kind, padded, cols).bytes();
        let all: Buffer<u8> = device.zeros(experts * bytes)?;
        let whole = if padded == rows { experts } else { 1 };
        let each = (STAGING / (code_bytes + scale_bytes)).clamp(1, whole);
        let room = each * (code_bytes + scale_bytes) + 256;
        if self.codes.as_ref().is_none_or(|codes| codes.len() < room) {
            self.codes = None;
            self.codes = Some(device.allocate(room)?);
        }
        let Some(staging) = &mut self.codes else {
            return Err(DeviceError::new("load_experts", "no staging memory"));
        };
        for first in (0..experts).step_by(each) {
            let count = each.min(experts - first);
            let scales_at = (count * code_bytes).next_multiple_of(16);
            staging.write(0, &codes[first * code_bytes..][..count * code_bytes])?;
            staging.write(scales_at, &scales[first * scale_bytes..][..count * scale_bytes])?;
            // SAFETY: the views end before what they view is touched again.
            let (codes, scales, strips) = unsafe {
                (
                    staging.view(0, count * code_bytes)?,
                    staging.view(scales_at, count * scale_bytes)?,
                    all.view(first * bytes, count * bytes)?,
                )
            };
            let call = pack_mxfp4::Call {
                codes: &codes,
                scales: &scales,
                strips: &strips,
                first: 0,
                experts: count,
                rows,
                cols,
                kind,
            };
            self.mxfp4.issue(device, &call)?;
        }
        // Kernels read weights before they wait for anything.
        device.synchronize()?;
        Ok(all)
    }
}

/// A matrix on the device as it was stored.
enum Stored {
    Bf16(Buffer<u16>),
    F32(Buffer<f32>),
}

impl Stored {
    fn new(device: &Device, matrix: &Matrix) -> Result<Self, DeviceError> {
        Ok(match matrix.elements() {
            Elements::Bf16(values) => Self::Bf16(device.upload(bytemuck::cast_slice(values))?),
            Elements::F32(values) => Self::F32(device.upload(values)?),
            Elements::Mxfp4 { codes, scales } => {
                Self::Bf16(device.upload(bytemuck::cast_slice(&decode(codes, scales)))?)
            }
        })
    }

    fn as_source(&self) -> Source<'_> {
        match self {
            Self::Bf16(values) => Source::Bf16(values),
            Self::F32(values) => Source::F32(values),
        }
    }
}

/// Row-major bits of bf16, rows padded with zeros to `padded` elements.
fn rows_of(matrix: &Matrix, padded: usize) -> Vec<u16> {
    let bits: Cow<'_, [u16]> = match matrix.elements() {
        Elements::Bf16(values) => Cow::Borrowed(bytemuck::cast_slice(values)),
        Elements::F32(values) => Cow::Owned(values.iter().map(|&v| bf16::from_f32(v).to_bits()).collect()),
        Elements::Mxfp4 { codes, scales } => {
            Cow::Owned(decode(codes, scales).into_iter().map(bf16::to_bits).collect())
        }
    };
    let cols = matrix.cols();
    let mut wide = vec![0; matrix.rows() * padded];
    wide.chunks_mut(padded).zip(bits.chunks(cols)).for_each(|(to, from)| to[..cols].copy_from_slice(from));
    wide
}

/// Dense layers stored as MXFP4, exactly, as bf16.
fn decode(codes: &[u8], scales: &[u8]) -> Vec<bf16> {
    const VALUES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let value =
        |code: u8| if code & 8 == 0 { VALUES[usize::from(code & 7)] } else { -VALUES[usize::from(code & 7)] };
    let blocks = codes.chunks(MXFP4_BLOCK / 2).zip(scales);
    blocks
        .flat_map(|(codes, &scale)| {
            let factor = (f32::from(scale) - 127.0).exp2();
            codes.iter().flat_map(move |&pair| {
                [pair & 15, pair >> 4].map(|code| bf16::from_f32(value(code) * factor))
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(heads: usize, kv_heads: usize, head_dim: usize) -> AttentionSpec {
        AttentionSpec { heads, kv_heads, head_dim, scale: 1.0, window: None, norm_eps: 1e-5 }
    }

    #[test]
    fn rotary_pairs_sit_side_by_side() {
        let map = qkv_rows(&spec(1, 1, 64));
        assert_eq!(map[..4], [0, 32, 1, 33]);
        assert_eq!(map[64..68], [64, 96, 65, 97]);
        // Values keep their order.
        assert_eq!(map[128..132], [128, 129, 130, 131]);
        let mut sorted = map.clone();
        sorted.sort_unstable();
        assert!(sorted.iter().copied().eq(0..192));
    }

    #[test]
    fn short_heads_are_padded() {
        let map = qkv_rows(&spec(2, 1, 4));
        assert_eq!(map[..5], [0, 2, 1, 3, -1]);
        assert_eq!(map[64..69], [4, 6, 5, 7, -1]);
        assert_eq!(map[192..195], [12, 13, -1]);
        assert_eq!(map[224..227], [14, 15, -1]);
        assert_eq!(output_cols(&spec(2, 1, 4))[96..99], [6, 7, -1]);
    }
}
