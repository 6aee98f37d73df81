//! Second half of sampling: picks a token of every row, and reads log-probabilities.

use ctxserve_backend::DeviceError;

use super::sample_scan;
use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "sample_pick";
const THREADS: u32 = 512;
/// `sizeof(Shared)` of the kernel; its file asserts that.
const SHARED: usize = 53_696;

/// Alternatives that a row has room for.
pub const ALTERNATIVES: usize = 20;
/// A logit was NaN or positive infinity, or none was finite.
pub const NON_FINITE: u32 = 1;
/// Bans left nothing.
pub const NOTHING_LEFT: u32 = 2;

/// The outcome of a row: id, status (0 is success), bits of the id's log-probability, nothing.
pub type Head = [u32; 4];
/// An id and the bits of its log-probability.
pub type Alternative = [u32; 2];

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    table: u64,
    logits: u64,
    partials: u64,
    heads: u64,
    alternatives: u64,
    sampled: u64,
    vocab: i32,
    stride: i32,
    parts: i32,
}

// SAFETY: mirrors `Params` of kernels/sample_pick.cu.
unsafe impl Params for Arguments {}

/// The loaded kernel.
#[derive(Clone, Copy, Debug)]
pub struct SamplePick {
    kernel: Kernel,
}

/// What a launch works on.
#[derive(Debug)]
pub struct Call<'a> {
    /// What the first half was given.
    pub scan: sample_scan::Call<'a>,
    /// `[rows]`.
    pub heads: &'a Buffer<Head>,
    /// `[rows, ALTERNATIVES]`.
    pub alternatives: &'a Buffer<Alternative>,
    /// `[rows]`: the ids again; one inside the vocabulary for rows that fail too.
    pub sampled: &'a Buffer<i32>,
}

impl SamplePick {
    /// Loads the kernel.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        Ok(Self { kernel: device.kernel("sample_pick", "sample_pick", SHARED)? })
    }

    /// Issues it.
    ///
    /// # Errors
    /// Buffers that are too small, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let scan = &call.scan;
        scan.check(OP)?;
        let rows = scan.rows;
        let fits = call.heads.len() >= rows
            && call.alternatives.len() >= rows * ALTERNATIVES
            && call.sampled.len() >= rows;
        if !fits {
            return Err(DeviceError::new(OP, format!("{rows} rows do not fit its outputs")));
        }
        let arguments = Arguments {
            table: scan.table.address(),
            logits: scan.logits.address(),
            partials: scan.partials.address(),
            heads: call.heads.address(),
            alternatives: call.alternatives.address(),
            sampled: call.sampled.address(),
            vocab: scan.vocab as i32,
            stride: scan.stride as i32,
            parts: scan.vocab.div_ceil(sample_scan::PART) as i32,
        };
        let grid = [rows.max(1) as u32, 2, 1];
        let launch = Launch { grid, block: THREADS, shared: SHARED as u32, overlap: true };
        // SAFETY: every buffer was checked to be large enough; what the table says is the caller's promise.
        unsafe { device.launch(&self.kernel, &launch, &arguments) }
    }
}
