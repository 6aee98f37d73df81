//! Gate/up of the chosen experts and SwiGLU, small batches. Also what it shares with `moe_down`.

use std::fmt;

use ctxserve_backend::DeviceError;

use super::pack_mxfp4::{Rows, Strips};
use super::route::{MOST_CHOICES, MOST_EXPERTS};
use crate::driver::{Buffer, Device, Facts, Kernel, Launch, Params};

const OP: &str = "moe_gate_up";

// As in kernels/common/experts.cuh.
const MOST_WARPS: usize = 16;
const FEWEST_WARPS: usize = 4;
const PIECE: usize = 3;
const STAGES: usize = 4;
/// A warp's part of the ring.
const RING: usize = STAGES * PIECE * (512 + 32);
const BARRIERS: usize = 512;
const OWN_BARRIERS: usize = BARRIERS + 64;
/// Tokens of many rows that are in shared memory at a time.
const STAGED: usize = 16;
/// Most rows of the kernels that split a strip's columns over warps.
const FEW: usize = 8;
/// Rows from which on strips go through the pipe, where there is one: a row alone is as fast without, and needs no second launch for down.
const PIPED: usize = 2;
/// Most rows of this path.
pub const MOST_ROWS: usize = 128;
// As in kernels/common/pipe.cuh.
const PIPE_WARPS: usize = 20;
const PIPE_PIECES: usize = 16;
const PIPE_SUMS: usize = 3 * 2 * 512;
/// More strips on their way delay what else is read: four were 4 to 13% faster than seven.
const PIPE_STAGES: usize = 4;
const PIPE_FIXED: usize = BARRIERS + 16 * 64;
/// More floats for partial sums than this gain nothing.
const MOST_SUMS: usize = 8192;

/// Sizes of a mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Experts, at most 128.
    pub experts: usize,
    /// Experts of a row, at most 8.
    pub top_k: usize,
    /// Width of x and h, a multiple of 64.
    pub hidden: usize,
    /// Width between the products, padded to a multiple of 64.
    pub inner: usize,
}

impl Shape {
    pub(super) fn is_sound(self) -> bool {
        let Self { experts, top_k, hidden, inner } = self;
        let width = |cols: usize| (64..=8192).contains(&cols) && cols.is_multiple_of(64);
        (1..=MOST_EXPERTS).contains(&experts)
            && (1..=MOST_CHOICES.min(experts)).contains(&top_k)
            && width(hidden)
            && width(inner)
    }
}

/// How a block's warps divide the strips.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Few rows: a warp has one piece of each strip.
    Piece,
    /// Few rows, more pieces than warps: a warp has some of them.
    Pieces,
    /// Any rows: a warp has one piece of each strip and holds its tokens, others add the pieces up.
    Pipe,
    /// A warp has whole strips; tokens come to shared memory first.
    Strip,
    /// The same, where tokens do not fit.
    StripOnly,
}

/// How a call is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What a warp does.
    pub split: Split,
    /// Blocks.
    pub blocks: u32,
    /// Warps of a block.
    pub warps: u32,
    /// Bytes of shared memory.
    pub shared: u32,
    /// Floats of it for partial sums.
    pub sums: u32,
    /// Strips that are on their way at a time, of [`Split::Pipe`].
    pub stages: u32,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { split, blocks, warps, shared, sums, stages } = self;
        let each = match split {
            Split::Piece => "one piece",
            Split::Pieces => "some pieces",
            Split::Pipe => "one piece and all tokens",
            Split::Strip => "whole strips",
            Split::StripOnly => "whole strips, tokens not staged,",
        };
        write!(
            f,
            "{each} a warp, {blocks} blocks of {warps} warps, {shared} bytes shared, {sums} sums, {stages} stages"
        )
    }
}

/// Bytes of shared memory for the list of work of `pairs` (row, slot) pairs.
fn work_bytes(pairs: usize) -> usize {
    let places = if pairs > 32 { 256 + pairs.div_ceil(32) * 256 } else { 0 };
    pairs * 8 + (pairs * 2).next_multiple_of(16) + 16 + places
}

/// The launch of a pipe for `pairs` (row, slot) pairs and strips of `cols` columns, where there can be one.
pub(super) fn plan_pipe(pairs: usize, cols: usize, facts: &Facts) -> Option<Plan> {
    let pieces = cols.div_ceil(64 * PIECE);
    let (strip, kept) = (cols / 64 * 544, PIPE_FIXED + pieces * PIPE_SUMS + work_bytes(pairs));
    let stages = ((facts.shared_memory as usize).saturating_sub(kept) / strip).min(PIPE_STAGES);
    (facts.is_hopper() && pieces <= PIPE_PIECES && stages > 1).then(|| Plan {
        split: Split::Pipe,
        blocks: facts.multiprocessors,
        warps: PIPE_WARPS as u32,
        shared: (kept + stages * strip) as u32,
        sums: 0,
        stages: stages as u32,
    })
}

/// What both products plan alike: `cols` columns of a strip; `kept`, bytes of shared memory besides ring, sums and work, of few rows.
/// `wish` is taken where it can be.
pub(super) fn plan_strips(
    rows: usize,
    top_k: usize,
    cols: usize,
    kept: usize,
    facts: &Facts,
    wish: Option<Split>,
) -> Plan {
    let (pairs, limit) = (rows * top_k, facts.shared_memory as usize);
    // Rings of 16 warps need 104 KB.
    let most_warps = if limit < 128 * 1024 { MOST_WARPS / 2 } else { MOST_WARPS };
    let plan = |split, computing: usize, producing: usize, shared: usize, sums: usize| Plan {
        split,
        blocks: facts.multiprocessors,
        warps: (computing + producing) as u32,
        shared: (computing * RING + work_bytes(pairs) + shared + sums * 4) as u32,
        sums: sums as u32,
        stages: 0,
    };
    let pieces = cols.div_ceil(64 * PIECE);
    let piped = match wish {
        None => rows >= PIPED,
        Some(split) => split == Split::Pipe,
    };
    if piped && let Some(plan) = plan_pipe(pairs, cols, facts) {
        return plan;
    }
    if rows > FEW {
        let staged = STAGED * (cols * 2 + 64);
        let plan = |split, shared| plan(split, most_warps, 0, OWN_BARRIERS + shared, 0);
        let first = plan(Split::Strip, staged);
        return if first.shared as usize <= limit { first } else { plan(Split::StripOnly, 0) };
    }
    // On Hopper one more warp starts the copies. As many pieces for each of the others.
    let producing = usize::from(facts.is_hopper());
    let warps = pieces.div_ceil(pieces.div_ceil(most_warps - producing)).max(FEWEST_WARPS);
    let split = if pieces > warps { Split::Pieces } else { Split::Piece };
    // Room for one strip of one expert at the least.
    let least = pieces * 16 * pairs.min(8);
    let plan = |sums| plan(split, warps, producing, BARRIERS + kept, sums);
    let room = limit.saturating_sub(plan(0).shared as usize) / 4;
    plan((room.min(MOST_SUMS) / 16 * 16).max(least))
}

/// The launch for `rows` rows; `wish` is taken where it can be.
pub fn plan(rows: usize, shape: &Shape, facts: &Facts, wish: Option<Split>) -> Plan {
    plan_strips(rows, shape.top_k, shape.hidden, 0, facts, wish)
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    weights: u64,
    bias: u64,
    h: u64,
    choice: u64,
    live: u64,
    a: u64,
    hidden: i32,
    inner: i32,
    experts: i32,
    top_k: i32,
    capacity: i32,
    sums: i32,
    stages: i32,
    alpha: f32,
    limit: f32,
}

// SAFETY: mirrors `Params` of kernels/moe_gate_up.cu.
unsafe impl Params for Arguments {}

/// The loaded kernels.
#[derive(Clone, Copy, Debug)]
pub struct MoeGateUp {
    few: Kernel,
    wide: Kernel,
    pipe: Kernel,
    large: Kernel,
    vast: Kernel,
}

/// `a = SwiGLU(W_e h + b_e)` for each expert `e` that a row chose.
#[derive(Debug)]
pub struct Call<'a> {
    /// Gate/up strips of all experts.
    pub weights: &'a Buffer<u8>,
    /// `[experts, 2 * inner]`: gate `i` at `2i`, up `i` at `2i + 1`, zero in the padding.
    pub bias: &'a Buffer<f32>,
    /// `[rows, hidden]`, bits of fp16 in fragment order.
    pub h: &'a Buffer<u16>,
    /// `[rows, top_k]`.
    pub choice: &'a Buffer<i32>,
    /// One integer: rows to do, at most `rows`.
    pub live: &'a Buffer<i32>,
    /// `[rows * top_k, inner]`, bits of fp16 in fragment order.
    pub a: &'a Buffer<u16>,
    /// Most rows, at most [`MOST_ROWS`].
    pub rows: usize,
    /// The sizes.
    pub shape: Shape,
    /// `alpha` of `gate * sigmoid(alpha * gate) * (up + 1)`.
    pub alpha: f32,
    /// Clamp: `gate <= limit`, `-limit <= up <= limit`.
    pub limit: f32,
}

impl Call<'_> {
    pub(super) fn fits(&self) -> bool {
        let Shape { experts, top_k, hidden, inner } = self.shape;
        let pairs = self.rows * top_k;
        self.shape.is_sound()
            && self.rows <= MOST_ROWS
            && self.weights.len() >= experts * Strips::of(Rows::GateUp, 2 * inner, hidden).bytes()
            && self.bias.len() >= experts * 2 * inner
            && self.h.len() >= self.rows * hidden
            && self.choice.len() >= pairs
            && !self.live.is_empty()
            && self.a.len() >= pairs * inner
    }
}

impl MoeGateUp {
    /// Loads the kernels.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        let shared = device.facts().shared_memory as usize;
        Ok(Self {
            few: device.kernel(OP, "moe_gate_up_few", shared)?,
            wide: device.kernel(OP, "moe_gate_up_wide", shared)?,
            pipe: device.kernel(OP, "moe_gate_up_pipe", shared)?,
            large: device.kernel(OP, "moe_gate_up_large", shared)?,
            vast: device.kernel(OP, "moe_gate_up_vast", shared)?,
        })
    }

    /// Issues it.
    ///
    /// # Errors
    /// Buffers that are too small, sizes out of bounds, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        self.issue_as(device, call, None)
    }

    /// Issues it as wished, where that can be.
    ///
    /// # Errors
    /// As [`MoeGateUp::issue`].
    pub fn issue_as(&self, device: &Device, call: &Call<'_>, wish: Option<Split>) -> Result<(), DeviceError> {
        let Call { rows, shape, .. } = *call;
        if !call.fits() {
            return Err(DeviceError::new(OP, format!("{rows} rows of {shape:?} do not fit")));
        }
        if rows == 0 {
            return Ok(());
        }
        let plan = plan(rows, &shape, device.facts(), wish);
        let arguments = Arguments {
            weights: call.weights.address(),
            bias: call.bias.address(),
            h: call.h.address(),
            choice: call.choice.address(),
            live: call.live.address(),
            a: call.a.address(),
            hidden: shape.hidden as i32,
            inner: shape.inner as i32,
            experts: shape.experts as i32,
            top_k: shape.top_k as i32,
            capacity: (rows * shape.top_k) as i32,
            sums: plan.sums as i32,
            stages: plan.stages as i32,
            alpha: call.alpha,
            limit: call.limit,
        };
        let kernel = match plan.split {
            Split::Piece => &self.few,
            Split::Pieces => &self.wide,
            Split::Pipe => &self.pipe,
            Split::Strip => &self.large,
            Split::StripOnly => &self.vast,
        };
        let launch =
            Launch { grid: [plan.blocks, 1, 1], block: plan.warps * 32, shared: plan.shared, overlap: true };
        // SAFETY: every buffer was checked to be large enough; the kernel bounds experts and pairs itself.
        unsafe { device.launch(kernel, &launch, &arguments) }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) const CONTEXT_1: Shape = Shape { experts: 32, top_k: 4, hidden: 2880, inner: 2880 };

    pub(crate) fn facts(shared_memory: u32) -> Facts {
        Facts {
            name: String::new(),
            capability: (9, 0),
            multiprocessors: 132,
            shared_memory,
            memory: 0,
            driver: 13_000,
        }
    }

    #[test]
    fn few_rows_have_room_for_a_block_s_share() {
        for rows in 1..=8 {
            let plan = plan(rows, &CONTEXT_1, &facts(232_448), Some(Split::Piece));
            assert!(plan.split == Split::Piece && plan.blocks == 132 && plan.warps == 16, "{plan}");
            // Eleven strips of four experts are a block's share of one row.
            assert!(plan.sums as usize >= if rows == 1 { 11 * 15 * 16 } else { 8 * 15 * 16 }, "{plan}");
        }
    }

    #[test]
    fn there_is_room_for_one_strip_whatever_the_shape_and_device() {
        for shared in [101_376, 166_912, 232_448] {
            for (rows, top_k, hidden) in [(1, 1, 64), (8, 8, 8192), (8, 4, 2880), (3, 2, 8192)] {
                let shape = Shape { experts: 128, top_k, hidden, inner: 64 };
                let plan = plan(rows, &shape, &facts(shared), Some(Split::Piece));
                assert!(plan.sums as usize >= hidden.div_ceil(192) * 16 * (rows * top_k).min(8), "{plan}");
                assert!(plan.shared <= shared, "{shared}: {plan}");
            }
            let plan = plan(64, &CONTEXT_1, &facts(shared), Some(Split::Strip));
            assert!(plan.shared <= shared && (plan.split == Split::Strip) == (shared > 200_000), "{plan}");
        }
    }

    #[test]
    fn the_pipe_fits_where_it_is_taken() {
        for rows in [1, 9, 64, MOST_ROWS] {
            let first = plan(rows, &CONTEXT_1, &facts(232_448), Some(Split::Pipe));
            assert!(first.split == Split::Pipe && first.stages == 4 && first.shared <= 232_448, "{first}");
            // More pieces than warps; another generation.
            let wide = Shape { hidden: 8192, ..CONTEXT_1 };
            assert_ne!(plan(rows, &wide, &facts(232_448), Some(Split::Pipe)).split, Split::Pipe);
            let ada = Facts { capability: (8, 9), ..facts(101_376) };
            assert_ne!(plan(rows, &CONTEXT_1, &ada, None).split, Split::Pipe);
        }
    }

    #[test]
    fn a_plan_can_be_read() {
        let plan =
            Plan { split: Split::Piece, blocks: 132, warps: 15, shared: 100_000, sums: 4096, stages: 0 };
        let words = "one piece a warp, 132 blocks of 15 warps, 100000 bytes shared, 4096 sums, 0 stages";
        assert_eq!(plan.to_string(), words);
    }
}
