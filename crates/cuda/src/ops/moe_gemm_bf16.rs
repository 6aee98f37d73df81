//! The experts' products with bf16 weights over rows sorted by expert.

use ctxserve_backend::DeviceError;

use super::sorted_rows::{Output, SortedRows};
use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "moe_gemm_bf16";
/// Bytes of 64 columns of a row.
const LINE: usize = 128;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    w: u64,
    bias: u64,
    x: u64,
    y: u64,
    tiles: u64,
    count: u64,
    cols: i32,
    rows: i32,
    w_rows: i32,
    capacity: i32,
    group: i32,
    alpha: f32,
    limit: f32,
}

// SAFETY: mirrors `Params` of kernels/moe_gemm_bf16.cu.
unsafe impl Params for Arguments {}

/// Tile heights, and how the kernel of each is launched.
const SHAPES: [Shape; 6] = [
    Shape { height: 16, rows: 64, stages: 11, threads: 160, blocks: 2, group: 1 },
    Shape { height: 32, rows: 64, stages: 9, threads: 160, blocks: 2, group: 1 },
    Shape { height: 64, rows: 64, stages: 6, threads: 160, blocks: 2, group: 1 },
    Shape { height: 128, rows: 128, stages: 7, threads: 384, blocks: 1, group: 4 },
    Shape { height: 256, rows: 128, stages: 4, threads: 384, blocks: 1, group: 4 },
    // Of so few tiles that some multiprocessors would have one block at work: all of their memory is its ring.
    Shape { height: 16, rows: 64, stages: 22, threads: 160, blocks: 1, group: 1 },
];

/// The last of these, and the most tiles that it is for.
const FEWEST: (usize, usize) = (5, 8);

/// How a kernel is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    /// Most sorted rows of a tile.
    height: usize,
    /// Weight rows that a block takes at a time.
    rows: usize,
    /// Of its ring, 64 columns each.
    stages: usize,
    threads: u32,
    /// Blocks of a multiprocessor.
    blocks: usize,
    /// Tiles that are swept together, so that what they read of the weights is in L2.
    group: usize,
}

impl Shape {
    fn shared(&self) -> usize {
        self.stages * (self.rows + self.height) * LINE
    }
}

/// The tile height (of `moe_sort`) that suits `rows` rows with `slots` of `experts` experts each, spread evenly or not too unevenly.
pub fn height(rows: usize, slots: usize, experts: usize) -> usize {
    match (rows, rows * slots / experts.max(1)) {
        // Of few rows one tile has all that an expert gets.
        (0..=16, _) => 16,
        (17..=32, _) => 32,
        (33..=64, _) => 64,
        (_, 0..=100) => 128,
        _ => 256,
    }
}

/// The loaded kernels.
#[derive(Clone, Copy, Debug)]
pub struct MoeGemmBf16 {
    /// By output, then height.
    kernels: [[Kernel; 6]; 2],
    /// Those of the portable kernels, which any height suits, instead of [`SHAPES`].
    portable: bool,
    multiprocessors: usize,
}

/// For each sorted row, with its expert's weights: `sum over k of x[k] * w[row, k] + bias[row]`.
#[derive(Debug)]
pub struct Call<'a> {
    /// Panel layout of `[experts * rows, cols]`, bits of bf16. Gates and ups in turns of eight rows: of each 16 rows row `g` is a
    /// gate, row `g + 8` its up.
    pub w: &'a Buffer<u16>,
    /// The rest; `x` and gated results are bits of bf16. There is no float32 output.
    pub rows: SortedRows<'a>,
}

const NAMES: [[&str; 6]; 2] = [
    [
        "moe_gate_up_bf16_16",
        "moe_gate_up_bf16_32",
        "moe_gate_up_bf16_64",
        "moe_gate_up_bf16_128",
        "moe_gate_up_bf16_256",
        "moe_gate_up_bf16_one",
    ],
    [
        "moe_down_bf16_16",
        "moe_down_bf16_32",
        "moe_down_bf16_64",
        "moe_down_bf16_128",
        "moe_down_bf16_256",
        "moe_down_bf16_one",
    ],
];
const PORTABLE_NAMES: [&str; 2] = ["moe_gate_up_bf16_portable", "moe_down_bf16_portable"];
const PORTABLE: Shape = Shape { height: 64, rows: 128, stages: 3, threads: 256, blocks: 2, group: 4 };

impl MoeGemmBf16 {
    /// Loads the kernels: those for Hopper, or the portable ones.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        if !device.facts().is_hopper() {
            return Self::portable(device);
        }
        let kernel = |output: usize, at: usize| device.kernel(OP, NAMES[output][at], SHAPES[at].shared());
        let all = |output| {
            Ok::<_, DeviceError>([
                kernel(output, 0)?,
                kernel(output, 1)?,
                kernel(output, 2)?,
                kernel(output, 3)?,
                kernel(output, 4)?,
                kernel(output, 5)?,
            ])
        };
        Ok(Self::new(device, [all(0)?, all(1)?], false))
    }

    /// Loads the kernels that run on every device.
    ///
    /// # Errors
    /// No code for this device.
    pub fn portable(device: &Device) -> Result<Self, DeviceError> {
        let kernel = |output: usize| device.kernel(OP, PORTABLE_NAMES[output], PORTABLE.shared());
        Ok(Self::new(device, [[kernel(0)?; 6], [kernel(1)?; 6]], true))
    }

    fn new(device: &Device, kernels: [[Kernel; 6]; 2], portable: bool) -> Self {
        Self { kernels, portable, multiprocessors: device.facts().multiprocessors as usize }
    }

    /// Issues it.
    ///
    /// # Errors
    /// Shapes or buffers that do not fit each other, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let sorted = &call.rows;
        let SortedRows { experts, rows, cols, capacity, height, most_tiles, .. } = *sorted;
        let kernels = match sorted.y {
            Output::SwiGlu { .. } => Some(&self.kernels[0]),
            Output::Bf16(_) => Some(&self.kernels[1]),
            Output::F32(_) => None,
        };
        let fewest = SHAPES[FEWEST.0].height == height && most_tiles <= FEWEST.1;
        let at = SHAPES.iter().position(|shape| shape.height == height);
        let at = at.map(|at| if fewest { FEWEST.0 } else { at });
        let fits = sorted.fit() && call.w.len() >= experts * rows * cols;
        let (Some(kernels), Some(at), true) = (kernels, at, fits) else { return Err(sorted.misfit(OP)) };
        let shape = if self.portable { PORTABLE } else { SHAPES[at] };
        let (y, alpha, limit) = sorted.output();
        let arguments = Arguments {
            w: call.w.address(),
            bias: sorted.bias.address(),
            x: sorted.x.address(),
            y,
            tiles: sorted.tiles.address(),
            count: sorted.counts.at(OP, 1)?,
            cols: cols as i32,
            rows: rows as i32,
            w_rows: (experts * rows) as i32,
            capacity: capacity as i32,
            group: shape.group as i32,
            alpha,
            limit,
        };
        let launch = Launch {
            grid: sorted.grid(shape.rows, shape.blocks * self.multiprocessors),
            block: shape.threads,
            shared: shape.shared() as u32,
            overlap: true,
        };
        // SAFETY: every buffer was checked to be large enough; tiles lie within `capacity` by the caller's plan.
        unsafe { device.launch(&kernels[at], &launch, &arguments) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_of_few_rows_hold_all_of_an_expert() {
        for rows in 1..=64 {
            assert!(height(rows, 4, 32) >= rows, "{rows}");
        }
        assert_eq!([65, 512, 1024, 8192].map(|rows| height(rows, 4, 32)), [128, 128, 256, 256]);
        // Every height that is chosen has a kernel; rings leave room for what a block has beside them.
        for rows in 0..9000 {
            assert!(SHAPES.iter().any(|shape| shape.height == height(rows, 4, 32)), "{rows}");
        }
        for shape in SHAPES {
            assert!(shape.blocks * (shape.shared() + 2048) <= 228 << 10, "{shape:?}");
        }
    }
}
