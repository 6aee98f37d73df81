//! Rows of the embedding table.

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "embed";
const THREADS: u32 = 384;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    table: u64,
    tokens: u64,
    feed: u64,
    sampled: u64,
    live: u64,
    x: u64,
    vocab: i32,
    hidden: i32,
    cols: i32,
    capacity: i32,
}

// SAFETY: mirrors `Params` of kernels/embed.cu.
unsafe impl Params for Arguments {}

/// The loaded kernel.
#[derive(Clone, Copy, Debug)]
pub struct Embed {
    kernel: Kernel,
}

/// `x[row] = table[token of row]`, one row a block.
#[derive(Debug)]
pub struct Call<'a> {
    /// `[vocab, hidden]`, bits of bf16.
    pub table: &'a Buffer<u16>,
    /// Rows that its panels are laid out for, a multiple of 8, where it is in panels: then `hidden` is a multiple of 64. Absent:
    /// row-major.
    pub capacity: Option<usize>,
    /// `[rows]`.
    pub tokens: &'a Buffer<i32>,
    /// `[rows]` and what it points into: where `feed[row] >= 0` the token is `sampled[feed[row]]`.
    pub feed: Option<(&'a Buffer<i32>, &'a Buffer<i32>)>,
    /// One integer: rows to do; later rows of `x` are left alone.
    pub live: &'a Buffer<i32>,
    /// `[rows, cols]`; zero beyond `hidden`. A token outside the table gives a row of zeros.
    pub x: &'a Buffer<f32>,
    /// Most rows, which the grid is made for.
    pub rows: usize,
    /// Tokens of the table.
    pub vocab: usize,
    /// Elements of a row of the table.
    pub hidden: usize,
    /// Elements of a row of `x`, a multiple of 4.
    pub cols: usize,
}

impl Embed {
    /// Loads the kernel.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        Ok(Self { kernel: device.kernel(OP, OP, 0)? })
    }

    /// Issues it.
    ///
    /// # Errors
    /// Buffers that are too small, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let Call { rows, vocab, hidden, cols, .. } = *call;
        let fits = rows >= 1
            && hidden <= cols
            && cols.is_multiple_of(4)
            && i32::try_from(vocab.max(cols)).is_ok()
            && call.capacity.is_none_or(|capacity| {
                capacity >= vocab
                    && capacity < 1 << 30
                    && capacity.is_multiple_of(8)
                    && hidden.is_multiple_of(64)
            })
            && call.table.len() >= call.capacity.unwrap_or(vocab) * hidden
            && call.tokens.len() >= rows
            && call.feed.is_none_or(|(feed, _)| feed.len() >= rows)
            && !call.live.is_empty()
            && call.x.len() >= rows * cols;
        if !fits {
            return Err(DeviceError::new(
                OP,
                format!("{rows} rows of {hidden} in {cols} do not fit its buffers"),
            ));
        }
        let arguments = Arguments {
            table: call.table.address(),
            tokens: call.tokens.address(),
            feed: call.feed.map_or(0, |(feed, _)| feed.address()),
            sampled: call.feed.map_or(0, |(_, sampled)| sampled.address()),
            live: call.live.address(),
            x: call.x.address(),
            vocab: vocab as i32,
            hidden: hidden as i32,
            cols: cols as i32,
            capacity: call.capacity.unwrap_or(0) as i32,
        };
        let launch = Launch { grid: [rows as u32, 1, 1], block: THREADS, shared: 0, overlap: true };
        // SAFETY: every buffer was checked to be large enough; `feed` points into `sampled` by the caller's plan.
        unsafe { device.launch(&self.kernel, &launch, &arguments) }
    }
}
