//! The experts' products over rows sorted by expert.

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "moe_gemm";
const STRIP_ROWS: usize = 16;
/// Bytes of 64 columns of a strip.
const TILE_BYTES: usize = 512 + 32;
/// Bytes of 64 columns of an activation row.
const LINE: usize = 128;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    w: u64,
    exponents: u64,
    bias: u64,
    x: u64,
    y: u64,
    tiles: u64,
    count: u64,
    cols: i32,
    rows: i32,
    capacity: i32,
    alpha: f32,
    limit: f32,
    experts: i32,
}

// SAFETY: mirrors `Params` of kernels/moe_gemm.cu.
unsafe impl Params for Arguments {}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct ExponentArguments {
    w: u64,
    exponents: u64,
    cols: i32,
    strips: i32,
}

// SAFETY: mirrors `ExponentParams` of kernels/moe_gemm.cu.
unsafe impl Params for ExponentArguments {}

/// Tile heights.
const HEIGHTS: [usize; 3] = [64, 160, 256];

/// A kernel for tiles of some height, and its launch.
#[derive(Clone, Copy, Debug)]
struct Variant {
    kernel: Kernel,
    threads: u32,
    shared: u32,
    /// Blocks of a multiprocessor.
    blocks: usize,
    /// Weight rows that a block takes at a time.
    rows: usize,
}

/// The tile height (of `moe_sort`) that suits `rows` rows with `slots` of `experts` experts each, spread evenly or not too unevenly.
pub fn height(rows: usize, slots: usize, experts: usize) -> usize {
    match rows * slots / experts.max(1) {
        0..=40 => 64,
        41..=300 => 160,
        _ => 256,
    }
}

/// What becomes of the sums.
#[derive(Clone, Copy, Debug)]
pub enum Output<'a> {
    /// Rows are gates and ups: `gate * sigmoid(alpha * gate) * (up + 1)` with `gate <= limit`, `-limit <= up <= limit`.
    SwiGlu {
        /// Panel layout of `[capacity, rows / 2]`, bits of fp16.
        y: &'a Buffer<u16>,
        /// Factor of the sigmoid.
        alpha: f32,
        /// The clamp.
        limit: f32,
    },
    /// Stored as they are, `[capacity, rows]`.
    F32(&'a Buffer<f32>),
    /// Stored as bits of bf16, `[capacity, rows]`.
    Bf16(&'a Buffer<u16>),
}

/// The loaded kernels.
#[derive(Clone, Copy, Debug)]
pub struct MoeGemm {
    /// By output, then height.
    variants: [[Variant; 3]; 3],
    exponents: Kernel,
    multiprocessors: usize,
}

/// For each sorted row, with its expert's weights: `sum over k of x[k] * w[row, k] + bias[row]`.
#[derive(Debug)]
pub struct Call<'a> {
    /// MXFP4 strips of `[experts, rows, cols]`.
    pub w: &'a Buffer<u8>,
    /// `[experts, rows]`, of [`MoeGemm::exponents`].
    pub exponents: &'a Buffer<u8>,
    /// `[experts, rows]`: gate `i` at `2i` and up `i` at `2i + 1`; or rows in order.
    pub bias: &'a Buffer<f32>,
    /// Panel layout of `[capacity, cols]`, bits of fp16.
    pub x: &'a Buffer<u16>,
    /// The result.
    pub y: Output<'a>,
    /// Of `moe_sort`: four integers a tile.
    pub tiles: &'a Buffer<i32>,
    /// Of `moe_sort`: sorted rows, tiles.
    pub counts: &'a Buffer<i32>,
    /// Experts.
    pub experts: usize,
    /// Weight rows of an expert, a multiple of 16 (of 128 for gates and ups).
    pub rows: usize,
    /// Elements summed over, a multiple of 64.
    pub cols: usize,
    /// Sorted rows that `x` and `y` are laid out for, a multiple of 8.
    pub capacity: usize,
    /// Most sorted rows of a tile: what `moe_sort` was told, one of [`height`]'s.
    pub height: usize,
    /// Most tiles, which the grid is made for.
    pub most_tiles: usize,
}

impl MoeGemm {
    /// Loads the kernels: those for Hopper, or the portable ones.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        if !device.facts().is_hopper() {
            return Self::portable(device);
        }
        let variant = |function, groups: usize, tiles: usize, height: usize| {
            let shared = tiles * height * LINE;
            let kernel = device.kernel(OP, function, shared)?;
            let threads = (groups as u32 + 1) * 128;
            Ok::<_, DeviceError>(Variant {
                kernel,
                threads,
                shared: shared as u32,
                blocks: 1,
                rows: groups * 64,
            })
        };
        let variants = |names: [&'static str; 3]| {
            Ok::<_, DeviceError>([
                variant(names[0], 4, 28, HEIGHTS[0])?,
                variant(names[1], 3, 11, HEIGHTS[1])?,
                variant(names[2], 2, 7, HEIGHTS[2])?,
            ])
        };
        let variants = [
            variants(["moe_gate_up_64", "moe_gate_up_160", "moe_gate_up_256"])?,
            variants(["moe_down_f32_64", "moe_down_f32_160", "moe_down_f32_256"])?,
            variants(["moe_down_bf16_64", "moe_down_bf16_160", "moe_down_bf16_256"])?,
        ];
        Self::new(device, variants)
    }

    /// Loads the kernels that run on every device.
    ///
    /// # Errors
    /// No code for this device.
    pub fn portable(device: &Device) -> Result<Self, DeviceError> {
        const STAGES: usize = 4;
        const TOKENS: usize = 64;
        let variant = |function| {
            let shared = STAGES * TOKENS * LINE;
            let kernel = device.kernel(OP, function, shared)?;
            let variant = Variant { kernel, threads: 256, shared: shared as u32, blocks: 2, rows: 128 };
            Ok::<_, DeviceError>([variant; 3])
        };
        let variants = [
            variant("moe_gate_up_portable")?,
            variant("moe_down_f32_portable")?,
            variant("moe_down_bf16_portable")?,
        ];
        Self::new(device, variants)
    }

    fn new(device: &Device, variants: [[Variant; 3]; 3]) -> Result<Self, DeviceError> {
        let exponents = device.kernel(OP, "moe_exponents", 0)?;
        Ok(Self { variants, exponents, multiprocessors: device.facts().multiprocessors as usize })
    }

    /// Issues what finds each weight row's largest block scale, once at load: strips of `rows` rows of all experts to as many bytes.
    ///
    /// # Errors
    /// Buffers that are too small, or a device fault.
    pub fn exponents(
        &self,
        device: &Device,
        w: &Buffer<u8>,
        exponents: &Buffer<u8>,
        rows: usize,
        cols: usize,
    ) -> Result<(), DeviceError> {
        let strips = rows / STRIP_ROWS;
        let fits = rows.is_multiple_of(STRIP_ROWS)
            && cols.is_multiple_of(64)
            && w.len() >= strips * (cols / 64) * TILE_BYTES
            && exponents.len() >= rows;
        if !fits {
            return Err(DeviceError::new(OP, format!("{rows} weight rows of {cols} do not fit the buffers")));
        }
        let arguments = ExponentArguments {
            w: w.address(),
            exponents: exponents.address(),
            cols: cols as i32,
            strips: strips as i32,
        };
        let launch =
            Launch { grid: [strips.div_ceil(4).max(1) as u32, 1, 1], block: 128, shared: 0, overlap: true };
        // SAFETY: both buffers were checked to be large enough.
        unsafe { device.launch(&self.exponents, &launch, &arguments) }
    }

    /// Issues it.
    ///
    /// # Errors
    /// Shapes or buffers that do not fit each other, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let Call { experts, rows, cols, capacity, height, most_tiles, .. } = *call;
        let (output, y, len, wanted, alpha, limit) = match call.y {
            Output::SwiGlu { y, alpha, limit } => {
                (0, y.address(), y.len(), capacity * rows / 2, alpha, limit)
            }
            Output::F32(y) => (1, y.address(), y.len(), capacity * rows, 0.0, 0.0),
            Output::Bf16(y) => (2, y.address(), y.len(), capacity * rows, 0.0, 0.0),
        };
        let variant = HEIGHTS.iter().position(|&known| known == height).map(|at| self.variants[output][at]);
        let fits = cols > 0
            && cols.is_multiple_of(64)
            && rows.is_multiple_of(if output == 0 { 128 } else { STRIP_ROWS })
            && experts > 0
            && capacity.is_multiple_of(8)
            && call.w.len() >= experts * (rows / STRIP_ROWS) * (cols / 64) * TILE_BYTES
            && call.exponents.len() >= experts * rows
            && call.bias.len() >= experts * rows
            && call.x.len() >= capacity * cols
            && len >= wanted
            && call.tiles.len() >= 4 * most_tiles
            && call.counts.len() >= 2;
        let (Some(variant), true) = (variant, fits) else {
            let what = format!(
                "{experts} experts of {rows} x {cols}, {capacity} rows in tiles of {height}, do not fit the buffers"
            );
            return Err(DeviceError::new(OP, what));
        };
        let arguments = Arguments {
            w: call.w.address(),
            exponents: call.exponents.address(),
            bias: call.bias.address(),
            x: call.x.address(),
            y,
            tiles: call.tiles.address(),
            count: call.counts.at(OP, 1)?,
            cols: cols as i32,
            rows: rows as i32,
            capacity: capacity as i32,
            alpha,
            limit,
            experts: experts as i32,
        };
        let most = (most_tiles * rows.div_ceil(variant.rows)).max(1);
        let launch = Launch {
            grid: [most.min(variant.blocks * self.multiprocessors) as u32, 1, 1],
            block: variant.threads,
            shared: variant.shared,
            overlap: true,
        };
        // SAFETY: every buffer was checked to be large enough; tiles lie within `capacity` by the caller's plan.
        unsafe { device.launch(&variant.kernel, &launch, &arguments) }
    }
}
