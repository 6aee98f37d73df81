//! First half of sampling: adjusts logits, checks them, and finds the best and the masses of every part of a row.

use bytemuck::{Pod, Zeroable};
use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "sample_scan";
const THREADS: u32 = 256;
const BLOCKS_PER_MULTIPROCESSOR: u32 = 4;

/// Columns of a part, which one warp scans.
pub const PART: usize = 1024;
/// Most parts of a row.
pub const MAX_PARTS: usize = 511;

/// The row is drawn; otherwise its best token is taken.
pub const DRAWN: u32 = 1;
/// Log-probabilities are wanted.
pub const LOGPROBS: u32 = 2;
/// The row has a list of logits to change.
pub const ADJUSTED: u32 = 4;
/// The row has a mask of the logits that count.
pub const MASKED: u32 = 8;
/// Marks an entry's id as banned.
pub const BANNED: u32 = 1 << 31;
/// Marks an entry's id as one that the repetition penalty is for.
pub const SEEN: u32 = 1 << 30;

/// 64 bytes of a step's table: line 0 is a [`Header`], line `r + 1` is row `r`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Line {
    /// The draw, in `[0, 1)`.
    pub uniform: f64,
    /// Nucleus mass; 1 is off.
    pub top_p: f64,
    /// 1 / temperature is this and the next.
    pub inverse: f32,
    /// What `inverse` rounds away.
    pub inverse_rest: f32,
    /// Least weight relative to the best; 0 is off.
    pub min_p: f32,
    /// Most candidates; 0 is off.
    pub top_k: u32,
    /// Divides positive and multiplies negative logits that are marked [`SEEN`].
    pub repetition: f32,
    /// Subtracted per occurrence.
    pub frequency: f32,
    /// Subtracted where there is an occurrence.
    pub presence: f32,
    /// [`DRAWN`], [`LOGPROBS`], [`ADJUSTED`], [`MASKED`].
    pub flags: u32,
    /// Word at which the row's lists start: `parts + 1` offsets of entries, then the entries of three words each (id, bits of the
    /// bias, marks and count), part by part.
    pub lists: u32,
    /// Alternatives wanted.
    pub alternatives: u32,
    /// Word at which the row's mask starts: 32 words a part, one bit a column, 1 where the token may be picked.
    pub mask: u32,
    /// Nothing.
    pub spare: u32,
}

// SAFETY: plain numbers without padding: two f64, twelve words of four bytes.
unsafe impl Zeroable for Line {}
// SAFETY: as above.
unsafe impl Pod for Line {}

/// Line 0 of a table.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Header {
    /// Address of the lists.
    pub lists: u64,
    /// Rows to sample.
    pub live: u32,
    /// Nothing.
    pub spare: [u32; 13],
}

// SAFETY: plain numbers: eight bytes and fourteen words, 64 bytes without padding.
unsafe impl Zeroable for Header {}
// SAFETY: as above.
unsafe impl Pod for Header {}

/// What is found in a part of a row: 32 bytes that only the kernels read.
pub type Partial = [u64; 4];

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    table: u64,
    logits: u64,
    partials: u64,
    vocab: i32,
    stride: i32,
    parts: i32,
}

// SAFETY: mirrors `Params` of kernels/sample_scan.cu.
unsafe impl Params for Arguments {}

/// The loaded kernel.
#[derive(Clone, Copy, Debug)]
pub struct SampleScan {
    kernel: Kernel,
}

/// What a launch works on.
#[derive(Debug)]
pub struct Call<'a> {
    /// `[1 + rows]`; the header's `live` is at most `rows`, and lists hold ids inside the vocabulary.
    pub table: &'a Buffer<Line>,
    /// `[rows, stride]`, adjusted in place.
    pub logits: &'a Buffer<f32>,
    /// `[rows, parts]`.
    pub partials: &'a Buffer<Partial>,
    /// Most rows.
    pub rows: usize,
    /// Columns.
    pub vocab: usize,
    /// Floats from row to row, a multiple of 4.
    pub stride: usize,
}

impl Call<'_> {
    /// Checks what both halves of sampling rely on.
    pub(super) fn check(&self, op: &'static str) -> Result<(), DeviceError> {
        let Self { rows, vocab, stride, .. } = *self;
        let parts = vocab.div_ceil(PART);
        let fits = (1..=MAX_PARTS).contains(&parts)
            && stride >= vocab
            && stride.is_multiple_of(4)
            && (rows + 1).saturating_mul(MAX_PARTS) < i32::MAX as usize
            && self.table.len() > rows
            && self.logits.len() >= rows * stride
            && self.partials.len() >= rows * parts;
        if fits {
            return Ok(());
        }
        Err(DeviceError::new(
            op,
            format!("{rows} rows of {vocab} logits, {stride} apart, do not fit its buffers"),
        ))
    }
}

impl SampleScan {
    /// Loads the kernel.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        Ok(Self { kernel: device.kernel("sample_scan", "sample_scan", 0)? })
    }

    /// Issues it.
    ///
    /// # Errors
    /// Buffers that are too small, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        call.check(OP)?;
        let parts = call.vocab.div_ceil(PART);
        let arguments = Arguments {
            table: call.table.address(),
            logits: call.logits.address(),
            partials: call.partials.address(),
            vocab: call.vocab as i32,
            stride: call.stride as i32,
            parts: parts as i32,
        };
        let most = device.facts().multiprocessors * BLOCKS_PER_MULTIPROCESSOR;
        let blocks = (call.rows * parts).clamp(1, most as usize) as u32;
        let launch = Launch { grid: [blocks, 1, 1], block: THREADS, shared: 0, overlap: true };
        // SAFETY: every buffer was checked to be large enough; what the table says is the caller's promise.
        unsafe { device.launch(&self.kernel, &launch, &arguments) }
    }
}
