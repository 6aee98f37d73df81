//! Row-major matrices, as checkpoints store them, into panel layout.

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "pack_panels";
const THREADS: u32 = 256;
/// Blocks of a launch: enough to fill a device; each takes many chunks of a large matrix.
const BLOCKS: usize = 2048;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    source: u64,
    panels: u64,
    row_map: u64,
    column_map: u64,
    rows: i32,
    cols: i32,
    first: i32,
    count: i32,
    capacity: i32,
    padded: i32,
}

// SAFETY: mirrors `Params` of kernels/pack_panels.cu.
unsafe impl Params for Arguments {}

/// The loaded kernels.
#[derive(Clone, Copy, Debug)]
pub struct PackPanels {
    bf16: Kernel,
    f32: Kernel,
}

/// A row-major matrix on the device.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// Bits of bf16.
    Bf16(&'a Buffer<u16>),
    /// Rounded to the nearest bf16, ties to even.
    F32(&'a Buffer<f32>),
}

/// Rows `first .. first + count` of a matrix in panel layout from a row-major one.
#[derive(Debug)]
pub struct Call<'a> {
    /// `[rows, cols]`.
    pub source: Source<'a>,
    /// Rows of the source.
    pub rows: usize,
    /// Columns of the source.
    pub cols: usize,
    /// Panel layout of `[capacity, padded]`, bits of bf16.
    pub panels: &'a Buffer<u16>,
    /// Its rows, a multiple of 8.
    pub capacity: usize,
    /// Its columns, a multiple of 64.
    pub padded: usize,
    /// First row to write.
    pub first: usize,
    /// Rows to write.
    pub count: usize,
    /// `[count]`: the source row of each, -1 for zeros. Absent: in order, zeros beyond the source.
    pub row_map: Option<&'a Buffer<i32>>,
    /// `[padded]`: the source column of each, -1 for zeros. Absent: in order, zeros beyond the source.
    pub column_map: Option<&'a Buffer<i32>>,
}

impl PackPanels {
    /// Loads the kernels.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        let kernel = |function| device.kernel(OP, function, 0);
        Ok(Self { bf16: kernel("pack_panels_bf16")?, f32: kernel("pack_panels_f32")? })
    }

    /// Issues it. Kernels that read weights before they wait must not be issued before this one has finished:
    /// [`Device::synchronize`] once after loading.
    ///
    /// # Errors
    /// Buffers that are too small, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let Call { rows, cols, capacity, padded, first, count, .. } = *call;
        let (source, len, kernel) = match call.source {
            Source::Bf16(source) => (source.address(), source.len(), &self.bf16),
            Source::F32(source) => (source.address(), source.len(), &self.f32),
        };
        let small = |value: usize| value <= 1 << 30;
        let fits = [rows, cols, capacity, padded, first, count].into_iter().all(small)
            && capacity.is_multiple_of(8)
            && padded.is_multiple_of(64)
            && first + count <= capacity
            && len >= rows * cols
            && call.panels.len() >= capacity * padded
            && call.row_map.is_none_or(|map| map.len() >= count)
            && call.column_map.is_none_or(|map| map.len() >= padded);
        if !fits {
            return Err(DeviceError::new(
                OP,
                format!(
                    "[{rows}, {cols}] to rows {first}..+{count} of [{capacity}, {padded}] does not fit its buffers"
                ),
            ));
        }
        let chunks = count * padded / 8;
        if chunks == 0 {
            return Ok(());
        }
        let arguments = Arguments {
            source,
            panels: call.panels.address(),
            row_map: call.row_map.map_or(0, Buffer::address),
            column_map: call.column_map.map_or(0, Buffer::address),
            rows: rows as i32,
            cols: cols as i32,
            first: first as i32,
            count: count as i32,
            capacity: capacity as i32,
            padded: padded as i32,
        };
        let blocks = chunks.div_ceil(THREADS as usize).min(BLOCKS) as u32;
        let launch = Launch { grid: [blocks, 1, 1], block: THREADS, shared: 0, overlap: true };
        // SAFETY: every buffer was checked to be large enough; source indices are checked by the kernel.
        unsafe { device.launch(kernel, &launch, &arguments) }
    }
}
