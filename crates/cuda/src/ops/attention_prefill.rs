//! Attention of many rows of a sequence over its gathered keys and values.

use ctxserve_backend::DeviceError;

use super::attention::{HEAD_DIM, Sequences, SequencesArguments, kernel_of};
use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "attention_prefill";
const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// Rows of a group's tile of the Hopper kernels, of all query heads that it takes together.
const GROUP_ROWS: usize = 64;
/// Groups of the Hopper kernels, by [`super::attention::HEAD_DIMS`], and their stages of 128 keys and values.
const GROUPS: [(usize, usize); 2] = [(3, 4), (2, 2)];
/// Shared memory of the kernel for windows: twice 32 rows of 8 heads of queries, twice 168 keys and values, notes, barriers.
const WINDOW_SHARED: usize = 2 * 256 * 128 + 2 * 2 * 168 * 128 + 2 * 4 * 64 + 8 * (2 * 2 * 5);
/// Threads of its blocks.
const WINDOW_THREADS: u32 = 640;
/// Largest window that it takes.
const MOST_WINDOW: usize = 128;
/// log2 of the most query heads that it takes together.
const MOST_PACK: u32 = 3;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    q: u64,
    keys: u64,
    values: u64,
    sequences: SequencesArguments,
    sinks: u64,
    out: u64,
    heads: i32,
    group: i32,
    lines: i32,
    window: i32,
    capacity: i32,
    scale: f32,
    pack_shift: i32,
    runs: i32,
}

// SAFETY: mirrors `Params` of kernels/attention_prefill.cu.
unsafe impl Params for Arguments {}

/// A loaded kernel.
#[derive(Clone, Copy, Debug)]
pub struct AttentionPrefill {
    kernel: Kernel,
    rows: usize,
    threads: u32,
    shared: u32,
    windows: Option<Windows>,
    head_dim: usize,
}

/// What the Hopper kernel leaves to others.
#[derive(Clone, Copy, Debug)]
struct Windows {
    any: Kernel,
    /// For windows of at most [`MOST_WINDOW`] and groups of eight query heads.
    short: Option<Kernel>,
}

/// Attends from the rows of some sequences.
#[derive(Debug)]
pub struct Call<'a> {
    /// `[rows, heads * head_dim]`, bits of bf16, rotated.
    pub q: &'a Buffer<u16>,
    /// `[kv_heads][head_dim / 64][lines][64]`, as `kv_gather` writes them.
    pub keys: &'a Buffer<u16>,
    /// The same, of values.
    pub values: &'a Buffer<u16>,
    /// Whose rows; those whose lines were gathered.
    pub sequences: Sequences<'a>,
    /// A logit for each query head that joins the denominator.
    pub sinks: Option<&'a Buffer<f32>>,
    /// Bits of bf16 `[rows, heads * head_dim]`: row-major, or panels of `capacity` rows.
    pub out: &'a Buffer<u16>,
    /// Sum of [`AttentionPrefill::runs_of`] over the sequences, or more.
    pub runs: usize,
    /// Rows of the batch.
    pub rows: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Lines of a head of the scratch, a multiple of 128.
    pub lines: usize,
    /// Keys that a query sees, itself included; the lines were gathered for it.
    pub window: Option<usize>,
    /// Rows that the panels of `out` are laid out for, a multiple of 8; absent: row-major.
    pub capacity: Option<usize>,
    /// Multiplies the scores.
    pub scale: f32,
}

impl AttentionPrefill {
    /// Loads the kernel for this device and heads of 64 elements.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        Self::load_for(device, HEAD_DIM)
    }

    /// Loads the kernel for this device and heads of so many elements.
    ///
    /// # Errors
    /// Heads that there are no kernels for, or no code for this device.
    pub fn load_for(device: &Device, head_dim: usize) -> Result<Self, DeviceError> {
        let hopper = device.facts().is_hopper();
        if hopper { Self::load_hopper(device, head_dim) } else { Self::load_portable(device, head_dim) }
    }

    /// Loads the kernel made of Hopper's own instructions.
    ///
    /// # Errors
    /// Another device, or heads that there are no kernels for.
    pub fn load_hopper(device: &Device, head_dim: usize) -> Result<Self, DeviceError> {
        if !device.facts().is_hopper() {
            return Err(DeviceError::new(OP, format!("{} is no Hopper device", device.facts().name)));
        }
        let full = ["attention_prefill_hopper", "attention_prefill_hopper_128"];
        let (groups, stages) = GROUPS[usize::from(head_dim != HEAD_DIM)];
        // Twice the queries with a note each, tiles of keys and of as many values, barriers.
        let shared = 2 * groups * (GROUP_ROWS * head_dim * 2 + 64)
            + stages * 2 * 128 * head_dim * 2
            + 8 * (4 * stages + 4 * groups);
        let kernel = device.kernel(OP, kernel_of(OP, head_dim, full)?, shared)?;
        let any = ["attention_prefill_hopper_any", "attention_prefill_hopper_any_128"];
        let any = device.kernel(OP, kernel_of(OP, head_dim, any)?, shared)?;
        let short =
            (head_dim == HEAD_DIM).then(|| device.kernel(OP, "attention_prefill_window", WINDOW_SHARED));
        let windows = Some(Windows { any, short: short.transpose()? });
        let (rows, threads) = ((groups * GROUP_ROWS) >> MOST_PACK, (groups as u32 + 1) * 128);
        Ok(Self { kernel, rows, threads, shared: shared as u32, windows, head_dim })
    }

    /// Loads the kernel that runs on every device.
    ///
    /// # Errors
    /// Heads that there are no kernels for, or no code for this device.
    pub fn load_portable(device: &Device, head_dim: usize) -> Result<Self, DeviceError> {
        let names = ["attention_prefill_portable", "attention_prefill_portable_128"];
        let kernel = device.kernel(OP, kernel_of(OP, head_dim, names)?, 0)?;
        Ok(Self { kernel, rows: 128, threads: 256, shared: 0, windows: None, head_dim })
    }

    /// Most runs that the kernel cuts a sequence of `rows` rows into.
    pub fn runs_of(&self, rows: usize) -> usize {
        rows.div_ceil(self.rows)
    }

    /// Issues it.
    ///
    /// # Errors
    /// Buffers that are too small, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let Call { rows, heads, kv_heads, lines, runs, .. } = *call;
        let head_dim = self.head_dim;
        let width = heads * head_dim;
        let scratch = kv_heads * lines * head_dim;
        let fits = kv_heads > 0
            && heads > 0
            && heads.is_multiple_of(kv_heads)
            && lines.is_multiple_of(128)
            && lines <= i32::MAX as usize
            && (1..=65_535).contains(&runs)
            && call.q.len() >= rows * width
            && call.keys.len() >= scratch
            && call.values.len() >= scratch
            && call.sequences.fit()
            && call.sinks.is_none_or(|sinks| sinks.len() >= heads)
            && call.capacity.is_none_or(|capacity| capacity.is_multiple_of(8) && capacity >= rows)
            && call.out.len() >= call.capacity.unwrap_or(rows) * width;
        if !fits {
            let what = format!("{rows} rows of {heads} heads over {lines} lines do not fit their buffers");
            return Err(DeviceError::new(OP, what));
        }
        let group = heads / kv_heads;
        let pack_shift = group.trailing_zeros().min(MOST_PACK);
        let arguments = Arguments {
            q: call.q.address(),
            keys: call.keys.address(),
            values: call.values.address(),
            sequences: call.sequences.arguments(),
            sinks: call.sinks.map_or(0, Buffer::address),
            out: call.out.address(),
            heads: heads as i32,
            group: group as i32,
            lines: lines as i32,
            window: call.window.unwrap_or(0) as i32,
            capacity: call.capacity.unwrap_or(0) as i32,
            scale: call.scale * LOG2_E,
            pack_shift: pack_shift as i32,
            runs: runs as i32,
        };
        let items = (runs * (heads >> pack_shift)) as u32;
        // The Hopper kernels' blocks take one item after another.
        let grid = match self.windows {
            Some(_) => [device.facts().multiprocessors.min(items), 1, 1],
            None => [heads as u32, runs as u32, 1],
        };
        let (kernel, block, shared) = match (self.windows, call.window) {
            (Some(Windows { short: Some(kernel), .. }), Some(window))
                if window <= MOST_WINDOW && pack_shift == MOST_PACK =>
            {
                (kernel, WINDOW_THREADS, WINDOW_SHARED as u32)
            }
            (Some(Windows { any, .. }), Some(_)) => (any, self.threads, self.shared),
            _ => (self.kernel, self.threads, self.shared),
        };
        let launch = Launch { grid, block, shared, overlap: true };
        // SAFETY: every buffer was checked to be large enough; rows and lines of the sequences are the caller's plan.
        unsafe { device.launch(&kernel, &launch, &arguments) }
    }
}
