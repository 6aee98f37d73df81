//! Dense products of bf16 operands for more tokens than a matrix-vector kernel is made for.

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "gemm";
/// Weight rows of a tile.
const ROWS: usize = 128;
/// Bytes of a step of 64 of one row.
const LINE: usize = 128;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    w: u64,
    x: u64,
    bias: u64,
    y: u64,
    live: u64,
    cols: i32,
    w_rows: i32,
    outs: i32,
    capacity: i32,
    stride: i32,
    tokens: i32,
}

// SAFETY: mirrors `Params` of kernels/gemm.cu.
unsafe impl Params for Arguments {}

/// Where the sums go: row-major `[tokens, stride]`.
#[derive(Clone, Copy, Debug)]
pub enum Output<'a> {
    /// Stored as float32.
    F32(&'a Buffer<f32>),
    /// Stored as bits of bf16; `outs` and `stride` even.
    Bf16(&'a Buffer<u16>),
    /// Added to what is there.
    Add(&'a Buffer<f32>),
}

#[derive(Clone, Copy, Debug)]
struct Variant {
    kernel: Kernel,
    /// Most tokens of a tile.
    tokens: usize,
    threads: u32,
    shared: u32,
    /// Blocks of the device.
    blocks: usize,
}

/// The loaded kernels.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// By output, then narrow and wide.
    variants: [[Variant; 2]; 3],
}

/// `y[token, out] (+)= sum over k of x[token, k] * w[out, k] + bias[out]`, float32 sums.
#[derive(Debug)]
pub struct Call<'a> {
    /// Panel layout of `[w_rows, cols]`, bits of bf16.
    pub w: &'a Buffer<u16>,
    /// Panel layout of `[capacity, cols]`, bits of bf16.
    pub x: &'a Buffer<u16>,
    /// `[outs]`.
    pub bias: Option<&'a Buffer<f32>>,
    /// `[tokens, stride]`.
    pub y: Output<'a>,
    /// One integer: tokens to do; later rows of `y` are left alone.
    pub live: &'a Buffer<i32>,
    /// Most tokens, which the grid is made for.
    pub tokens: usize,
    /// Elements summed over, a multiple of 64.
    pub cols: usize,
    /// Rows of `w`, a multiple of 8.
    pub w_rows: usize,
    /// Columns of `y` that are written, at most `w_rows`.
    pub outs: usize,
    /// Rows that `x` is laid out for, a multiple of 8.
    pub capacity: usize,
    /// Elements between rows of `y`.
    pub stride: usize,
}

impl Gemm {
    /// Loads the kernels: those for Hopper, or the portable ones.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        if !device.facts().is_hopper() {
            return Self::portable(device);
        }
        let variant = |function, tokens, stages| {
            let shared = stages * (ROWS + tokens) * LINE;
            let kernel = device.kernel(OP, function, shared)?;
            let blocks = device.facts().multiprocessors as usize;
            Ok(Variant { kernel, tokens, threads: 384, shared: shared as u32, blocks })
        };
        let variants = [
            [variant("gemm_f32_128", 128, 6)?, variant("gemm_f32_256", 256, 4)?],
            [variant("gemm_bf16_128", 128, 6)?, variant("gemm_bf16_256", 256, 4)?],
            [variant("gemm_add_128", 128, 6)?, variant("gemm_add_256", 256, 4)?],
        ];
        Ok(Self { variants })
    }

    /// Loads the kernels that run on every device.
    ///
    /// # Errors
    /// No code for this device.
    pub fn portable(device: &Device) -> Result<Self, DeviceError> {
        const TOKENS: usize = 64;
        const STAGES: usize = 3;
        let variant = |function| {
            let shared = STAGES * (ROWS + TOKENS) * LINE;
            let kernel = device.kernel(OP, function, shared)?;
            let blocks = 2 * device.facts().multiprocessors as usize;
            Ok([Variant { kernel, tokens: TOKENS, threads: 256, shared: shared as u32, blocks }; 2])
        };
        let variants =
            [variant("gemm_f32_portable")?, variant("gemm_bf16_portable")?, variant("gemm_add_portable")?];
        Ok(Self { variants })
    }

    /// Issues it.
    ///
    /// # Errors
    /// Shapes or buffers that do not fit each other, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let Call { tokens, cols, w_rows, outs, capacity, stride, .. } = *call;
        let (output, y, len) = match call.y {
            Output::F32(y) => (0, y.address(), y.len()),
            Output::Bf16(y) => (1, y.address(), y.len()),
            Output::Add(y) => (2, y.address(), y.len()),
        };
        let fits = cols.is_multiple_of(64)
            && cols > 0
            && w_rows.is_multiple_of(8)
            && capacity.is_multiple_of(8)
            && tokens <= capacity
            && outs <= w_rows
            && outs <= stride
            && (output != 1 || (outs.is_multiple_of(2) && stride.is_multiple_of(2)))
            && call.w.len() >= w_rows * cols
            && call.x.len() >= capacity * cols
            && call.bias.is_none_or(|bias| bias.len() >= outs)
            && call.live.len() >= 1
            && (tokens == 0 || len >= (tokens - 1) * stride + outs);
        if !fits {
            let what = format!("{tokens} tokens of {cols} by {w_rows} rows do not fit the buffers");
            return Err(DeviceError::new(OP, what));
        }
        if tokens == 0 {
            return Ok(());
        }
        let [narrow, wide] = self.variants[output];
        let variant = if tokens <= narrow.tokens { narrow } else { wide };
        let tiles = w_rows.div_ceil(ROWS) * tokens.div_ceil(variant.tokens);
        let arguments = Arguments {
            w: call.w.address(),
            x: call.x.address(),
            bias: call.bias.map_or(0, Buffer::address),
            y,
            live: call.live.address(),
            cols: cols as i32,
            w_rows: w_rows as i32,
            outs: outs as i32,
            capacity: capacity as i32,
            stride: stride as i32,
            tokens: tokens as i32,
        };
        let launch = Launch {
            grid: [tiles.min(variant.blocks) as u32, 1, 1],
            block: variant.threads,
            shared: variant.shared,
            overlap: true,
        };
        // SAFETY: every buffer was checked to be large enough for the shapes.
        unsafe { device.launch(&variant.kernel, &launch, &arguments) }
    }
}
