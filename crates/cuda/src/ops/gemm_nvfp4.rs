//! Dense products of NVFP4 weights for more tokens than a matrix-vector kernel is made for.

use std::fmt;

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "gemm_nvfp4";
/// The file of the kernels for few tokens.
const FEW: &str = "gemm_nvfp4_few";
const STRIP_ROWS: usize = 16;
/// Rows of a quad, what a warpgroup multiplies at a time.
const QUAD_ROWS: usize = 64;
/// Bytes of 64 columns of a strip.
const TILE_BYTES: usize = 512 + 64;
/// Bytes of 64 columns of an activation row.
const LINE: usize = 128;
/// Bytes of the sums of 16 rows and 8 tokens, which blocks of a cluster send each other.
const PIECE: usize = 512;
/// Token tiles that are swept together.
const GROUP: usize = 8;

/// Tiles of 64 columns that L2 is told of where blocks walk by few tokens: more of them delay the tokens.
const AHEAD: usize = 12;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    w: u64,
    factors: u64,
    x: u64,
    y: u64,
    live: u64,
    cols: i32,
    rows: i32,
    capacity: i32,
    stride: i32,
    tokens: i32,
    output: i32,
    height: i32,
    group: i32,
    whole: i32,
    tail: i32,
    ahead: i32,
}

// SAFETY: mirrors `Params` of kernels/common/gemm_nvfp4.cuh.
unsafe impl Params for Arguments {}

/// What becomes of the sums, each times the factor of its row.
#[derive(Clone, Copy, Debug)]
pub enum Output<'a> {
    /// Stored as float32, row-major `[tokens, stride]`.
    F32(&'a Buffer<f32>),
    /// Added to what is there, float32 `[tokens, stride]`.
    Add(&'a Buffer<f32>),
    /// Rows are gates and ups: `silu(gate) * up`, bits of bf16, panel layout of `[capacity, rows / 2]`; `rows` is a multiple of 128.
    SwiGlu(&'a Buffer<u16>),
}

/// How blocks share a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    /// The blocks of a cluster share the columns of a tile of some quads (of 64 rows) by up to so many tokens.
    Few {
        /// Quads of a tile.
        quads: usize,
        /// Most tokens of a tile.
        tokens: usize,
        /// Blocks of a cluster.
        split: usize,
    },
    /// Blocks walk through tiles of four quads by up to 64 tokens.
    Low,
    /// Of three by up to 160.
    Middle,
    /// Of two by up to 256.
    High,
    /// Of two by 64, without Hopper's instructions.
    Portable,
}

/// How a call is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The kernel.
    pub spread: Spread,
    /// Tokens of a tile, a multiple of 8.
    pub height: usize,
    /// Where blocks walk: row tiles (the first ones) that are cut by `height`; the others are cut by `tail`.
    pub whole: usize,
    /// Tokens of a tile of the other row tiles, a multiple of 8.
    pub tail: usize,
    /// Where blocks walk: tiles of 64 columns of its first strip that each warp has L2 told of before the kernel before has ended.
    pub ahead: usize,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.spread {
            Spread::Few { quads, tokens, split } => write!(f, "{quads} x {tokens} / {split}"),
            spread if self.whole == usize::MAX => {
                write!(f, "{spread:?} {}, ahead {}", self.height, self.ahead)
            }
            spread => write!(f, "{spread:?} {}, after {} {}", self.height, self.whole, self.tail),
        }
    }
}

/// A kernel for few tokens: quads, tokens, blocks of a cluster, stages, and how many blocks a multiprocessor has room for.
struct Few {
    name: &'static str,
    quads: usize,
    tokens: usize,
    split: usize,
    stages: usize,
    blocks: usize,
}

const fn few(
    name: &'static str,
    quads: usize,
    tokens: usize,
    split: usize,
    stages: usize,
    blocks: usize,
) -> Few {
    Few { name, quads, tokens, split, stages, blocks }
}

const FEWS: [Few; 5] = [
    few("gemm_nvfp4_few_2x64_4", 2, 64, 4, 6, 2),
    few("gemm_nvfp4_few_3x64_2", 3, 64, 2, 14, 1),
    few("gemm_nvfp4_few_3x64_8", 3, 64, 8, 14, 1),
    few("gemm_nvfp4_few_3x128_4", 3, 128, 4, 6, 1),
    few("gemm_nvfp4_few_3x128_8", 3, 128, 8, 6, 1),
];

/// By output, then by the order of `Spread`'s last four.
const WALKS: [[&str; 4]; 3] = [
    ["gemm_nvfp4_f32_64", "gemm_nvfp4_f32_160", "gemm_nvfp4_f32_256", "gemm_nvfp4_f32_portable"],
    ["gemm_nvfp4_add_64", "gemm_nvfp4_add_160", "gemm_nvfp4_add_256", "gemm_nvfp4_add_portable"],
    ["gemm_nvfp4_swiglu_64", "gemm_nvfp4_swiglu_160", "gemm_nvfp4_swiglu_256", "gemm_nvfp4_swiglu_portable"],
];

impl Few {
    fn find(spread: Spread) -> Option<(usize, &'static Self)> {
        let Spread::Few { quads, tokens, split } = spread else { return None };
        FEWS.iter().enumerate().find(|(_, few)| (few.quads, few.tokens, few.split) == (quads, tokens, split))
    }

    fn shared(&self) -> usize {
        let pieces = (self.quads * 4 * self.tokens / 8).div_ceil(self.split);
        self.stages * self.tokens * LINE + self.split * pieces * PIECE
    }

    fn threads(&self) -> u32 {
        self.quads as u32 * 128
    }
}

impl Spread {
    /// Quads of a tile, most tokens.
    fn tile(self) -> (usize, usize) {
        match self {
            Self::Few { quads, tokens, .. } => (quads, tokens),
            Self::Low => (4, 64),
            Self::Middle => (3, 160),
            Self::High => (2, 256),
            Self::Portable => (2, 64),
        }
    }

    /// Where blocks walk: the place in [`WALKS`], stages, threads.
    fn walk(self) -> Option<(usize, usize, u32)> {
        match self {
            Self::Few { .. } => None,
            Self::Low => Some((0, 24, 640)),
            Self::Middle => Some((1, 11, 512)),
            Self::High => Some((2, 7, 384)),
            Self::Portable => Some((3, 4, 256)),
        }
    }
}

impl Plan {
    /// With the tallest tiles, all alike.
    pub fn of(spread: Spread) -> Self {
        let (_, height) = spread.tile();
        Self { spread, height, whole: usize::MAX, tail: height, ahead: 0 }
    }

    /// Row tiles that are cut by `height`, others, and tiles of all.
    fn tiles(&self, tokens: usize, rows: usize) -> (usize, usize, usize) {
        let (quads, _) = self.spread.tile();
        let row_tiles = rows.div_ceil(QUAD_ROWS * quads);
        let whole = self.whole.min(row_tiles);
        let (high, low) =
            (whole * tokens.div_ceil(self.height), (row_tiles - whole) * tokens.div_ceil(self.tail));
        (high, low, high + low)
    }

    /// About how long it takes in nanoseconds, by measurements on an H200.
    fn nanoseconds(&self, tokens: usize, rows: usize, cols: usize, multiprocessors: usize) -> usize {
        let (high, low, tiles) = self.tiles(tokens, rows);
        let (quads, most) = self.spread.tile();
        let steps = cols / 64;
        if let Some((_, few)) = Few::find(self.spread) {
            // Clusters that run side by side with one block to a multiprocessor.
            let whole =
                if few.split == 2 { multiprocessors / 2 } else { multiprocessors * 15 / 16 / few.split };
            let quad = cost(&[(32, 90), (64, 125), (96, 170), (128, 215)], tokens.min(most));
            let rounds = tiles.div_ceil(whole.max(1));
            let shared = rounds.min(few.blocks) + 2 * rounds.saturating_sub(few.blocks);
            return 4500 + shared * quads * steps.div_ceil(few.split) * quad;
        }
        let costs: &[(usize, usize)] = match self.spread {
            Spread::Low => &[(64, 117)],
            Spread::Middle => &[(32, 88), (48, 90), (64, 112), (96, 125), (128, 170), (160, 225)],
            _ => {
                &[(48, 127), (64, 140), (96, 160), (128, 185), (160, 222), (192, 255), (224, 300), (256, 345)]
            }
        };
        // Under a long load the clock falls, most where most is multiplied.
        let slower = |height: usize| if tokens > 4096 && height > 192 { 117 } else { 100 };
        let cost = |height: usize| cost(costs, height.min(tokens)) * slower(height) / 100;
        let of = |tiles: usize, height: usize| {
            tiles.div_ceil(multiprocessors) * (steps * quads * cost(height) + 400)
        };
        3500 + of(high, self.height) + of(low, self.tail)
    }
}

/// Nanoseconds of one quad by 64 columns and `tokens` tokens, from a list by most tokens.
fn cost(costs: &[(usize, usize)], tokens: usize) -> usize {
    costs.iter().find(|(most, _)| tokens <= *most).or(costs.last()).map_or(0, |&(_, cost)| cost)
}

/// The launch for a product on a Hopper device.
pub fn plan(tokens: usize, rows: usize, cols: usize, multiprocessors: usize) -> Plan {
    let heights: &[usize] = &[48, 64, 96, 128, 160, 192, 224, 256];
    let mut ways = Vec::new();
    if tokens <= 256 {
        ways.extend(GemmNvfp4::shared_ways().filter(|way| tokens > 64 || way.tile().1 == 64).map(Plan::of));
    }
    for spread in [Spread::Low, Spread::Middle, Spread::High] {
        let (quads, most) = spread.tile();
        let row_tiles = rows.div_ceil(QUAD_ROWS * quads);
        for &height in heights.iter().filter(|&&height| height == most || (height < most && tokens <= 4096)) {
            let ahead = if tokens <= 64 { AHEAD } else { 0 };
            let way = Plan { height, tail: height, ahead, ..Plan::of(spread) };
            ways.push(way);
            // Whole rounds of tall tiles, then lower ones.
            let columns = tokens.div_ceil(height);
            let whole = row_tiles * columns / multiprocessors * multiprocessors / columns;
            if tokens <= 4096 && whole > 0 && whole < row_tiles {
                ways.extend(heights.iter().filter(|&&tail| tail < height).map(|&tail| Plan {
                    whole,
                    tail,
                    ..way
                }));
            }
        }
    }
    let best = ways.into_iter().min_by_key(|way| way.nanoseconds(tokens, rows, cols, multiprocessors));
    best.unwrap_or(Plan::of(Spread::High))
}

/// The loaded kernels.
#[derive(Clone, Copy, Debug)]
pub struct GemmNvfp4 {
    few: [Option<Kernel>; FEWS.len()],
    /// By output, then spread.
    walks: [[Option<Kernel>; 4]; 3],
    portable: bool,
}

/// `y[token, row] (+)= factors[row] * sum over k of x[token, k] * w[row, k]`, float32 sums; rows in the order of the strips' rows.
#[derive(Debug)]
pub struct Call<'a> {
    /// NVFP4 strips of `[rows, cols]`.
    pub w: &'a Buffer<u8>,
    /// `[rows]`, in the order of the strips' rows.
    pub factors: &'a Buffer<f32>,
    /// Panel layout of `[capacity, cols]`, bits of bf16.
    pub x: &'a Buffer<u16>,
    /// The result.
    pub y: Output<'a>,
    /// One integer: tokens to do; later rows of `y` are left alone.
    pub live: &'a Buffer<i32>,
    /// Most tokens, which the grid is made for.
    pub tokens: usize,
    /// Elements summed over, a multiple of 64.
    pub cols: usize,
    /// Rows of `w`, a multiple of 16.
    pub rows: usize,
    /// Rows that panels are laid out for, a multiple of 8.
    pub capacity: usize,
    /// Elements between rows of a float32 `y`, at least `rows`.
    pub stride: usize,
}

impl GemmNvfp4 {
    /// Loads the kernels: those for Hopper, or the portable ones.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        Self::of(device, !device.facts().is_hopper())
    }

    /// Loads the kernels that run on every device.
    ///
    /// # Errors
    /// No code for this device.
    pub fn portable(device: &Device) -> Result<Self, DeviceError> {
        Self::of(device, true)
    }

    /// The ways in which blocks share columns.
    pub fn shared_ways() -> impl Iterator<Item = Spread> {
        FEWS.iter().map(|few| Spread::Few { quads: few.quads, tokens: few.tokens, split: few.split })
    }

    fn of(device: &Device, portable: bool) -> Result<Self, DeviceError> {
        let mut few = [None; FEWS.len()];
        if !portable {
            for (kernel, few) in few.iter_mut().zip(&FEWS) {
                *kernel = Some(device.kernel(FEW, few.name, few.shared())?);
            }
        }
        let mut walks = [[None; 4]; 3];
        for (kernels, names) in walks.iter_mut().zip(WALKS) {
            for spread in [Spread::Low, Spread::Middle, Spread::High, Spread::Portable] {
                let (Some((at, stages, _)), (_, tokens)) = (spread.walk(), spread.tile()) else { continue };
                if !portable || spread == Spread::Portable {
                    kernels[at] = Some(device.kernel(OP, names[at], stages * tokens * LINE)?);
                }
            }
        }
        Ok(Self { few, walks, portable })
    }

    /// Issues it, as [`plan`] says.
    ///
    /// # Errors
    /// Shapes or buffers that do not fit each other, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let plan = if self.portable {
            Plan::of(Spread::Portable)
        } else {
            plan(call.tokens, call.rows, call.cols, device.facts().multiprocessors as usize)
        };
        self.issue_as(device, call, plan)
    }

    /// Issues it in a given way.
    ///
    /// # Errors
    /// Shapes or buffers that do not fit each other, a kernel that was not loaded, or a device fault.
    pub fn issue_as(&self, device: &Device, call: &Call<'_>, plan: Plan) -> Result<(), DeviceError> {
        let Call { tokens, cols, rows, capacity, stride, .. } = *call;
        let dense = tokens.saturating_sub(1) * stride + rows;
        let (output, y, len, wanted) = match call.y {
            Output::F32(y) => (0, y.address(), y.len(), dense),
            Output::Add(y) => (1, y.address(), y.len(), dense),
            Output::SwiGlu(y) => (2, y.address(), y.len(), capacity * (rows / 2)),
        };
        let (_, most) = plan.spread.tile();
        let takes = |height: usize| height > 0 && height <= most && height.is_multiple_of(8);
        let fits = takes(plan.height)
            && takes(plan.tail)
            && cols > 0
            && cols.is_multiple_of(64)
            && rows > 0
            && rows.is_multiple_of(if output == 2 { 128 } else { STRIP_ROWS })
            && capacity.is_multiple_of(8)
            && tokens <= capacity
            && (output == 2 || rows <= stride)
            && call.w.len() >= rows / STRIP_ROWS * (cols / 64) * TILE_BYTES
            && call.factors.len() >= rows
            && call.x.len() >= capacity * cols
            && !call.live.is_empty()
            && len >= wanted;
        if !fits {
            let what = format!("{tokens} tokens of {cols} by {rows} rows do not fit the buffers");
            return Err(DeviceError::new(OP, what));
        }
        if tokens == 0 {
            return Ok(());
        }
        let multiprocessors = device.facts().multiprocessors as usize;
        let (_, _, tiles) = plan.tiles(tokens, rows);
        let few = Few::find(plan.spread);
        let (kernel, blocks, block, shared) = match (few, plan.spread.walk()) {
            (Some((at, few)), _) => (self.few[at], few.split * tiles, few.threads(), few.shared()),
            (None, Some((at, stages, threads))) => {
                let room =
                    if plan.spread == Spread::Portable { 2 * multiprocessors } else { multiprocessors };
                (self.walks[output as usize][at], tiles.min(room), threads, stages * most * LINE)
            }
            (None, None) => (None, 0, 0, 0),
        };
        let Some(kernel) = kernel else {
            return Err(DeviceError::new(OP, format!("the kernels for {plan} are not loaded")));
        };
        let arguments = Arguments {
            w: call.w.address(),
            factors: call.factors.address(),
            x: call.x.address(),
            y,
            live: call.live.address(),
            cols: cols as i32,
            rows: rows as i32,
            capacity: capacity as i32,
            stride: stride as i32,
            tokens: tokens as i32,
            output,
            height: plan.height as i32,
            group: GROUP as i32,
            whole: plan.whole.min(i32::MAX as usize) as i32,
            tail: plan.tail as i32,
            ahead: plan.ahead.min(i32::MAX as usize) as i32,
        };
        let shape = Launch { grid: [blocks as u32, 1, 1], block, shared: shared as u32, overlap: true };
        // SAFETY: every buffer was checked to be large enough for the shapes.
        unsafe { device.launch(&kernel, &shape, &arguments) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_is_planned_covers_every_tile() {
        for rows in [128, 2560, 6144, 19_456, 1 << 18] {
            for cols in [64, 2560, 9728] {
                for tokens in [1, 17, 64, 65, 200, 256, 257, 1000, 2048, 8192] {
                    let plan = plan(tokens, rows, cols, 132);
                    let (_, most) = plan.spread.tile();
                    assert!(plan.height <= most && plan.tail <= most, "{plan}");
                    assert!(Few::find(plan.spread).is_some() != plan.spread.walk().is_some(), "{plan}");
                }
            }
        }
    }

    #[test]
    fn few_tokens_share_columns_and_many_take_tall_tiles() {
        let plan = |tokens, rows, cols| super::plan(tokens, rows, cols, 132);
        assert!(matches!(plan(64, 2560, 9728).spread, Spread::Few { tokens: 64, .. }));
        assert!(matches!(plan(100, 2560, 4096).spread, Spread::Few { tokens: 128, .. }));
        assert_eq!(plan(8192, 2560, 9728), Plan::of(Spread::High));
        assert_eq!(plan(8192, 6144, 2560), Plan::of(Spread::Middle));
    }
}
