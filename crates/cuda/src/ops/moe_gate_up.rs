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
/// Most rows of this path.
pub const MOST_ROWS: usize = 64;
/// Shared memory that the driver keeps of each block.
const RESERVED: usize = 1024;
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
    /// Few rows: a warp has one piece of each strip. Half of a multiprocessor is left to other kernels.
    Piece,
    /// The same, with the whole multiprocessor.
    PieceAlone,
    /// Few rows, more pieces than warps: a warp has some of them.
    Pieces,
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
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { split, blocks, warps, shared, sums } = self;
        let each = match split {
            Split::Piece => "one piece",
            Split::PieceAlone => "one piece (alone)",
            Split::Pieces => "some pieces",
            Split::Strip => "whole strips",
            Split::StripOnly => "whole strips, tokens not staged,",
        };
        write!(f, "{each} a warp, {blocks} blocks of {warps} warps, {shared} bytes shared, {sums} sums")
    }
}

/// Bytes of shared memory for the list of work of `pairs` (row, slot) pairs.
fn work_bytes(pairs: usize) -> usize {
    pairs * 8 + (pairs * 2).next_multiple_of(16) + pairs.next_multiple_of(16) + 32
}

/// What both products plan alike: `cols` columns of a strip; `kept`, bytes of shared memory besides ring, sums and work.
/// `alone`: few rows take the whole multiprocessor, which measured faster than leaving room for a block of the next kernel.
pub(super) fn plan_strips(
    rows: usize,
    top_k: usize,
    cols: usize,
    kept: usize,
    facts: &Facts,
    alone: Option<bool>,
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
    };
    if rows > FEW {
        let staged = STAGED * (cols * 2 + 64);
        let plan = |split, shared| plan(split, most_warps, 0, OWN_BARRIERS + shared, 0);
        let first = plan(Split::Strip, staged);
        return if first.shared as usize <= limit { first } else { plan(Split::StripOnly, 0) };
    }
    // On Hopper one more warp starts the copies. As many pieces for each of the others.
    let producing = usize::from(facts.is_hopper());
    let pieces = cols.div_ceil(64 * PIECE);
    let warps = pieces.div_ceil(pieces.div_ceil(most_warps - producing)).max(FEWEST_WARPS);
    let split = match alone.unwrap_or(true) {
        _ if pieces > warps => Split::Pieces,
        true => Split::PieceAlone,
        false => Split::Piece,
    };
    // Room for one strip of one expert at the least.
    let least = pieces * 16 * pairs.min(8);
    let plan = |sums| plan(split, warps, producing, BARRIERS + kept, sums);
    let limit = if split == Split::Piece { (limit + RESERVED) / 2 - RESERVED } else { limit };
    let room = limit.saturating_sub(plan(0).shared as usize) / 4;
    plan((room.min(MOST_SUMS) / 16 * 16).max(least))
}

/// The launch for `rows` rows. `alone` asks for [`Split::PieceAlone`], or for [`Split::Piece`], of few rows.
pub fn plan(rows: usize, shape: &Shape, facts: &Facts, alone: Option<bool>) -> Plan {
    plan_strips(rows, shape.top_k, shape.hidden, 0, facts, alone)
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
    alpha: f32,
    limit: f32,
}

// SAFETY: mirrors `Params` of kernels/moe_gate_up.cu.
unsafe impl Params for Arguments {}

/// The loaded kernels.
#[derive(Clone, Copy, Debug)]
pub struct MoeGateUp {
    small: Kernel,
    few: Kernel,
    wide: Kernel,
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

impl MoeGateUp {
    /// Loads the kernels.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        let shared = device.facts().shared_memory as usize;
        Ok(Self {
            small: device.kernel(OP, "moe_gate_up_small", shared)?,
            few: device.kernel(OP, "moe_gate_up_few", shared)?,
            wide: device.kernel(OP, "moe_gate_up_wide", shared)?,
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

    /// Issues it with or without the whole multiprocessor, where there are few rows.
    ///
    /// # Errors
    /// As [`MoeGateUp::issue`].
    pub fn issue_as(&self, device: &Device, call: &Call<'_>, alone: Option<bool>) -> Result<(), DeviceError> {
        let Call { rows, shape, .. } = *call;
        let Shape { experts, top_k, hidden, inner } = shape;
        let fits = shape.is_sound()
            && rows <= MOST_ROWS
            && call.weights.len() >= experts * Strips::of(Rows::GateUp, 2 * inner, hidden).bytes()
            && call.bias.len() >= experts * 2 * inner
            && call.h.len() >= rows * hidden
            && call.choice.len() >= rows * top_k
            && !call.live.is_empty()
            && call.a.len() >= rows * top_k * inner;
        if !fits {
            return Err(DeviceError::new(OP, format!("{rows} rows of {shape:?} do not fit")));
        }
        if rows == 0 {
            return Ok(());
        }
        let plan = plan(rows, &shape, device.facts(), alone);
        let arguments = Arguments {
            weights: call.weights.address(),
            bias: call.bias.address(),
            h: call.h.address(),
            choice: call.choice.address(),
            live: call.live.address(),
            a: call.a.address(),
            hidden: hidden as i32,
            inner: inner as i32,
            experts: experts as i32,
            top_k: top_k as i32,
            capacity: (rows * top_k) as i32,
            sums: plan.sums as i32,
            alpha: call.alpha,
            limit: call.limit,
        };
        let kernel = match plan.split {
            Split::Piece => &self.small,
            Split::PieceAlone => &self.few,
            Split::Pieces => &self.wide,
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
    fn two_blocks_of_few_rows_fit_a_multiprocessor() {
        for rows in 1..=8 {
            let plan = plan(rows, &CONTEXT_1, &facts(232_448), Some(false));
            assert!(plan.split == Split::Piece && plan.blocks == 132 && plan.warps == 16, "{plan}");
            assert!(2 * (plan.shared as usize + RESERVED) <= 228 * 1024, "{rows}: {plan}");
            // Eleven strips of four experts are a block's share of one row.
            assert!(plan.sums as usize >= if rows == 1 { 11 * 15 * 16 } else { 8 * 15 * 16 }, "{plan}");
        }
        assert_eq!(plan(9, &CONTEXT_1, &facts(232_448), None).split, Split::Strip);
    }

    #[test]
    fn there_is_room_for_one_strip_whatever_the_shape_and_device() {
        for shared in [101_376, 166_912, 232_448] {
            for (rows, top_k, hidden) in [(1, 1, 64), (8, 8, 8192), (8, 4, 2880), (3, 2, 8192)] {
                let shape = Shape { experts: 128, top_k, hidden, inner: 64 };
                let plan = plan(rows, &shape, &facts(shared), None);
                assert!(plan.sums as usize >= hidden.div_ceil(192) * 16 * (rows * top_k).min(8), "{plan}");
                assert!(plan.shared <= shared, "{shared}: {plan}");
            }
            let plan = plan(64, &CONTEXT_1, &facts(shared), None);
            assert!(plan.shared <= shared && (plan.split == Split::Strip) == (shared > 200_000), "{plan}");
        }
    }

    #[test]
    fn a_plan_can_be_read() {
        let plan = Plan { split: Split::Piece, blocks: 132, warps: 15, shared: 100_000, sums: 4096 };
        let words = "one piece a warp, 132 blocks of 15 warps, 100000 bytes shared, 4096 sums";
        assert_eq!(plan.to_string(), words);
    }
}
