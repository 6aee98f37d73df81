//! The cache of some sequences as contiguous bf16 lines, for the attention of many rows.

use ctxserve_backend::DeviceError;

use super::attention::{
    Cache, CacheArguments, HEAD_DIM, Sequences, SequencesArguments, Tables, TablesArguments, kernel_of,
};
use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "kv_gather";
const THREADS: u32 = 256;
/// Lines that a sequence's part of the scratch is aligned to and padded to.
pub const LINES: usize = 128;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    cache: CacheArguments,
    tables: TablesArguments,
    sequences: SequencesArguments,
    keys: u64,
    values: u64,
    lines: i32,
}

// SAFETY: mirrors `Params` of kernels/kv_gather.cu.
unsafe impl Params for Arguments {}

/// The loaded kernels.
#[derive(Clone, Copy, Debug)]
pub struct KvGather {
    e4m3: Kernel,
    bf16: Kernel,
    head_dim: usize,
}

/// Lines that a sequence takes: the positions that its rows see, padded.
pub fn lines_of(start: usize, rows: usize, window: Option<usize>) -> usize {
    let first = window.map_or(0, |window| (start + 1).saturating_sub(window));
    (start + rows - first).next_multiple_of(LINES)
}

/// Copies what the rows of some sequences see.
#[derive(Debug)]
pub struct Call<'a> {
    /// The layer's cache.
    pub cache: Cache,
    /// Pages of all sequences.
    pub tables: Tables<'a>,
    /// Whose rows; their lines follow one another in this order, [`lines_of`] each.
    pub sequences: Sequences<'a>,
    /// `[kv_heads][head_dim / 64][lines][64]`, bits of bf16, chunks of a line swizzled by its number (kernels/README.md, panel layout).
    pub keys: &'a Buffer<u16>,
    /// The same, of values.
    pub values: &'a Buffer<u16>,
    /// Lines of a head: the sum of [`lines_of`], or more.
    // The kernel leaves lines beyond the sum alone.
    pub lines: usize,
}

impl KvGather {
    /// Loads the kernels for heads of 64 elements.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        Self::load_for(device, HEAD_DIM)
    }

    /// Loads the kernels for heads of so many elements.
    ///
    /// # Errors
    /// Heads that there are no kernels for, or no code for this device.
    pub fn load_for(device: &Device, head_dim: usize) -> Result<Self, DeviceError> {
        let kernel = |names| device.kernel(OP, kernel_of(OP, head_dim, names)?, 0);
        Ok(Self {
            e4m3: kernel(["kv_gather_e4m3", "kv_gather_e4m3_128"])?,
            bf16: kernel(["kv_gather_bf16", "kv_gather_bf16_128"])?,
            head_dim,
        })
    }

    /// Issues it.
    ///
    /// # Errors
    /// Buffers that are too small, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let Call { cache, lines, .. } = *call;
        let arguments = cache.arguments(OP)?;
        let kv_heads = cache.kv_heads;
        let fits = lines > 0
            && lines.is_multiple_of(LINES)
            && lines <= i32::MAX as usize
            && call.keys.len() >= kv_heads * lines * self.head_dim
            && call.values.len() >= kv_heads * lines * self.head_dim
            && call.sequences.fit()
            && call.tables.holds(call.sequences.first + call.sequences.count);
        if !fits {
            return Err(DeviceError::new(OP, format!("{lines} lines of {kv_heads} heads do not fit")));
        }
        let arguments = Arguments {
            cache: arguments,
            tables: call.tables.arguments(),
            sequences: call.sequences.arguments(),
            keys: call.keys.address(),
            values: call.values.address(),
            lines: lines as i32,
        };
        let kernel = if cache.is_fp8() { &self.e4m3 } else { &self.bf16 };
        let grid = [(lines / LINES) as u32, kv_heads as u32, 1];
        let launch = Launch { grid, block: THREADS, shared: 0, overlap: true };
        // SAFETY: the scratch was checked to hold all lines of the grid; tables are the caller's plan.
        unsafe { device.launch(kernel, &launch, &arguments) }
    }
}
