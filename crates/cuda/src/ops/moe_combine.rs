//! The experts' outputs, weighted, into the residual stream.

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "moe_combine";
const THREADS: u32 = 384;
/// Most elements of a row that is normed, which a block keeps in shared memory.
const MOST_NORMED: usize = 8192;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    x: u64,
    y: u64,
    position: u64,
    weight: u64,
    live: u64,
    norm: u64,
    normed: u64,
    cols: i32,
    stride: i32,
    slots: i32,
    capacity: i32,
    eps: f32,
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

/// RMSNorm of the new rows, for the product that follows.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// `[cols]`.
    pub weight: &'a Buffer<f32>,
    /// Added to the mean square.
    pub eps: f32,
    /// Panel layout of `[capacity, cols]`, bits of bf16; at most 8192 columns, a multiple of 64.
    pub y: &'a Buffer<u16>,
    /// Rows that `y` is laid out for, a multiple of 8.
    pub capacity: usize,
}

/// The loaded kernels.
#[derive(Clone, Copy, Debug)]
pub struct MoeCombine {
    f32: Kernel,
    bf16: Kernel,
}

/// `x[row] += sum over slots, in order, of weight[row, slot] * y[position[row, slot]]`, and the norm of that. Without positions
/// `y[row * slots + slot]` is taken.
#[derive(Debug)]
pub struct Call<'a> {
    /// `[rows, cols]`.
    pub x: &'a Buffer<f32>,
    /// `[sorted, stride]`.
    pub y: Outputs<'a>,
    /// `[rows, slots]`: rows of `y`.
    pub position: Option<&'a Buffer<i32>>,
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
    /// What the new rows are normed with and where that goes, if wanted.
    pub norm: Option<Norm<'a>>,
}

/// Shared memory of a block that norms: the row and the weight.
fn shared(cols: usize) -> usize {
    2 * cols * size_of::<f32>()
}

impl MoeCombine {
    /// Loads the kernels.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        let kernel = |function| device.kernel(OP, function, shared(MOST_NORMED));
        Ok(Self { f32: kernel("moe_combine_f32")?, bf16: kernel("moe_combine_bf16")? })
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
        let norm_fits = call.norm.is_none_or(|norm| {
            cols.is_multiple_of(64)
                && cols <= MOST_NORMED
                && norm.capacity.is_multiple_of(8)
                && rows <= norm.capacity
                && norm.weight.len() >= cols
                && norm.y.len() >= norm.capacity * cols
        });
        let fits = cols.is_multiple_of(8)
            && stride.is_multiple_of(8)
            && cols <= stride
            && call.x.len() >= rows * cols
            && len >= sorted * stride
            && call.position.map_or(sorted, Buffer::len) >= rows * slots
            && call.weight.len() >= rows * slots
            && !call.live.is_empty()
            && norm_fits;
        if !fits {
            return Err(DeviceError::new(OP, format!("{rows} rows of {cols} do not fit the buffers")));
        }
        if rows == 0 {
            return Ok(());
        }
        let arguments = Arguments {
            x: call.x.address(),
            y,
            position: call.position.map_or(0, Buffer::address),
            weight: call.weight.address(),
            live: call.live.address(),
            norm: call.norm.map_or(0, |norm| norm.weight.address()),
            normed: call.norm.map_or(0, |norm| norm.y.address()),
            cols: cols as i32,
            stride: stride as i32,
            slots: slots as i32,
            capacity: call.norm.map_or(0, |norm| norm.capacity as i32),
            eps: call.norm.map_or(0.0, |norm| norm.eps),
        };
        let shared = call.norm.map_or(0, |_| shared(cols)) as u32;
        let launch = Launch { grid: [rows as u32, 1, 1], block: THREADS, shared, overlap: true };
        // SAFETY: every buffer was checked to be large enough; `position` holds rows of `y` by the caller's plan.
        unsafe { device.launch(kernel, &launch, &arguments) }
    }
}
