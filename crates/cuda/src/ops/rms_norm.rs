//! RMSNorm into an operand of a matrix product.

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "rms_norm";
const THREADS: u32 = 384;
/// Most elements of a row, which a block keeps in registers.
pub(super) const MOST_COLS: usize = 3 * 384 * 8;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    x: u64,
    weight: u64,
    y: u64,
    live: u64,
    index: u64,
    cols: i32,
    capacity: i32,
    eps: f32,
}

// SAFETY: mirrors `Params` of kernels/rms_norm.cu.
unsafe impl Params for Arguments {}

/// The loaded kernel.
#[derive(Clone, Copy, Debug)]
pub struct RmsNorm {
    kernel: Kernel,
}

/// `y = x * rsqrt(mean(x^2) + eps) * weight`, one row a block.
#[derive(Debug)]
pub struct Call<'a> {
    /// `[rows, cols]`.
    pub x: &'a Buffer<f32>,
    /// `[cols]`.
    pub weight: &'a Buffer<f32>,
    /// Panel layout of `[capacity, cols]`, bits of bf16.
    pub y: &'a Buffer<u16>,
    /// Its first element: rows to do.
    pub live: &'a Buffer<i32>,
    /// Row of `x` for each row of `y`, -1 for a row of zeros; the same row where absent.
    pub index: Option<&'a Buffer<i32>>,
    /// Most rows, which the grid is made for.
    pub rows: usize,
    /// Elements of a row, a multiple of 64, at most 9216.
    pub cols: usize,
    /// Rows that `y` is laid out for, a multiple of 8.
    pub capacity: usize,
    /// Added to the mean square.
    pub eps: f32,
}

impl RmsNorm {
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
        let Call { rows, cols, capacity, .. } = *call;
        let fits = cols.is_multiple_of(64)
            && cols <= MOST_COLS
            && capacity.is_multiple_of(8)
            && rows <= capacity
            && call.x.len() >= cols
            && call.weight.len() >= cols
            && call.y.len() >= capacity * cols
            && !call.live.is_empty()
            && call.index.map_or(call.x.len() >= rows * cols, |index| index.len() >= rows);
        if !fits {
            return Err(DeviceError::new(OP, format!("{rows} rows of {cols} do not fit its buffers")));
        }
        let arguments = Arguments {
            x: call.x.address(),
            weight: call.weight.address(),
            y: call.y.address(),
            live: call.live.address(),
            index: call.index.map_or(0, Buffer::address),
            cols: cols as i32,
            capacity: capacity as i32,
            eps: call.eps,
        };
        let launch = Launch { grid: [rows as u32, 1, 1], block: THREADS, shared: 0, overlap: true };
        // SAFETY: every buffer was checked to be large enough; `index` holds rows of `x` by the caller's plan.
        unsafe { device.launch(&self.kernel, &launch, &arguments) }
    }
}
