//! Keeps the rows of a step that logits need.

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "narrow";
const THREADS: usize = 64;
/// Threads beside those of columns: one for each small array.
const OTHERS: usize = 4;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    x: u64,
    q: u64,
    row: u64,
    sequence: u64,
    kept: u64,
    position: u64,
    at: u64,
    first: u64,
    rows: u64,
    decode: u64,
    x_pieces: i32,
    q_pieces: i32,
}

// SAFETY: mirrors `Params` of kernels/narrow.cu.
unsafe impl Params for Arguments {}

/// The loaded kernel.
#[derive(Clone, Copy, Debug)]
pub struct Narrow {
    kernel: Kernel,
}

/// Row `l` of `x`, of `q` and of `position` becomes row `row[l]`; entry `l` of `at` and `first` becomes that of sequence
/// `sequence[l]`. `rows` and `decode` become the number of rows kept.
#[derive(Debug)]
pub struct Call<'a> {
    /// `[rows, hidden]`.
    pub x: &'a Buffer<f32>,
    /// `[rows, q_width]`.
    pub q: &'a Buffer<u16>,
    /// `[kept]`, ascending.
    pub row: &'a Buffer<i32>,
    /// `[kept]`, ascending: the sequences of these rows.
    pub sequence: &'a Buffer<i32>,
    /// Its first element: how many there are.
    pub kept: &'a Buffer<i32>,
    /// `[rows]`.
    pub position: &'a Buffer<i32>,
    /// `[sequences]`: where pages begin.
    pub at: &'a Buffer<i32>,
    /// `[sequences]`: the first page.
    pub first: &'a Buffer<i32>,
    /// Its first element is set.
    pub rows: &'a Buffer<i32>,
    /// Its first element is set.
    pub decode: &'a Buffer<i32>,
    /// Elements of a row of `x`, a multiple of 4.
    pub hidden: usize,
    /// Elements of a row of `q`, a multiple of 8.
    pub q_width: usize,
}

impl Narrow {
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
    /// Widths that are no multiple of 16 bytes, buffers without a row, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let Call { hidden, q_width, .. } = *call;
        let counters = [call.kept, call.position, call.at, call.first, call.rows, call.decode];
        let fits = hidden.is_multiple_of(4)
            && q_width.is_multiple_of(8)
            && call.x.len() >= hidden
            && call.q.len() >= q_width
            && call.row.len() <= call.sequence.len()
            && counters.iter().all(|buffer| !buffer.is_empty());
        if !fits {
            return Err(DeviceError::new(
                OP,
                format!("rows of {hidden} and {q_width} do not fit the buffers"),
            ));
        }
        let (x_pieces, q_pieces) = (hidden / 4, q_width / 8);
        let arguments = Arguments {
            x: call.x.address(),
            q: call.q.address(),
            row: call.row.address(),
            sequence: call.sequence.address(),
            kept: call.kept.address(),
            position: call.position.address(),
            at: call.at.address(),
            first: call.first.address(),
            rows: call.rows.address(),
            decode: call.decode.address(),
            x_pieces: x_pieces as i32,
            q_pieces: q_pieces as i32,
        };
        let blocks = (x_pieces + q_pieces + OTHERS).div_ceil(THREADS) as u32;
        let launch = Launch { grid: [blocks, 1, 1], block: THREADS as u32, shared: 0, overlap: true };
        // SAFETY: what is read and written are rows of the step by the caller's plan, which the buffers hold.
        unsafe { device.launch(&self.kernel, &launch, &arguments) }
    }
}
