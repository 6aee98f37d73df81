//! The experts' outputs, weighted, into the residual stream.

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "moe_combine";
const THREADS: u32 = 256;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    x: u64,
    y: u64,
    position: u64,
    weight: u64,
    live: u64,
    cols: i32,
    stride: i32,
    slots: i32,
}

// SAFETY: mirrors `Params` of kernels/moe_combine.cu.
unsafe impl Params for Arguments {}

/// Outputs of experts by sorted row: row-major `[sorted, stride]`.
#[derive(Clone, Copy, Debug)]
pub enum Outputs<'a> {
    /// float32.
    F32(&'a Buffer<f32>),
    /// Bits of bf16.
    Bf16(&'a Buffer<u16>),
}

/// The loaded kernels.
#[derive(Clone, Copy, Debug)]
pub struct MoeCombine {
    f32: Kernel,
    bf16: Kernel,
}

/// `x[row] += sum over slots, in order, of weight[row, slot] * y[position[row, slot]]`.
#[derive(Debug)]
pub struct Call<'a> {
    /// `[rows, cols]`.
    pub x: &'a Buffer<f32>,
    /// `[sorted, stride]`.
    pub y: Outputs<'a>,
    /// `[rows, slots]`: rows of `y`.
    pub position: &'a Buffer<i32>,
    /// `[rows, slots]`.
    pub weight: &'a Buffer<f32>,
    /// One integer: rows to do.
    pub live: &'a Buffer<i32>,
    /// Most rows, which the grid is made for.
    pub rows: usize,
    /// Most rows that `y` may have.
    pub sorted: usize,
    /// Elements of a row, a multiple of 8.
    pub cols: usize,
    /// Elements between rows of `y`, a multiple of 8.
    pub stride: usize,
    /// Experts of a row.
    pub slots: usize,
}

impl MoeCombine {
    /// Loads the kernels.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        Ok(Self {
            f32: device.kernel(OP, "moe_combine_f32", 0)?,
            bf16: device.kernel(OP, "moe_combine_bf16", 0)?,
        })
    }

    /// Issues it.
    ///
    /// # Errors
    /// Buffers that are too small, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let Call { rows, sorted, cols, stride, slots, .. } = *call;
        let (kernel, y, len) = match call.y {
            Outputs::F32(y) => (&self.f32, y.address(), y.len()),
            Outputs::Bf16(y) => (&self.bf16, y.address(), y.len()),
        };
        let fits = cols.is_multiple_of(8)
            && stride.is_multiple_of(8)
            && cols <= stride
            && call.x.len() >= rows * cols
            && len >= sorted * stride
            && call.position.len() >= rows * slots
            && call.weight.len() >= rows * slots
            && !call.live.is_empty();
        if !fits {
            return Err(DeviceError::new(OP, format!("{rows} rows of {cols} do not fit the buffers")));
        }
        if rows == 0 {
            return Ok(());
        }
        let arguments = Arguments {
            x: call.x.address(),
            y,
            position: call.position.address(),
            weight: call.weight.address(),
            live: call.live.address(),
            cols: cols as i32,
            stride: stride as i32,
            slots: slots as i32,
        };
        let launch = Launch { grid: [rows as u32, 1, 1], block: THREADS, shared: 0, overlap: true };
        // SAFETY: every buffer was checked to be large enough; `position` holds rows of `y` by the caller's plan.
        unsafe { device.launch(kernel, &launch, &arguments) }
    }
}
