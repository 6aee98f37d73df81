//! Products of at most 16 token rows with NVFP4 strips.

use std::fmt;

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Facts, Kernel, Launch, Params};
use crate::ops::pack_nvfp4::{STRIP_ROWS, strip_bytes};

const OP: &str = "gemv_nvfp4";
/// Most token rows.
pub const MOST_ROWS: usize = 16;
/// Warps of a block: those that multiply, those that add up and store, the one that copies.
const WARPS: usize = 8;
const FINISHERS: usize = 2;
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
    /// Of eight warps those that share a block's columns: 2, 4 or 8; the others have other strips.
    pub pieces: usize,
    /// Clusters, each with some strips.
    pub clusters: usize,
    /// Strips that the ring holds.
    pub stages: usize,
    /// Strips of which sums are under way: 2 or 4.
    pub slots: usize,
    /// The next kernel may start when this many strips of a block have not been asked for yet.
    pub launch: usize,
    /// Bytes of shared memory.
    pub shared: usize,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { split, pieces, clusters, stages, slots, launch, shared } = self;
        write!(
            f,
            "{clusters} x {split} blocks, {pieces} pieces, {stages} stages, {slots} slots, \
             launch {launch}, {} KiB",
            shared.div_ceil(1024)
        )
    }
}

/// Blocks of a cluster, and warps that share a block's columns.
pub type Way = (usize, usize);

/// Bytes of shared memory, in the order of kernels/gemv_nvfp4.cu.
fn shared(dims: &Dims, (split, pieces): Way, slots: usize, stages: usize) -> usize {
    let tiles = (dims.cols / 64).div_ceil(split);
    let normed = if dims.normed { 16 * 16 * 4 + tiles * 256 } else { 0 };
    let tokens = dims.rows * (tiles * 128 + 16);
    let sums = slots * split * pieces * dims.rows.div_ceil(2) * 128;
    (512 + normed + tokens + sums).next_multiple_of(128) + stages * tiles * TILE_BYTES + SLACK
}

impl Plan {
    /// A plan with as many stages as fit half a multiprocessor, or, where none does, a whole one; `None` where it has none.
    pub fn new(dims: &Dims, facts: &Facts, way: Way, clusters: usize, launch: usize) -> Option<Self> {
        let (split, pieces) = way;
        let groups = WARPS / pieces;
        let strips = dims.outputs / STRIP_ROWS;
        let count = strips.div_ceil(clusters);
        // Every block has columns.
        if dims.cols / 64 < split {
            return None;
        }
        let whole = facts.shared_memory as usize;
        let (slots, stages) = [HALF.min(whole), whole].into_iter().find_map(|most| {
            // Strips that take turns at a place must be of one group of warps.
            let slots = [4, 2].into_iter().filter(|slots| (slots * split).is_multiple_of(groups));
            let fits = slots.filter_map(|slots| {
                let stages = (1..=MOST_STAGES.min(count.max(1))).rev();
                let mut stages = stages.filter(|&stages| stages >= count || stages.is_multiple_of(groups));
                Some((slots, stages.find(|&stages| shared(dims, way, slots, stages) <= most)?))
            });
            fits.max_by_key(|&(slots, stages)| (stages, slots))
        })?;
        let shared = shared(dims, way, slots, stages);
        Some(Self { split, pieces, clusters, stages, slots, launch, shared })
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
        // What was fastest in a layer's four products in turn (kernels/README.md). It does not depend on the rows: nor do the bits then.
        let (most, strips) = ((facts.multiprocessors as usize).max(4), outputs / STRIP_ROWS);
        let long = if cols > 4096 { 3 } else { 4 };
        let ways = [
            ((1, 8), strips.div_ceil(2 * most)),
            ((2, 8), strips.div_ceil(most)),
            ((4, 4), long.max(strips.div_ceil(most / 2))),
        ];
        let first = if strips > 4 * most { 0 } else { 1 + usize::from(strips < 2 * most) };
        let order = [first, (first + 1) % 3, (first + 2) % 3];
        let plans = order.into_iter().filter_map(|at| {
            let (way, each) = ways[at];
            Self::new(dims, facts, way, strips.div_ceil(each), 0)
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
    slots: i32,
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
        if !plan.pieces.is_power_of_two() || plan.pieces > WARPS || plan.clusters == 0 {
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
            slots: plan.slots.ilog2() as i32,
            reciprocal: (1_usize << 16).div_ceil(rows.div_ceil(2)) as i32,
            launch: plan.launch as i32,
            output,
            mean,
            eps,
        };
        let launch = Launch {
            grid: [(plan.clusters * plan.split) as u32, 1, 1],
            block: (WARPS + FINISHERS + 1) as u32 * 32,
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

    const SHAPES: [(usize, usize, bool); 4] =
        [(6144, 2560, true), (2560, 4096, false), (19_456, 2560, true), (2560, 9728, false)];

    #[test]
    fn every_plan_is_sound() {
        for ((outputs, cols, normed), rows) in
            SHAPES.into_iter().flat_map(|shape| (1..=MOST_ROWS).map(move |rows| (shape, rows)))
        {
            let dims = Dims { rows, cols, outputs, normed };
            let plans = Plan::all(&dims, &facts()).unwrap();
            for plan in &plans {
                let groups = WARPS / plan.pieces;
                assert!(plan.shared <= 232_448 && plan.clusters <= outputs / 16, "{dims:?}: {plan}");
                assert!((plan.slots * plan.split).is_multiple_of(groups), "{dims:?}: {plan}");
                let count = (outputs / 16).div_ceil(plan.clusters);
                assert!(plan.stages >= count || plan.stages.is_multiple_of(groups), "{dims:?}: {plan}");
            }
            // Two blocks and what the device keeps for each of them, and the same sums whatever the rows.
            let first = &plans[0];
            assert!(rows > 8 || 2 * (first.shared + 1024) <= 228 * 1024, "{dims:?}: {first}");
            let one = &Plan::all(&Dims { rows: 1, ..dims }, &facts()).unwrap()[0];
            assert!(rows > 8 || (one.split, one.pieces) == (first.split, first.pieces), "{dims:?}: {first}");
        }
    }

    #[test]
    fn plans_are_those_that_were_fastest() {
        let plans = SHAPES.map(|(outputs, cols, normed)| {
            let plan = Plan::all(&Dims { rows: 1, cols, outputs, normed }, &facts()).unwrap()[0];
            (plan.clusters, plan.split, plan.pieces)
        });
        assert_eq!(plans, [(128, 2, 8), (40, 4, 4), (244, 1, 8), (54, 4, 4)]);
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
