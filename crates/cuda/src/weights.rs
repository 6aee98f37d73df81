//! Weights on their way into the layouts that kernels read.

mod experts;
mod maps;
mod nvfp4;

use std::borrow::Cow;
use std::thread;

use ctxserve_backend::{DeviceError, Role};
use ctxserve_core::{Elements, Matrix};
use half::bf16;

use crate::driver::{Buffer, Device, Pod, Uploader};
use crate::kv::padded_head;
use crate::ops::attention::HEAD_DIMS;
use crate::ops::moe_gemm::MoeGemm;
use crate::ops::pack_mxfp4::PackMxfp4;
use crate::ops::pack_nvfp4::PackNvfp4;
use crate::ops::pack_panels::{self, PackPanels, Source};
pub use experts::CudaExperts;
pub(crate) use experts::Stacks;
pub(crate) use nvfp4::{InputRounding, Nvfp4, without_nvfp4};

use maps::{gate_up_rows, natural, output_cols, qkv_rows};

/// Widths are padded to whole panels.
pub(crate) const PANEL: usize = 64;
/// [`Packer::chunk`]: long against a launch, short against the weights.
const CHUNK: usize = 256 << 20;
/// Alignment of the parts of the staging memory.
const ALIGN: usize = 256;

/// A matrix in one layout.
#[derive(Debug)]
pub struct CudaMatrix {
    /// Row-major `[rows, cols padded]`, bits of bf16: routers, and embeddings that are not the head too.
    pub(crate) plain: Option<Buffer<u16>>,
    /// Panel layout of `[rows padded, cols padded]`, bits of bf16: everything that is multiplied in bulk.
    pub(crate) panels: Option<Buffer<u16>>,
    /// The same in place of panels, for projections that are stored so.
    pub(crate) nvfp4: Option<Nvfp4>,
    /// `[rows padded]`, in the panels' order; zeros without a bias.
    pub(crate) bias: Buffer<f32>,
    /// Output features.
    pub(crate) rows: usize,
    /// The same in the panels.
    pub(crate) padded_rows: usize,
    /// Input features, padded; where inputs are rounded in several ways, those of all of them.
    pub(crate) cols: usize,
    /// How inputs are rounded before they are multiplied, if they are.
    pub(crate) rounding: Option<InputRounding>,
}

impl CudaMatrix {
    /// Padded columns of a row before it is rounded.
    pub(crate) fn input_cols(&self) -> usize {
        self.cols / self.rounding.as_ref().map_or(1, |rounding| rounding.factors.len().max(1))
    }
}

/// A vector, padded with zeros to whole panels.
#[derive(Debug)]
pub struct CudaVector {
    pub(crate) values: Buffer<f32>,
    /// Present where it is padded: the values times `sqrt(len / padded)`. A norm over all padded columns with these and
    /// with epsilon times `len / padded` is the norm over the real ones.
    scaled: Option<Buffer<f32>>,
    /// Present where it is padded and no longer than a head: `scaled` in the order of a padded head.
    head: Option<Buffer<f32>>,
    pub(crate) len: usize,
}

impl CudaVector {
    /// The weight of a norm over padded columns, and its epsilon.
    pub(crate) fn as_norm(&self, eps: f32) -> (&Buffer<f32>, f32) {
        self.padded(self.scaled.as_ref(), eps)
    }

    /// The same for a norm over padded heads.
    pub(crate) fn as_head_norm(&self, eps: f32) -> (&Buffer<f32>, f32) {
        self.padded(self.head.as_ref(), eps)
    }

    fn padded<'a>(&'a self, weight: Option<&'a Buffer<f32>>, eps: f32) -> (&'a Buffer<f32>, f32) {
        match weight {
            None => (&self.values, eps),
            Some(weight) => (weight, eps * self.len as f32 / weight.len() as f32),
        }
    }
}

/// Packs weights as they are loaded. Nothing waits for the device between two tensors: the staging memory is written and read in
/// the order of the stream.
#[derive(Debug)]
pub(crate) struct Packer {
    panels: PackPanels,
    mxfp4: PackMxfp4,
    nvfp4: PackNvfp4,
    gemm: MoeGemm,
    tools: Option<Tools>,
    /// Bytes that are packed at a time, of a tensor whose parts can be packed one after the other.
    chunk: usize,
    /// Whether steps may be under way: see [`Packer::settle`].
    finished: bool,
    /// Whether inputs of NVFP4 matrices are rounded to NVFP4.
    rounds: bool,
}

/// What exists only while loading.
#[derive(Debug)]
struct Tools {
    uploader: Uploader,
    /// Tensors as they were stored, on their way into layouts.
    staging: Buffer<u8>,
}

/// A matrix's place in panels.
struct Layout {
    rows: usize,
    cols: usize,
    /// Source rows, where they are permuted.
    row_map: Option<Vec<i32>>,
    /// Source columns, where they are permuted.
    col_map: Option<Vec<i32>>,
}

impl Layout {
    fn new(role: Role<'_>, rows: usize, real_cols: usize) -> Result<Self, DeviceError> {
        const OP: &str = "load_matrix";
        let (row_map, col_map) = match role {
            Role::Qkv(spec) => (Some(qkv_rows(spec, padded_head(OP, spec.head_dim)?)), None),
            Role::Output(spec) => (None, Some(output_cols(spec, padded_head(OP, spec.head_dim)?))),
            Role::GateUp => (Some(gate_up_rows(rows / 2, (rows / 2).next_multiple_of(PANEL))), None),
            Role::Embedding { .. } | Role::Router | Role::Down | Role::Head => (None, None),
        };
        let agrees = match role {
            Role::Qkv(spec) => rows == (spec.heads + 2 * spec.kv_heads) * spec.head_dim,
            Role::Output(spec) => real_cols == spec.heads * spec.head_dim,
            Role::GateUp => rows.is_multiple_of(2),
            Role::Embedding { .. } | Role::Router | Role::Down | Role::Head => true,
        };
        if !agrees {
            return Err(shape_error(OP, "rows and columns"));
        }
        let cols = col_map.as_ref().map_or(real_cols.next_multiple_of(PANEL), Vec::len);
        // The rows of an output projection are the columns of the residual stream.
        let rows = match (&row_map, role) {
            (Some(map), _) => map.len(),
            (None, Role::Output(_) | Role::Down) => rows.next_multiple_of(PANEL),
            (None, _) => rows.next_multiple_of(8),
        };
        Ok(Self { rows, cols, row_map, col_map })
    }
}

fn shape_error(op: &'static str, what: &str) -> DeviceError {
    DeviceError::new(op, format!("{what} contradict the layer's shape"))
}

impl Packer {
    pub(crate) fn new(device: &Device, gemm: MoeGemm, rounds: bool) -> Result<Self, DeviceError> {
        let (panels, mxfp4) = (PackPanels::load(device)?, PackMxfp4::load(device)?);
        let nvfp4 = PackNvfp4::load(device)?;
        Ok(Self { panels, mxfp4, nvfp4, gemm, tools: None, chunk: CHUNK, finished: false, rounds })
    }

    /// Lets go of the staging memory once everything is loaded. Whoever calls it synchronizes before the first step.
    pub(crate) fn finish(&mut self) {
        self.tools = None;
        self.finished = true;
    }

    /// Kernels read weights before they wait for anything, so no step may begin while weights are on their way. One wait does for
    /// all that is loaded before the first step; what comes later is waited for as it comes.
    fn settle(&mut self, device: &Device) -> Result<(), DeviceError> {
        if self.finished {
            self.tools = None;
            device.synchronize()?;
        }
        Ok(())
    }

    /// The tools, with at least `room` bytes of staging memory.
    fn tools(&mut self, device: &Device, room: usize) -> Result<&mut Tools, DeviceError> {
        let tools = match self.tools.take() {
            Some(tools) if tools.staging.len() >= room => tools,
            Some(Tools { uploader, staging }) => {
                drop(staging);
                Tools { uploader, staging: device.allocate(room)? }
            }
            None => Tools { uploader: Uploader::new(device)?, staging: device.allocate(room)? },
        };
        Ok(self.tools.insert(tools))
    }

    fn upload<T: Pod>(&mut self, device: &Device, values: &[T]) -> Result<Buffer<T>, DeviceError> {
        self.tools(device, 0)?.uploader.upload(values)
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
        if role == Role::GateUp && bias.is_some() {
            return Err(DeviceError::new(OP, "there are no kernels for a bias of gate and up"));
        }
        let (matrix, rounding) = match self.rounds {
            true => nvfp4::with_rounded_inputs(matrix, bias.is_some(), role)?,
            false => (matrix, None),
        };
        let real_cols = matrix.cols();
        let layout = Layout::new(role, rows, real_cols)?;
        let (padded_rows, cols) = (layout.rows, layout.cols);
        let mut padded_bias = vec![0.0; padded_rows];
        for (at, place) in padded_bias.iter_mut().enumerate() {
            let source =
                layout.row_map.as_ref().map_or(at, |map| usize::try_from(map[at]).unwrap_or(usize::MAX));
            *place = bias.as_ref().and_then(|bias| bias.get(source)).copied().unwrap_or_default();
        }
        let plain = match (role, matrix.elements()) {
            (Role::Qkv(_) | Role::Output(_) | Role::GateUp | Role::Down, _) => None,
            // What is multiplied too is looked up in its panels.
            (Role::Head | Role::Embedding { head: true }, _) => None,
            (_, Elements::Bf16(values)) if cols == real_cols => {
                Some(self.upload(device, bytemuck::cast_slice(values))?)
            }
            _ => Some(self.upload(device, &rows_of(&matrix, cols))?),
        };
        let stays = nvfp4::stays(&matrix, bias.is_some(), role);
        let nvfp4 = if stays { self.nvfp4(device, &matrix, &layout)? } else { None };
        let panels = match (&plain, &nvfp4) {
            (None, None) => Some(self.packed(device, &matrix, &layout)?),
            _ => None,
        };
        let bias = self.upload(device, &padded_bias)?;
        discard(matrix, rows * real_cols);
        self.settle(device)?;
        Ok(CudaMatrix { plain, panels, nvfp4, bias, rows, padded_rows, cols, rounding })
    }

    /// Panels of a matrix in host memory: at once where its rows are permuted, else some rows at a time.
    fn packed(
        &mut self,
        device: &Device,
        matrix: &Matrix,
        layout: &Layout,
    ) -> Result<Buffer<u16>, DeviceError> {
        let unpacked: Vec<bf16>;
        let (bytes, wide): (&[u8], bool) = match matrix.elements() {
            Elements::Bf16(values) => (bytemuck::cast_slice(values), false),
            Elements::F32(values) => (bytemuck::cast_slice(values), true),
            Elements::Mxfp4 { .. } | Elements::Nvfp4 { .. } | Elements::Affine { .. } => {
                unpacked = decoded(matrix);
                (bytemuck::cast_slice(&unpacked), false)
            }
        };
        let (kernel, rows, real_cols) = (self.panels, matrix.rows(), matrix.cols());
        let row_bytes = real_cols * if wide { size_of::<f32>() } else { size_of::<bf16>() };
        let each = if layout.row_map.is_some() { layout.rows } else { (self.chunk / row_bytes).max(1) };
        let [row_map, col_map] =
            [&layout.row_map, &layout.col_map].map(|map| map.as_deref().unwrap_or_default());
        let columns_at = size_of_val(row_map).next_multiple_of(ALIGN);
        let source_at = columns_at + size_of_val(col_map).next_multiple_of(ALIGN);
        let panels = device.allocate(layout.rows * layout.cols)?;
        let Tools { uploader, staging } = self.tools(device, source_at + each.min(rows) * row_bytes)?;
        uploader.write(staging, 0, bytemuck::cast_slice(row_map))?;
        uploader.write(staging, columns_at, bytemuck::cast_slice(col_map))?;
        // SAFETY: the views end before what they view does, which is written again by later ops of the stream only.
        let (rows_on, cols_on) = unsafe {
            (staging.view::<i32>(0, row_map.len())?, staging.view::<i32>(columns_at, col_map.len())?)
        };
        for first in (0..layout.rows).step_by(each) {
            // Rows beyond the source are padding.
            let real = rows.saturating_sub(first).min(each);
            uploader.write(staging, source_at, &bytes[first.min(rows) * row_bytes..][..real * row_bytes])?;
            // SAFETY: as above.
            let (narrow, full) = unsafe {
                let count = |is| if is { real * real_cols } else { 0 };
                (staging.view(source_at, count(!wide))?, staging.view(source_at, count(wide))?)
            };
            let call = pack_panels::Call {
                source: if wide { Source::F32(&full) } else { Source::Bf16(&narrow) },
                rows: real,
                cols: real_cols,
                panels: &panels,
                capacity: layout.rows,
                padded: layout.cols,
                first,
                count: each.min(layout.rows - first),
                row_map: layout.row_map.as_ref().map(|_| &rows_on),
                column_map: layout.col_map.as_ref().map(|_| &cols_on),
            };
            kernel.issue(device, &call)?;
        }
        Ok(panels)
    }

    pub(crate) fn vector(
        &mut self,
        device: &Device,
        mut values: Vec<f32>,
    ) -> Result<CudaVector, DeviceError> {
        let len = values.len();
        let padded = len.next_multiple_of(PANEL);
        values.resize(padded, 0.0);
        let factor = (len as f64 / padded.max(1) as f64).sqrt();
        let scaled: Vec<f32> = values.iter().map(|&v| (f64::from(v) * factor) as f32).collect();
        let (scaled, head) = if len == padded {
            (None, None)
        } else {
            let head = if HEAD_DIMS.contains(&padded) && len.is_multiple_of(2) {
                let mut spread = vec![0.0; padded];
                (0..len).for_each(|at| spread[natural(at, len / 2, padded)] = scaled[at]);
                Some(self.upload(device, &spread)?)
            } else {
                None
            };
            (Some(self.upload(device, &scaled)?), head)
        };
        let values = self.upload(device, &values)?;
        self.settle(device)?;
        Ok(CudaVector { values, scaled, head, len })
    }
}

/// Frees host memory. That of a large tensor on a thread of its own: the system takes about as long to take the pages back as it
/// took to copy what was in them. Where no thread is to be had it is freed here.
fn discard<T: Send + 'static>(memory: T, elements: usize) {
    const LARGE: usize = 4 << 20;
    if elements >= LARGE {
        let _ = thread::Builder::new().name("free".to_owned()).spawn(move || drop(memory));
    }
}

/// Row-major bits of bf16, rows padded with zeros to `padded` elements.
fn rows_of(matrix: &Matrix, padded: usize) -> Vec<u16> {
    let bits: Cow<'_, [u16]> = match matrix.elements() {
        Elements::Bf16(values) => Cow::Borrowed(bytemuck::cast_slice(values)),
        Elements::F32(values) => Cow::Owned(values.iter().map(|&v| bf16::from_f32(v).to_bits()).collect()),
        Elements::Mxfp4 { .. } | Elements::Nvfp4 { .. } | Elements::Affine { .. } => {
            Cow::Owned(decoded(matrix).into_iter().map(bf16::to_bits).collect())
        }
    };
    let cols = matrix.cols();
    let mut wide = vec![0; matrix.rows() * padded];
    wide.chunks_mut(padded).zip(bits.chunks(cols)).for_each(|(to, from)| to[..cols].copy_from_slice(from));
    wide
}

/// Packed elements, decoded and rounded to bf16; MXFP4 is exact in it.
fn decoded(matrix: &Matrix) -> Vec<bf16> {
    let mut row = vec![0.0; matrix.cols()];
    let mut out = Vec::with_capacity(matrix.rows() * matrix.cols());
    for at in 0..matrix.rows() {
        matrix.decode_row(at, &mut row);
        out.extend(row.iter().copied().map(bf16::from_f32));
    }
    out
}

#[cfg(test)]
mod tests;
