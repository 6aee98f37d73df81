//! Products of at most 16 token rows with NVFP4 strips.

use std::fmt;

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Facts, Kernel, Launch, Params};
use crate::ops::pack_nvfp4::{STRIP_ROWS, strip_bytes};

const OP: &str = "gemv_nvfp4";
/// Most token rows.
pub const MOST_ROWS: usize = 16;
const THREADS: u32 = 384;
/// Warps that multiply, and warps that add up.
const MULTIPLIERS: usize = 8;
const FINISHERS: usize = 3;
const MOST_STAGES: usize = 16;
const TILE_BYTES: usize = 512 + 64;
/// Bytes after the ring that may be read, though not used.
const SLACK: usize = 512;
/// Shared memory of a block, so that those of two launches fit side by side.
const HALF: usize = 113 * 1024;

/// What the product is fed.
#[derive(Clone, Copy, Debug)]
pub enum Input<'a> {
    /// Float32 rows, which are normed on the way: `bf16(x * weight)` is multiplied, 1 / rms applied to the product.
    Normed {
        /// `[rows, cols]`.
        x: &'a Buffer<f32>,
        /// `[cols]`, zero beyond `norm_cols`.
        weight: &'a Buffer<f32>,
        /// Elements that the mean square is over.
        norm_cols: usize,
        /// Added to the mean square.
        eps: f32,
    },
    /// Bits of bf16, `[rows, cols]`.
    Plain(&'a Buffer<u16>),
}

/// Where it goes.
#[derive(Clone, Copy, Debug)]
pub enum Output<'a> {
    /// Float32 `[rows, outputs]`.
    F32(&'a Buffer<f32>),
    /// Added to float32 `[rows, outputs]`.
    Add(&'a Buffer<f32>),
    /// `silu(gate) * up` as bits of bf16, `[rows, outputs / 2]`. Of every 16 rows of the matrix the first 8 are gates, the others their ups.
    SwiGlu(&'a Buffer<u16>),
}

/// What the kernel is loaded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Dims {
    /// Most token rows, 1 to [`MOST_ROWS`].
    pub rows: usize,
    /// Columns of the matrix, a multiple of 64.
    pub cols: usize,
    /// Its rows, a multiple of 16.
    pub outputs: usize,
    /// Whether the input is [`Input::Normed`].
    pub normed: bool,
}

/// How it is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Blocks of a cluster, which share the columns: 1, 2 or 4.
    pub split: usize,
    /// Warps that share a block's columns: 2, 4 or 8; the others have other strips.
    pub pieces: usize,
    /// Clusters, each with some strips.
    pub clusters: usize,
    /// Strips that the ring holds.
    pub stages: usize,
    /// The next kernel may start when this many strips of a block have not been asked for yet.
    pub launch: usize,
    /// Bytes of shared memory.
    pub shared: usize,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { split, pieces, clusters, stages, launch, shared } = self;
        write!(
            f,
            "{clusters} x {split} blocks, {pieces} pieces, {stages} stages, launch {launch}, {} KiB",
            shared.div_ceil(1024)
        )
    }
}

/// Bytes of shared memory, in the order of kernels/gemv_nvfp4.cu.
fn shared(dims: &Dims, split: usize, pieces: usize, stages: usize) -> usize {
    let tiles = (dims.cols / 64).div_ceil(split);
    let normed = if dims.normed { 16 * split * MULTIPLIERS * 4 + tiles * 256 } else { 0 };
    let tokens = dims.rows * (tiles * 128 + 16);
    let sums = FINISHERS * split * pieces * dims.rows.div_ceil(2) * 128;
    (512 + normed + tokens + sums).next_multiple_of(128) + stages * tiles * TILE_BYTES + SLACK
}

impl Plan {
    /// A plan with as many stages as fit half a multiprocessor, or, where none does, a whole one; `None` where it has none.
    pub fn new(
        dims: &Dims,
        facts: &Facts,
        split: usize,
        pieces: usize,
        clusters: usize,
        launch: usize,
    ) -> Option<Self> {
        let groups = MULTIPLIERS / pieces;
        let strips = dims.outputs / STRIP_ROWS;
        let count = strips.div_ceil(clusters);
        // Strips that take turns at a place must be of one group of warps, and every block has columns.
        if !(FINISHERS * split).is_multiple_of(groups) || dims.cols / 64 < split {
            return None;
        }
        let whole = facts.shared_memory as usize;
        let stages = || (1..=MOST_STAGES.min(count.max(1))).rev();
        let fit = [HALF.min(whole), whole].into_iter().find_map(|most| {
            stages()
                .filter(|&stages| stages >= count || stages.is_multiple_of(groups))
                .find(|&stages| shared(dims, split, pieces, stages) <= most)
        })?;
        Some(Self { split, pieces, clusters, stages: fit, launch, shared: shared(dims, split, pieces, fit) })
    }

    /// Legal ways to launch it, the preferred one first.
    ///
    /// # Errors
    /// Dimensions that the kernels do not take.
    pub fn all(dims: &Dims, facts: &Facts) -> Result<Vec<Self>, DeviceError> {
        let Dims { rows, cols, outputs, .. } = *dims;
        let takes = (1..=MOST_ROWS).contains(&rows)
            && cols.is_multiple_of(64)
            && (64..=1 << 16).contains(&cols)
            && outputs.is_multiple_of(STRIP_ROWS)
            && (STRIP_ROWS..=1 << 22).contains(&outputs);
        if !takes {
            return Err(DeviceError::new(
                OP,
                format!("{rows} rows by {outputs} x {cols} is no shape for it"),
            ));
        }
        let most = (facts.multiprocessors as usize).max(4);
        let ways = [(2, 4), (1, 8), (4, 2), (2, 8), (4, 4), (4, 8)];
        let strips = outputs / STRIP_ROWS;
        let plans = ways.iter().filter_map(|&(split, pieces)| {
            let clusters = strips.min(most / split);
            let clusters = strips.div_ceil(strips.div_ceil(clusters));
            Self::new(dims, facts, split, pieces, clusters, 0)
        });
        Ok(plans.collect())
    }
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    weights: u64,
    factors: u64,
    x: u64,
    norm: u64,
    live: u64,
    y: u64,
    tiles: i32,
    each: i32,
    more: i32,
    rows: i32,
    stride: i32,
    pieces: i32,
    stages: i32,
    reciprocal: i32,
    launch: i32,
    output: i32,
    mean: f32,
    eps: f32,
}

// SAFETY: mirrors `Params` of kernels/gemv_nvfp4.cu.
unsafe impl Params for Arguments {}

/// The loaded kernel.
#[derive(Clone, Copy, Debug)]
pub struct GemvNvfp4 {
    dims: Dims,
    plan: Plan,
    kernel: Kernel,
}

/// `y = factors * (W norm(x))` and the like.
#[derive(Debug)]
pub struct Call<'a> {
    /// Strips of `[outputs, cols]`. They must have been complete before the launch before this one was issued: they are read without
    /// waiting for that.
    pub weights: &'a Buffer<u8>,
    /// `[outputs]`, in the strips' order, under the same condition.
    pub factors: &'a Buffer<f32>,
    /// One integer: rows to do; later rows of the output are left alone.
    pub live: &'a Buffer<i32>,
    /// What is multiplied.
    pub input: Input<'a>,
    /// Where it goes.
    pub output: Output<'a>,
}

impl GemvNvfp4 {
    /// Loads the kernel for a shape.
    ///
    /// # Errors
    /// A shape that it does not take, or a device other than Hopper.
    pub fn load(device: &Device, dims: Dims) -> Result<Self, DeviceError> {
        let plan = Plan::all(&dims, device.facts())?.into_iter().next();
        let plan = plan.ok_or_else(|| DeviceError::new(OP, format!("{dims:?} does not fit this device")))?;
        Self::with_plan(device, dims, plan)
    }

    /// Loads it with a plan other than its own.
    ///
    /// # Errors
    /// As [`GemvNvfp4::load`].
    pub fn with_plan(device: &Device, dims: Dims, plan: Plan) -> Result<Self, DeviceError> {
        if !device.facts().is_hopper() {
            return Err(DeviceError::new(OP, "there is code for compute capability 9.0 only".to_owned()));
        }
        let name = match (plan.split, dims.rows > 8) {
            (1, false) => "gemv_nvfp4_1_1",
            (1, true) => "gemv_nvfp4_1_2",
            (2, false) => "gemv_nvfp4_2_1",
            (2, true) => "gemv_nvfp4_2_2",
            (4, false) => "gemv_nvfp4_4_1",
            (4, true) => "gemv_nvfp4_4_2",
            _ => return Err(DeviceError::new(OP, format!("no kernel for {plan}"))),
        };
        if !matches!(plan.pieces, 2 | 4 | 8) || plan.clusters == 0 {
            return Err(DeviceError::new(OP, format!("no kernel for {plan}")));
        }
        let kernel = device.kernel(OP, name, device.facts().shared_memory as usize)?;
        Ok(Self { dims, plan, kernel })
    }

    /// How it is launched.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Issues it.
    ///
    /// # Errors
    /// Buffers that are too small, an input of the other kind, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let (Dims { rows, cols, outputs, normed }, plan) = (self.dims, self.plan);
        let (x, norm, mean, eps, input_fits) = match call.input {
            Input::Normed { x, weight, norm_cols, eps } => {
                let fits = x.len() >= rows * cols && weight.len() >= cols && (1..=cols).contains(&norm_cols);
                (x.address(), weight.address(), 1.0 / norm_cols as f32, eps, fits && normed)
            }
            Input::Plain(x) => (x.address(), 0, 0.0, 0.0, x.len() >= rows * cols && !normed),
        };
        let (y, stride, output, output_fits) = match call.output {
            Output::F32(y) => (y.address(), outputs, 0, y.len() >= rows * outputs),
            Output::Add(y) => (y.address(), outputs, 1, y.len() >= rows * outputs),
            Output::SwiGlu(y) => (y.address(), outputs / 2, 2, y.len() >= rows * outputs / 2),
        };
        let fits = input_fits
            && output_fits
            && call.weights.len() >= strip_bytes(outputs, cols)
            && call.factors.len() >= outputs
            && !call.live.is_empty();
        if !fits {
            return Err(DeviceError::new(OP, format!("{:?} does not fit its buffers", self.dims)));
        }
        let arguments = Arguments {
            weights: call.weights.address(),
            factors: call.factors.address(),
            x,
            norm,
            live: call.live.address(),
            y,
            tiles: (cols / 64) as i32,
            each: (outputs / STRIP_ROWS / plan.clusters) as i32,
            more: (outputs / STRIP_ROWS % plan.clusters) as i32,
            rows: rows as i32,
            stride: stride as i32,
            pieces: plan.pieces.ilog2() as i32,
            stages: plan.stages as i32,
            reciprocal: (1_usize << 16).div_ceil(rows.div_ceil(2)) as i32,
            launch: plan.launch as i32,
            output,
            mean,
            eps,
        };
        let launch = Launch {
            grid: [(plan.clusters * plan.split) as u32, 1, 1],
            block: THREADS,
            shared: plan.shared as u32,
            overlap: true,
        };
        // SAFETY: every buffer was checked to be large enough.
        unsafe { device.launch(&self.kernel, &launch, &arguments) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            name: String::new(),
            capability: (9, 0),
            multiprocessors: 132,
            shared_memory: 232_448,
            memory: 0,
            driver: 13_000,
        }
    }

    #[test]
    fn blocks_of_two_launches_fit_side_by_side() {
        for (outputs, cols, normed) in
            [(6144, 2560, true), (2560, 4096, false), (19_456, 2560, true), (2560, 9728, false)]
        {
            for rows in [1, 8, 16] {
                let dims = Dims { rows, cols, outputs, normed };
                let plans = Plan::all(&dims, &facts()).unwrap();
                assert!(!plans.is_empty(), "{dims:?}");
                for plan in plans {
                    let halves = rows < 16 || cols == 2560;
                    assert!(!halves || 2 * (plan.shared + 1024) <= 228 * 1024, "{dims:?}: {plan}");
                    assert!(plan.clusters * plan.split <= 132, "{dims:?}: {plan}");
                }
            }
        }
    }

    #[test]
    fn shapes_that_no_kernel_takes_are_refused() {
        for (rows, cols, outputs) in
            [(0, 64, 16), (17, 64, 16), (1, 72, 16), (1, 0, 16), (1, 64, 24), (1, 64, 0)]
        {
            assert!(Plan::all(&Dims { rows, cols, outputs, normed: true }, &facts()).is_err());
        }
    }
}
