//! RMSNorm into the experts' operand: each row to its places among the rows sorted by expert.

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "moe_scatter";
const THREADS: u32 = 192;
/// Most elements of a row, which a block keeps in registers.
const MOST_COLS: usize = 6 * 192 * 8;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    x: u64,
    weight: u64,
    y: u64,
    position: u64,
    live: u64,
    cols: i32,
    capacity: i32,
    slots: i32,
    eps: f32,
}

// SAFETY: mirrors `Params` of kernels/moe_scatter.cu.
unsafe impl Params for Arguments {}

/// The loaded kernel.
#[derive(Clone, Copy, Debug)]
pub struct MoeScatter {
    kernel: Kernel,
}

/// `y[position[row, slot]] = x[row] * rsqrt(mean(x[row]^2) + eps) * weight` for every slot. Other rows of `y` keep what they hold.
#[derive(Debug)]
pub struct Call<'a> {
    /// `[rows, cols]`.
    pub x: &'a Buffer<f32>,
    /// `[cols]`.
    pub weight: &'a Buffer<f32>,
    /// Panel layout of `[capacity, cols]`, bits of fp16.
    pub y: &'a Buffer<u16>,
    /// `[rows, slots]`: rows of `y`, of `moe_sort`.
    pub position: &'a Buffer<i32>,
    /// One integer: rows to do.
    pub live: &'a Buffer<i32>,
    /// Most rows, which the grid is made for.
    pub rows: usize,
    /// Elements of a row, a multiple of 64, at most 9216.
    pub cols: usize,
    /// Rows that `y` is laid out for, a multiple of 8.
    pub capacity: usize,
    /// Experts of a row.
    pub slots: usize,
    /// Added to the mean square.
    pub eps: f32,
}

impl MoeScatter {
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
        let Call { rows, cols, capacity, slots, .. } = *call;
        let fits = cols.is_multiple_of(64)
            && cols <= MOST_COLS
            && capacity.is_multiple_of(8)
            && call.x.len() >= rows * cols
            && call.weight.len() >= cols
            && call.y.len() >= capacity * cols
            && call.position.len() >= rows * slots
            && !call.live.is_empty();
        if !fits {
            return Err(DeviceError::new(OP, format!("{rows} rows of {cols} do not fit the buffers")));
        }
        if rows == 0 {
            return Ok(());
        }
        let arguments = Arguments {
            x: call.x.address(),
            weight: call.weight.address(),
            y: call.y.address(),
            position: call.position.address(),
            live: call.live.address(),
            cols: cols as i32,
            capacity: capacity as i32,
            slots: slots as i32,
            eps: call.eps,
        };
        let launch = Launch { grid: [rows as u32, 1, 1], block: THREADS, shared: 0, overlap: true };
        // SAFETY: every buffer was checked to be large enough; `position` holds rows of `y` by the caller's plan.
        unsafe { device.launch(&self.kernel, &launch, &arguments) }
    }
}
