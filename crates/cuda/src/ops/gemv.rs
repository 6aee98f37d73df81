//! Products of few token rows: what `gemv_qkv`, `gemv_out` and `gemv_head` share.

use std::fmt;

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Facts, Kernel, Launch, Params};

/// Most panels of 64 columns that one warp takes, and most warps.
const MAX_SLICE: usize = 16;
const MAX_WARPS: usize = 16;
/// Warps that keep enough loads in flight; more only cost registers.
const GOOD_WARPS: usize = 9;
/// Blocks of a cluster that share the columns, and warps of each.
const SPLIT: usize = 8;

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Most token rows, 1 to 16.
    pub rows: usize,
    /// Columns of the matrix, a multiple of 64.
    pub cols: usize,
    /// Its rows, a multiple of 8.
    pub outputs: usize,
    /// Whether the input is normed on the way in.
    pub normed: bool,
    /// Whether a block takes several rounds of tiles: long matrices.
    pub walks: bool,
}

/// A compiled variant, and when it lets the next kernel start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variant {
    /// Tiles of 8 outputs that a block multiplies at a time.
    pub tiles: usize,
    /// Stages of one panel and all tiles.
    pub stages: usize,
    /// Whether the blocks of a cluster share the columns, each warp with tiles of its own (kernels/common/gemv_split.cuh); on
    /// Hopper only. Elsewhere the warps of a block share the columns, each with all its tiles.
    pub split: bool,
    /// The next kernel may start when this many panels of a warp have not arrived yet. Earlier, and its loads delay the last
    /// ones of this kernel; later, and memory idles.
    pub launch: usize,
}

/// How it is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The compiled variant.
    pub variant: Variant,
    /// Token rows that the kernel is compiled for.
    pub width: usize,
    /// Token rows of one launch; fewer than asked for where shared memory is short.
    pub lines: usize,
    /// Warps of a block.
    pub warps: usize,
    /// Panels of 64 columns that a warp takes.
    pub slice: usize,
    /// Thread blocks.
    pub blocks: usize,
    /// Rounds of `variant.tiles` tiles that every block has, if blocks walk.
    pub full: usize,
    /// Tiles of a block in a last round, if blocks walk.
    pub tail: usize,
    /// Bytes of shared memory.
    pub shared: usize,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            variant: Variant { tiles, stages, split, .. }, lines, warps, slice, blocks, shared, ..
        } = self;
        write!(
            f,
            "{blocks} blocks{} of {tiles} tiles, {warps} warps x {slice} panels, {stages} stages, {lines} rows, \
             {} KiB",
            if *split { " in clusters" } else { "" },
            shared.div_ceil(1024),
        )
    }
}

/// A variant and its kernels: the most token rows that each is compiled for, and its name.
pub type Names = (Variant, [(usize, &'static str); 2]);

/// Maps a shape to a launch: the first of `variants` that fits the device.
///
/// # Errors
/// Dimensions that the kernels do not take.
pub fn plan(op: &'static str, shape: &Shape, facts: &Facts, variants: &[Names]) -> Result<Plan, DeviceError> {
    let found = plans(op, shape, facts, variants)?.into_iter().next();
    found.ok_or_else(|| {
        DeviceError::new(op, format!("{} bytes of shared memory are too few", facts.shared_memory))
    })
}

/// Every way to launch it, the preferred ones first.
///
/// # Errors
/// Dimensions that the kernels do not take.
pub fn plans(
    op: &'static str,
    shape: &Shape,
    facts: &Facts,
    variants: &[Names],
) -> Result<Vec<Plan>, DeviceError> {
    let Shape { rows, cols, outputs, .. } = *shape;
    let panels = cols / 64;
    let fits = (1..=16).contains(&rows)
        && cols.is_multiple_of(64)
        && (1..=MAX_SLICE * MAX_WARPS).contains(&panels)
        && outputs.is_multiple_of(8)
        && (1..=1 << 24).contains(&outputs);
    if !fits {
        return Err(DeviceError::new(op, format!("{rows} rows by {outputs} x {cols} is no shape for it")));
    }
    let mut lines = vec![rows, rows.min(8), rows.min(4), 1];
    lines.dedup();
    let all = lines.into_iter().flat_map(|lines| variants.iter().map(move |names| (lines, names)));
    Ok(all.filter_map(|(lines, names)| one_plan(shape, facts, lines, names)).collect())
}

fn one_plan(shape: &Shape, facts: &Facts, lines: usize, &(variant, kernels): &Names) -> Option<Plan> {
    let (panels, tiles) = (shape.cols / 64, shape.outputs / 8);
    let (slice, warps) = if variant.split { (panels.div_ceil(SPLIT), SPLIT) } else { split(panels) };
    let shared = shared(shape, variant, lines, warps);
    if shared > facts.shared_memory as usize || (variant.split && !facts.is_hopper()) {
        return None;
    }
    let (width, _) = *kernels.iter().find(|(most, _)| lines <= *most)?;
    let groups = tiles.div_ceil(variant.tiles);
    let most = facts.multiprocessors.max(1) as usize;
    let blocks = if variant.split {
        groups.next_multiple_of(SPLIT)
    } else if shape.walks {
        groups.min(most)
    } else {
        groups
    };
    let full = tiles / (blocks * variant.tiles);
    let tail = (tiles - full * blocks * variant.tiles).div_ceil(blocks);
    // A gate and its up are neighbours: blocks of even tiles never part them.
    let tail = if variant.tiles.is_multiple_of(2) { tail.next_multiple_of(2) } else { tail };
    Some(Plan { variant, width, lines, warps, slice, blocks, full, tail, shared })
}

/// Panels of a warp and warps: no warp idle, as even as possible, then about as many as keep memory busy.
fn split(panels: usize) -> (usize, usize) {
    let choices = (1..=MAX_SLICE).map(|slice| (slice, panels.div_ceil(slice)));
    let good = |&(slice, warps): &(usize, usize)| (slice * warps - panels, warps.abs_diff(GOOD_WARPS));
    choices.filter(|&(_, warps)| warps <= MAX_WARPS).min_by_key(good).unwrap_or((MAX_SLICE, MAX_WARPS))
}

/// Bytes of shared memory, in the order of kernels/common/gemv.cuh and gemv_split.cuh.
fn shared(shape: &Shape, variant: Variant, lines: usize, warps: usize) -> usize {
    let ring = warps * variant.stages * variant.tiles * 1024;
    let squares = if shape.normed { (warps * lines).next_multiple_of(4) * 4 } else { 0 };
    if variant.split {
        let tokens = (shape.cols / 64).div_ceil(SPLIT) * lines * 128;
        let sums = SPLIT * variant.tiles * if lines > 8 { 512 } else { 256 };
        let barriers = (1 + SPLIT * variant.stages) * 8;
        return ring + tokens + sums + squares + barriers;
    }
    let tokens = shape.cols * lines * 2;
    let partials = if shape.walks { 2 * warps * lines * variant.tiles * 32 } else { 0 };
    ring + tokens + squares + partials
}

/// `Product` of kernels/common/gemv.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    weights: u64,
    live: u64,
    outputs: i32,
    panels: i32,
    slice: i32,
    lines: i32,
    first: i32,
    full: i32,
    tail: i32,
    launch: i32,
}

/// What such a product is loaded for: the dimensions of one file's kernels.
pub trait Dims: Copy {
    /// The file.
    const FILE: &'static str;
    /// Its kernels, the preferred ones first.
    const KERNELS: &'static [Names];

    /// What they come to.
    ///
    /// # Errors
    /// Dimensions that the kernels do not take.
    fn shape(&self) -> Result<Shape, DeviceError>;
}

/// A loaded kernel.
#[derive(Clone, Copy, Debug)]
pub struct Gemv<D> {
    pub(super) dims: D,
    shape: Shape,
    plan: Plan,
    kernel: Kernel,
}

impl<D: Dims> Gemv<D> {
    /// Loads the kernel for a shape.
    ///
    /// # Errors
    /// A shape that it does not take, or no code for this device.
    pub fn load(device: &Device, dims: D) -> Result<Self, DeviceError> {
        let plan = plan(D::FILE, &dims.shape()?, device.facts(), D::KERNELS)?;
        Self::with_plan(device, dims, plan)
    }

    /// Every way to launch it, the preferred ones first.
    ///
    /// # Errors
    /// A shape that it does not take.
    pub fn plans(device: &Device, dims: D) -> Result<Vec<Plan>, DeviceError> {
        plans(D::FILE, &dims.shape()?, device.facts(), D::KERNELS)
    }

    /// Loads it with a plan other than its own.
    ///
    /// # Errors
    /// As [`Gemv::load`]; a plan without a kernel.
    pub fn with_plan(device: &Device, dims: D, plan: Plan) -> Result<Self, DeviceError> {
        let shape = dims.shape()?;
        // When it lets the next kernel start is no part of the code.
        let code = |variant: Variant| Variant { launch: 0, ..variant };
        let kernels = D::KERNELS.iter().find(|(variant, _)| code(*variant) == code(plan.variant));
        let name = kernels.and_then(|(_, kernels)| kernels.iter().find(|(width, _)| *width == plan.width));
        let Some(&(_, name)) = name.filter(|_| plan.lines <= plan.width) else {
            return Err(DeviceError::new(D::FILE, format!("no kernel for {plan}")));
        };
        if plan.shared < shared(&shape, plan.variant, plan.lines, plan.warps) {
            return Err(DeviceError::new(D::FILE, format!("too little shared memory in {plan}")));
        }
        // The limit is the function's, and other shapes use the same function: it is set as high as it goes.
        let kernel = device.kernel(D::FILE, name, device.facts().shared_memory as usize)?;
        Ok(Self { dims, shape, plan, kernel })
    }

    /// How it is launched.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Launches it as often as its rows need. `fits` says whether the buffers are large enough; `arguments` makes a launch's
    /// from the part that products share.
    pub(super) fn issue_with<P: Params>(
        &self,
        device: &Device,
        fits: bool,
        (weights, live): (&Buffer<u16>, &Buffer<i32>),
        arguments: impl Fn(Product) -> P,
    ) -> Result<(), DeviceError> {
        let (shape, plan) = (&self.shape, &self.plan);
        if !fits || weights.len() < shape.outputs * shape.cols || live.is_empty() {
            return Err(DeviceError::new(D::FILE, format!("{shape:?} does not fit its buffers")));
        }
        let launch = Launch {
            grid: [plan.blocks as u32, 1, 1],
            block: plan.warps as u32 * 32,
            shared: plan.shared as u32,
            overlap: true,
        };
        for first in (0..shape.rows).step_by(plan.lines) {
            let product = Product {
                weights: weights.address(),
                live: live.address(),
                outputs: shape.outputs as i32,
                panels: (shape.cols / 64) as i32,
                slice: plan.slice as i32,
                lines: plan.lines.min(shape.rows - first) as i32,
                first: first as i32,
                full: plan.full as i32,
                tail: plan.tail as i32,
                launch: plan.variant.launch as i32,
            };
            // SAFETY: every buffer was checked to be large enough for the shape that the kernel was loaded for.
            unsafe { device.launch(&self.kernel, &launch, &arguments(product)) }?;
        }
        Ok(())
    }
}

/// Variants of a file's kernels, with their names. Those for clusters end in `, split`.
macro_rules! variants {
    ($file:literal: $(($tiles:literal, $stages:literal, $launch:literal $(, $split:ident)?)),+ $(,)?) => {
        &[$($crate::ops::gemv::variants!(@one $file, $tiles, $stages, $launch $(, $split)?)),+]
    };
    (@one $file:literal, $tiles:literal, $stages:literal, $launch:literal, split) => {(
        $crate::ops::gemv::Variant { tiles: $tiles, stages: $stages, split: true, launch: $launch },
        [
            (8, concat!($file, "_split_", $tiles, "x", $stages, "_8")),
            (16, concat!($file, "_split_", $tiles, "x", $stages, "_16")),
        ],
    )};
    (@one $file:literal, $tiles:literal, $stages:literal, $launch:literal) => {(
        $crate::ops::gemv::Variant { tiles: $tiles, stages: $stages, split: false, launch: $launch },
        [
            (1, concat!($file, "_", $tiles, "x", $stages, "_1")),
            (16, concat!($file, "_", $tiles, "x", $stages, "_16")),
        ],
    )};
}
pub(super) use variants;

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(multiprocessors: u32, shared_memory: u32) -> Facts {
        Facts {
            name: String::new(),
            capability: (9, 0),
            multiprocessors,
            shared_memory,
            memory: 0,
            driver: 13_000,
        }
    }

    const QKV: &[Names] = variants!("": (5, 2, 1), (2, 2, 1));
    const HEAD: &[Names] = variants!("": (5, 3, 3), (5, 2, 2));

    fn shape(rows: usize, cols: usize, outputs: usize, walks: bool) -> Shape {
        Shape { rows, cols, outputs, normed: true, walks }
    }

    #[test]
    fn few_rows_leave_room_for_the_next_kernel() {
        let facts = facts(132, 232_448);
        for rows in 1..=4 {
            let plan = plan("test", &shape(rows, 2880, 5120, false), &facts, QKV).unwrap();
            assert_eq!((plan.blocks, plan.warps, plan.slice, plan.lines), (128, 9, 5, rows));
            // Two blocks and what the device keeps for each of them.
            assert!(2 * (plan.shared + 1024) <= 228 * 1024, "{rows} rows: {plan}");
        }
    }

    #[test]
    fn blocks_share_columns_on_hopper() {
        let variants: &[Names] = variants!("": (5, 2, 2, split), (5, 2, 1));
        let shape = |rows| shape(rows, 2880, 5120, false);
        let facts = facts(132, 232_448);
        for (rows, width) in [(1, 8), (8, 8), (9, 16), (16, 16)] {
            let plan = plan("test", &shape(rows), &facts, variants).unwrap();
            assert_eq!((plan.variant.split, plan.blocks, plan.lines, plan.width), (true, 128, rows, width));
            // Two blocks and what the device keeps for each of them.
            assert!(2 * (plan.shared + 1024) <= 228 * 1024, "{rows} rows: {plan}");
        }
        let ampere = Facts { capability: (8, 0), ..facts };
        assert!(plans("test", &shape(16), &ampere, variants).unwrap().iter().all(|plan| !plan.variant.split));
    }

    #[test]
    fn sixteen_rows_fit_a_large_and_are_split_on_a_small_device() {
        let on_hopper = plan("test", &shape(16, 2880, 5120, false), &facts(132, 232_448), QKV).unwrap();
        assert_eq!((on_hopper.lines, on_hopper.width), (16, 16));
        let on_ada = plan("test", &shape(16, 2880, 5120, false), &facts(142, 101_376), QKV).unwrap();
        assert_eq!((on_ada.lines, on_ada.width, on_ada.variant.tiles), (8, 16, 2));
        let head = plan("test", &shape(16, 2880, 201_088, true), &facts(132, 232_448), HEAD).unwrap();
        assert_eq!((head.lines, head.variant.stages), (16, 2));
    }

    #[test]
    fn every_panel_has_one_warp_and_every_warp_a_panel() {
        for panels in 1..=MAX_SLICE * MAX_WARPS {
            let (slice, warps) = split(panels);
            assert!((1..=MAX_SLICE).contains(&slice) && (1..=MAX_WARPS).contains(&warps), "{panels}");
            assert!(slice * warps >= panels && (warps - 1) * slice < panels, "{panels}: {slice} x {warps}");
        }
        assert_eq!((split(45), split(64)), ((5, 9), (8, 8)));
    }

    /// `Rounds` of kernels/common/gemv.cuh.
    #[test]
    fn every_tile_has_one_block() {
        for outputs in [8, 16, 40, 48, 88, 1608, 5120, 5288, 10_568, 201_088, 201_096] {
            let (all, plan) = (
                outputs / 8,
                plan("test", &shape(1, 64, outputs, true), &facts(132, 232_448), HEAD).unwrap(),
            );
            let (tiles, mut seen) = (plan.variant.tiles, vec![0; all]);
            for block in 0..plan.blocks {
                let count =
                    plan.full + usize::from(plan.full * plan.blocks * tiles + block * plan.tail < all);
                for round in 0..count {
                    let (start, size) = if round < plan.full {
                        ((round * plan.blocks + block) * tiles, tiles)
                    } else {
                        (plan.full * plan.blocks * tiles + block * plan.tail, plan.tail)
                    };
                    assert!(size <= tiles);
                    (start..(start + size).min(all)).for_each(|tile| seen[tile] += 1);
                }
            }
            assert!(seen.iter().all(|&times| times == 1), "{outputs} outputs: {plan}");
        }
    }

    #[test]
    fn shapes_that_no_kernel_takes_are_refused() {
        let facts = facts(132, 232_448);
        for (rows, cols, outputs) in
            [(0, 64, 8), (17, 64, 8), (1, 72, 8), (1, 0, 8), (1, 64, 12), (1, 16_448, 8)]
        {
            assert!(plan("test", &shape(rows, cols, outputs, false), &facts, QKV).is_err());
        }
    }
}
