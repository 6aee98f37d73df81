//! The experts' products over rows sorted by expert.

use ctxserve_backend::DeviceError;

use super::sorted_rows::{Output, SortedRows};
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
    /// The rest; `x` and gated results are bits of fp16.
    pub rows: SortedRows<'a>,
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
        let sorted = &call.rows;
        let SortedRows { experts, rows, cols, capacity, .. } = *sorted;
        let variants = match sorted.y {
            Output::SwiGlu { .. } => &self.variants[0],
            Output::F32(_) => &self.variants[1],
            Output::Bf16(_) => &self.variants[2],
        };
        let variant = HEIGHTS.iter().position(|&known| known == sorted.height).map(|at| variants[at]);
        let fits = sorted.fit()
            && call.w.len() >= experts * (rows / STRIP_ROWS) * (cols / 64) * TILE_BYTES
            && call.exponents.len() >= experts * rows;
        let (Some(variant), true) = (variant, fits) else { return Err(sorted.misfit(OP)) };
        let (y, alpha, limit) = sorted.output();
        let arguments = Arguments {
            w: call.w.address(),
            exponents: call.exponents.address(),
            bias: sorted.bias.address(),
            x: sorted.x.address(),
            y,
            tiles: sorted.tiles.address(),
            count: sorted.counts.at(OP, 1)?,
            cols: cols as i32,
            rows: rows as i32,
            capacity: capacity as i32,
            alpha,
            limit,
            experts: experts as i32,
        };
        let launch = Launch {
            grid: sorted.grid(variant.rows, variant.blocks * self.multiprocessors),
            block: variant.threads,
            shared: variant.shared,
            overlap: true,
        };
        // SAFETY: every buffer was checked to be large enough; tiles lie within `capacity` by the caller's plan.
        unsafe { device.launch(&variant.kernel, &launch, &arguments) }
    }
}
