//! Attention of many rows of a sequence over its gathered keys and values.

use ctxserve_backend::DeviceError;

use super::attention::{HEAD_DIM, Sequences, SequencesArguments};
use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "attention_prefill";
const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// Shared memory of the Hopper kernel: alignment, 192 rows of queries, three tiles of 128 keys and of as many values, barriers.
const HOPPER_SHARED: usize = 1024 + 192 * 128 + 2 * 3 * 128 * 128 + 4 * 3 * 8;

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
}

/// Attends from the rows of some sequences.
#[derive(Debug)]
pub struct Call<'a> {
    /// `[rows, heads * 64]`, bits of bf16, rotated.
    pub q: &'a Buffer<u16>,
    /// `[kv_heads][lines][64]`, as `kv_gather` writes them.
    pub keys: &'a Buffer<u16>,
    /// The same, of values.
    pub values: &'a Buffer<u16>,
    /// Whose rows; those whose lines were gathered.
    pub sequences: Sequences<'a>,
    /// A logit for each query head that joins the denominator.
    pub sinks: Option<&'a Buffer<f32>>,
    /// Bits of bf16 `[rows, heads * 64]`: row-major, or panels of `capacity` rows.
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
    /// Loads the kernel for this device.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        if device.facts().is_hopper() { Self::load_hopper(device) } else { Self::load_portable(device) }
    }

    /// Loads the kernel made of Hopper's own instructions.
    ///
    /// # Errors
    /// Another device.
    pub fn load_hopper(device: &Device) -> Result<Self, DeviceError> {
        if !device.facts().is_hopper() {
            return Err(DeviceError::new(OP, format!("{} is no Hopper device", device.facts().name)));
        }
        let kernel = device.kernel(OP, "attention_prefill_hopper", HOPPER_SHARED)?;
        Ok(Self { kernel, rows: 192, threads: 512, shared: HOPPER_SHARED as u32 })
    }

    /// Loads the kernel that runs on every device.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load_portable(device: &Device) -> Result<Self, DeviceError> {
        let kernel = device.kernel(OP, "attention_prefill_portable", 0)?;
        Ok(Self { kernel, rows: 128, threads: 256, shared: 0 })
    }

    /// Blocks that a head of a sequence of `rows` rows takes.
    pub fn runs_of(&self, rows: usize) -> usize {
        rows.div_ceil(self.rows)
    }

    /// Issues it.
    ///
    /// # Errors
    /// Buffers that are too small, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let Call { rows, heads, kv_heads, lines, runs, .. } = *call;
        let width = heads * HEAD_DIM;
        let scratch = kv_heads * lines * HEAD_DIM;
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
        let arguments = Arguments {
            q: call.q.address(),
            keys: call.keys.address(),
            values: call.values.address(),
            sequences: call.sequences.arguments(),
            sinks: call.sinks.map_or(0, Buffer::address),
            out: call.out.address(),
            heads: heads as i32,
            group: (heads / kv_heads) as i32,
            lines: lines as i32,
            window: call.window.unwrap_or(0) as i32,
            capacity: call.capacity.unwrap_or(0) as i32,
            scale: call.scale * LOG2_E,
        };
        let launch = Launch {
            grid: [heads as u32, runs as u32, 1],
            block: self.threads,
            shared: self.shared,
            overlap: true,
        };
        // SAFETY: every buffer was checked to be large enough; rows and lines of the sequences are the caller's plan.
        unsafe { device.launch(&self.kernel, &launch, &arguments) }
    }
}
