//! Attention of rows that are one new token of a sequence each.

use ctxserve_backend::DeviceError;

use super::attention::{Cache, CacheArguments, HEAD_DIM, MOST_GROUP, Tables, TablesArguments};
use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "attention_decode";
const WARPS: usize = 4;
const STAGES: usize = 4;
/// Floats of a block's part of a row's result.
const PARTIAL: usize = MOST_GROUP * HEAD_DIM + 2 * MOST_GROUP;
const LOG2_E: f32 = std::f32::consts::LOG2_E;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    q: u64,
    kv: u64,
    cache: CacheArguments,
    tables: TablesArguments,
    position: u64,
    slot: u64,
    live: u64,
    sinks: u64,
    out: u64,
    partial: u64,
    arrived: u64,
    group: i32,
    capacity: i32,
    scale: f32,
}

// SAFETY: mirrors `Params` of kernels/attention_decode.cu.
unsafe impl Params for Arguments {}

/// The loaded kernels.
#[derive(Clone, Copy, Debug)]
pub struct AttentionDecode {
    e4m3: Kernel,
    bf16: Kernel,
}

/// Memory in which the parts of a row's result meet. One launch at a time uses it.
#[derive(Debug)]
pub struct Workspace {
    partial: Buffer<f32>,
    arrived: Buffer<i32>,
}

impl Workspace {
    /// Room for `rows` rows of `kv_heads` in `splits` parts.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(device: &Device, rows: usize, kv_heads: usize, splits: usize) -> Result<Self, DeviceError> {
        let pairs = rows * kv_heads;
        Ok(Self {
            partial: device.allocate(if splits > 1 { pairs * splits * PARTIAL } else { 0 })?,
            arrived: device.zeros(pairs)?,
        })
    }

    /// Bytes that `new` takes.
    pub fn bytes(rows: usize, kv_heads: usize, splits: usize) -> usize {
        rows * kv_heads * 4 * (1 + if splits > 1 { splits * PARTIAL } else { 0 })
    }
}

/// Appends each row's key and value to the cache, then attends over what the row sees.
#[derive(Debug)]
pub struct Call<'a> {
    /// `[rows, heads * 64]`, bits of bf16, rotated.
    pub q: &'a Buffer<u16>,
    /// `[rows, 2 * kv_heads * 64]`: rotated keys, then values. Absent: they are in the cache.
    pub kv: Option<&'a Buffer<f32>>,
    /// The layer's cache.
    pub cache: Cache,
    /// Row `r` is sequence `r`.
    pub tables: Tables<'a>,
    /// Position of each row.
    pub position: &'a Buffer<i32>,
    /// `page * page_size + offset` of each row's new token; negative: it is not stored.
    pub slot: &'a Buffer<i32>,
    /// One integer: rows to do.
    pub live: &'a Buffer<i32>,
    /// A logit for each query head that joins the denominator.
    pub sinks: Option<&'a Buffer<f32>>,
    /// Bits of bf16 `[rows, heads * 64]`: row-major, or panels of `capacity` rows.
    pub out: &'a Buffer<u16>,
    /// Made for at least these rows, heads and splits.
    pub workspace: &'a Workspace,
    /// Most rows, which the grid is made for.
    pub rows: usize,
    /// Query heads.
    pub heads: usize,
    /// Blocks that may share a row's positions.
    pub splits: usize,
    /// Rows that the panels of `out` are laid out for, a multiple of 8; absent: row-major.
    pub capacity: Option<usize>,
    /// Multiplies the scores.
    pub scale: f32,
}

/// Blocks a row and key/value head that fill a device when `rows` rows are live; 1 for a window, which one block covers.
pub fn splits(rows: usize, cache: &Cache, multiprocessors: usize) -> usize {
    const BLOCKS: usize = 2;
    const MOST: usize = 64;
    if cache.window.is_some_and(|window| window <= 512) {
        return 1;
    }
    (BLOCKS * multiprocessors).div_ceil((rows * cache.kv_heads).max(1)).clamp(1, MOST)
}

fn shared(fp8: bool) -> usize {
    WARPS * STAGES * (4096 + if fp8 { 256 } else { 0 })
}

impl AttentionDecode {
    /// Loads the kernels.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        Ok(Self {
            e4m3: device.kernel(OP, "attention_decode_e4m3", shared(true))?,
            bf16: device.kernel(OP, "attention_decode_bf16", shared(false))?,
        })
    }

    /// Issues it.
    ///
    /// # Errors
    /// Buffers that are too small, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let Call { rows, heads, splits, cache, workspace, .. } = *call;
        let kv_heads = cache.kv_heads;
        let arguments = cache.arguments(OP)?;
        let width = heads * HEAD_DIM;
        let parts = if splits > 1 { rows * kv_heads * splits * PARTIAL } else { 0 };
        let fits = heads.is_multiple_of(kv_heads)
            && (1..=MOST_GROUP).contains(&(heads / kv_heads))
            && (1..=65_535).contains(&rows)
            && splits >= 1
            && call.q.len() >= rows * width
            && call.kv.is_none_or(|kv| kv.len() >= rows * 2 * kv_heads * HEAD_DIM)
            && call.tables.holds(rows)
            && call.position.len() >= rows
            && call.slot.len() >= rows
            && !call.live.is_empty()
            && call.sinks.is_none_or(|sinks| sinks.len() >= heads)
            && call.capacity.is_none_or(|capacity| capacity.is_multiple_of(8) && capacity >= rows)
            && call.out.len() >= call.capacity.unwrap_or(rows) * width
            && workspace.partial.len() >= parts
            && workspace.arrived.len() >= rows * kv_heads;
        if !fits {
            let what = format!("{rows} rows of {heads} heads over {kv_heads} do not fit their buffers");
            return Err(DeviceError::new(OP, what));
        }
        let arguments = Arguments {
            q: call.q.address(),
            kv: call.kv.map_or(0, Buffer::address),
            cache: arguments,
            tables: call.tables.arguments(),
            position: call.position.address(),
            slot: call.slot.address(),
            live: call.live.address(),
            sinks: call.sinks.map_or(0, Buffer::address),
            out: call.out.address(),
            partial: workspace.partial.address(),
            arrived: workspace.arrived.address(),
            group: (heads / kv_heads) as i32,
            capacity: call.capacity.unwrap_or(0) as i32,
            scale: call.scale * LOG2_E,
        };
        let kernel = if cache.is_fp8() { &self.e4m3 } else { &self.bf16 };
        let launch = Launch {
            grid: [splits as u32, kv_heads as u32, rows as u32],
            block: WARPS as u32 * 32,
            shared: shared(cache.is_fp8()) as u32,
            overlap: true,
        };
        // SAFETY: every buffer was checked to be large enough; pages and slots are inside the cache by the caller's plan.
        unsafe { device.launch(kernel, &launch, &arguments) }
    }
}
