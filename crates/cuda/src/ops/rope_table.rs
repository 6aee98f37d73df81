//! Cosine and sine of every row's angles, once a step.

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "rope_table";
const THREADS: usize = 256;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    position: u64,
    live: u64,
    inv_freq: u64,
    turns: u64,
    mscale: f32,
    rows: i32,
    pairs: i32,
}

// SAFETY: mirrors `Params` of kernels/rope_table.cu.
unsafe impl Params for Arguments {}

/// The loaded kernel.
#[derive(Clone, Copy, Debug)]
pub struct RopeTable {
    kernel: Kernel,
}

/// `turns[row, i] = mscale * (cos, sin)(position[row] * inv_freq[i])`, the angle rounded to float32.
#[derive(Debug)]
pub struct Call<'a> {
    /// Position of each row.
    pub position: &'a Buffer<i32>,
    /// Its first element: rows to do; later rows of `turns` are left alone.
    pub live: &'a Buffer<i32>,
    /// One frequency, in radians a token, for each of `pairs`.
    pub inv_freq: &'a Buffer<f32>,
    /// `[rows, pairs, 2]`; of each eight pairs the order is 0, 4, 1, 5, 2, 6, 3, 7.
    pub turns: &'a Buffer<f32>,
    /// Multiplies cosine and sine.
    pub mscale: f32,
    /// Most rows, which the grid is made for.
    pub rows: usize,
    /// Half the elements of a head, a multiple of 8.
    pub pairs: usize,
}

impl RopeTable {
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
        let Call { rows, pairs, mscale, .. } = *call;
        let fits = pairs > 0
            && pairs.is_multiple_of(8)
            && call.position.len() >= rows
            && !call.live.is_empty()
            && call.inv_freq.len() >= pairs
            && call.turns.len() >= rows * pairs * 2;
        if !fits {
            return Err(DeviceError::new(
                OP,
                format!("{rows} rows of {pairs} pairs do not fit their buffers"),
            ));
        }
        let arguments = Arguments {
            position: call.position.address(),
            live: call.live.address(),
            inv_freq: call.inv_freq.address(),
            turns: call.turns.address(),
            mscale,
            rows: rows as i32,
            pairs: pairs as i32,
        };
        let blocks = (rows * pairs).div_ceil(THREADS).max(1) as u32;
        let launch = Launch { grid: [blocks, 1, 1], block: THREADS as u32, shared: 0, overlap: true };
        // SAFETY: every buffer was checked to be large enough.
        unsafe { device.launch(&self.kernel, &launch, &arguments) }
    }
}
