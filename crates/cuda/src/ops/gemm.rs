//! Dense products of bf16 operands for more tokens than a matrix-vector kernel is made for.

use std::fmt;

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "gemm";
/// The file of the kernels for few tokens.
const FEW: &str = "gemm_few";
/// Weight rows of a tile, and of one of few tokens.
const ROWS: usize = 128;
const FEW_ROWS: usize = 96;
/// Blocks that share the sum of a tile of few tokens.
const SPLIT: usize = 4;
/// Token tiles that are swept together.
const GROUP: usize = 8;
/// What a multiprocessor gets out of L2 when all ask.
const L2_BYTES_A_CYCLE: usize = 58;
/// Shared memory in which the two warpgroups of a block stage outputs.
const STAGING: usize = 2 * 64 * 68 * 4;
/// Bytes of a step of 64 of one row.
const LINE: usize = 128;
/// Kinds of output.
const OUTPUTS: usize = 5;
/// By output, then by the order of [`Spread::ALL`].
const KERNELS: [[&str; 5]; OUTPUTS] = [
    ["gemm_few_f32_64", "gemm_few_f32_128", "gemm_f32_128", "gemm_f32_256", "gemm_f32_portable"],
    ["gemm_few_bf16_64", "gemm_few_bf16_128", "gemm_bf16_128", "gemm_bf16_256", "gemm_bf16_portable"],
    ["gemm_few_add_64", "gemm_few_add_128", "gemm_add_128", "gemm_add_256", "gemm_add_portable"],
    [
        "gemm_few_swiglu_64",
        "gemm_few_swiglu_128",
        "gemm_swiglu_128",
        "gemm_swiglu_256",
        "gemm_swiglu_portable",
    ],
    ["gemm_few_qkv_64", "gemm_few_qkv_128", "gemm_qkv_128", "gemm_qkv_256", "gemm_qkv_portable"],
];

/// What both files' parameters begin with.
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

/// `Heads` of kernels/common/dense.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct HeadArguments {
    kv: u64,
    turns: u64,
    q_width: i32,
    kv_width: i32,
    head_dim: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct WalkArguments {
    common: Arguments,
    group: i32,
    height: i32,
    heads: HeadArguments,
}

// SAFETY: mirrors `Params` of kernels/gemm.cu.
unsafe impl Params for WalkArguments {}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct FewArguments {
    common: Arguments,
    launch: i32,
    heads: HeadArguments,
}

// SAFETY: mirrors `Params` of kernels/gemm_few.cu.
unsafe impl Params for FewArguments {}

/// Where the sums go.
#[derive(Clone, Copy, Debug)]
pub enum Output<'a> {
    /// `[tokens, stride]`, stored as float32.
    F32(&'a Buffer<f32>),
    /// `[tokens, stride]`, stored as bits of bf16; `outs` and `stride` even.
    Bf16(&'a Buffer<u16>),
    /// `[tokens, stride]`, added to what is there.
    Add(&'a Buffer<f32>),
    /// `silu(gate) * up`, bits of bf16 in panel layout of `[capacity, outs / 2]`. Of every 16 weight rows the first eight are gates, the
    /// others the ups. `outs` is `w_rows`, a multiple of 128. `stride` means nothing.
    SwiGlu(&'a Buffer<u16>),
    /// Queries and keys are rotated. `outs` is `w_rows`, all heads. `stride` means nothing.
    Qkv(Heads<'a>),
}

/// Where queries, keys and values go. Weight rows are in the order of kernels/README.md, "QKV rows".
#[derive(Clone, Copy, Debug)]
pub struct Heads<'a> {
    /// `[tokens, q_width]`, bits of bf16: queries, rotated, in natural order.
    pub q: &'a Buffer<u16>,
    /// `[tokens, 2 * kv_width]`: keys, rotated, in natural order, then values.
    pub kv: &'a Buffer<f32>,
    /// `[tokens, head_dim / 2, 2]`, of `rope_table`.
    pub turns: &'a Buffer<f32>,
    /// Query heads times `head_dim`.
    pub q_width: usize,
    /// Key/value heads times `head_dim`.
    pub kv_width: usize,
    /// Elements of a head, a multiple of 16.
    pub head_dim: usize,
}

impl Heads<'_> {
    fn fits(&self, tokens: usize, outs: usize) -> bool {
        let Self { q_width, kv_width, head_dim, .. } = *self;
        head_dim > 0
            && head_dim.is_multiple_of(16)
            && q_width.is_multiple_of(head_dim)
            && kv_width.is_multiple_of(head_dim)
            && outs == q_width + 2 * kv_width
            && self.q.len() >= tokens * q_width
            && self.kv.len() >= tokens * 2 * kv_width
            && self.turns.len() >= tokens * head_dim
    }

    fn arguments(&self) -> HeadArguments {
        HeadArguments {
            kv: self.kv.address(),
            turns: self.turns.address(),
            q_width: self.q_width as i32,
            kv_width: self.kv_width as i32,
            head_dim: self.head_dim as i32,
        }
    }
}

/// How a product is spread over the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    /// Tiles of 96 weight rows by 64 tokens, each the work of four blocks that share its sum.
    Few64,
    /// The same by 128 tokens.
    Few128,
    /// Blocks walk through tiles of 128 by 128.
    Narrow,
    /// By 256.
    Wide,
    /// By 64, without Hopper's instructions.
    Portable,
}

/// How a call is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The kernel.
    pub spread: Spread,
    /// Tokens of a tile: one of `HEIGHTS`, at most the kernel's, which those whose blocks walk through tiles leave open.
    pub height: usize,
    /// Token tiles that are swept together, where blocks walk.
    pub group: usize,
    /// Of few tokens, the next kernel may start when this many steps of weights have not been asked for.
    pub launch: usize,
}

/// Tokens that tiles may have.
const HEIGHTS: [usize; 6] = [64, 128, 176, 192, 208, 256];

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}, groups of {}, launch at {}", self.spread, self.height, self.group, self.launch)
    }
}

impl Spread {
    const ALL: [Self; 5] = [Self::Few64, Self::Few128, Self::Narrow, Self::Wide, Self::Portable];

    /// Tokens of a tile, weight rows, stages.
    fn tile(self) -> (usize, usize, usize) {
        match self {
            Self::Few64 => (64, FEW_ROWS, 5),
            Self::Few128 => (128, FEW_ROWS, 4),
            Self::Narrow => (128, ROWS, 6),
            Self::Wide => (256, ROWS, 4),
            Self::Portable => (64, ROWS, 3),
        }
    }

    fn is_few(self) -> bool {
        matches!(self, Self::Few64 | Self::Few128)
    }

    fn shared(self) -> usize {
        let (tokens, rows, stages) = self.tile();
        stages * (rows + tokens) * LINE + if matches!(self, Self::Narrow | Self::Wide) { STAGING } else { 0 }
    }

    fn threads(self) -> u32 {
        match self {
            Self::Few64 | Self::Few128 => 288,
            Self::Narrow | Self::Wide => 384,
            Self::Portable => 256,
        }
    }

    /// Whether its tiles may be lower than it has room for.
    fn takes(self, height: usize) -> bool {
        let (tokens, ..) = self.tile();
        let walks = matches!(self, Self::Narrow | Self::Wide);
        height == tokens || (walks && height < tokens && HEIGHTS.contains(&height))
    }
}

impl Plan {
    /// With the tallest tiles.
    pub fn of(spread: Spread) -> Self {
        let (height, ..) = spread.tile();
        Self { spread, height, group: GROUP, launch: 0 }
    }

    /// Blocks for a product.
    fn blocks(&self, tokens: usize, w_rows: usize, multiprocessors: usize) -> usize {
        let (_, rows, _) = self.spread.tile();
        let tiles = w_rows.div_ceil(rows) * tokens.div_ceil(self.height);
        match self.spread {
            Spread::Few64 | Spread::Few128 => SPLIT * tiles,
            Spread::Narrow | Spread::Wide => tiles.min(multiprocessors),
            Spread::Portable => tiles.min(2 * multiprocessors),
        }
    }

    /// About how long it takes, in cycles, where blocks walk through tiles.
    fn cycles(&self, tokens: usize, w_rows: usize, cols: usize, multiprocessors: usize) -> usize {
        let rounds = (w_rows.div_ceil(ROWS) * tokens.div_ceil(self.height)).div_ceil(multiprocessors);
        // A step of 64 is bound by the tensor core (4 cycles a token) or by what a multiprocessor gets out of L2.
        let step = (4 * self.height).max((ROWS + self.height) * LINE / L2_BYTES_A_CYCLE);
        rounds * (cols / 64 * step + 12 * self.height)
    }
}

/// The launch for a product on a Hopper device.
pub fn plan(tokens: usize, w_rows: usize, cols: usize, multiprocessors: usize) -> Plan {
    // Sharing sums is worth it as long as all blocks run at once, two to a multiprocessor. With one to each, those of the next kernel
    // find room beside them and may come sooner.
    let few = Plan::of(if tokens <= 64 { Spread::Few64 } else { Spread::Few128 });
    let blocks = few.blocks(tokens, w_rows, multiprocessors);
    if tokens <= 256 && blocks <= 2 * multiprocessors {
        let launch = if tokens <= 64 && blocks <= multiprocessors { 3 } else { 0 };
        return Plan { launch, ..few };
    }
    let narrow = Plan::of(Spread::Narrow);
    if tokens <= narrow.height {
        return narrow;
    }
    let wide = Plan::of(Spread::Wide);
    let lower = |height| Plan { height, ..wide };
    // Of many tokens the lowest tiles took longer than their rounds say.
    let ways = [wide, lower(192), narrow, lower(208), lower(176)];
    let ways = &ways[..if tokens <= 2048 { 5 } else { 3 }];
    ways.iter().copied().min_by_key(|way| way.cycles(tokens, w_rows, cols, multiprocessors)).unwrap_or(wide)
}

/// The loaded kernels.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// By output, then by the order of [`Spread::ALL`]; the portable ones only, where there are no others.
    kernels: [[Option<Kernel>; 5]; OUTPUTS],
    portable: bool,
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
    /// The result.
    pub y: Output<'a>,
    /// One integer: tokens to do; later rows of `y` are left alone.
    pub live: &'a Buffer<i32>,
    /// Most tokens, which the grid is made for.
    pub tokens: usize,
    /// Elements summed over, a multiple of 64.
    pub cols: usize,
    /// Rows of `w`, a multiple of 8.
    pub w_rows: usize,
    /// Weight rows whose sums are wanted, at most `w_rows`.
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
        Self::of(device, !device.facts().is_hopper())
    }

    /// Loads the kernels that run on every device.
    ///
    /// # Errors
    /// No code for this device.
    pub fn portable(device: &Device) -> Result<Self, DeviceError> {
        Self::of(device, true)
    }

    fn of(device: &Device, portable: bool) -> Result<Self, DeviceError> {
        let mut kernels = [[None; 5]; OUTPUTS];
        for (kernels, names) in kernels.iter_mut().zip(KERNELS) {
            for ((kernel, name), spread) in kernels.iter_mut().zip(names).zip(Spread::ALL) {
                if !portable || spread == Spread::Portable {
                    let file = if spread.is_few() { FEW } else { OP };
                    *kernel = Some(device.kernel(file, name, spread.shared())?);
                }
            }
        }
        Ok(Self { kernels, portable })
    }

    /// Issues it, as [`plan`] says.
    ///
    /// # Errors
    /// Shapes or buffers that do not fit each other, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let plan = if self.portable {
            Plan::of(Spread::Portable)
        } else {
            plan(call.tokens, call.w_rows, call.cols, device.facts().multiprocessors as usize)
        };
        self.issue_as(device, call, plan)
    }

    /// Issues it in a given way.
    ///
    /// # Errors
    /// Shapes or buffers that do not fit each other, a kernel that was not loaded, or a device fault.
    pub fn issue_as(&self, device: &Device, call: &Call<'_>, plan: Plan) -> Result<(), DeviceError> {
        let Call { tokens, cols, w_rows, outs, capacity, stride, .. } = *call;
        let most = if tokens == 0 { 0 } else { (tokens - 1) * stride + outs };
        let rows = outs <= w_rows && outs <= stride;
        let (output, y, holds) = match call.y {
            Output::F32(y) => (0, y.address(), rows && y.len() >= most),
            Output::Bf16(y) => {
                let even = outs.is_multiple_of(2) && stride.is_multiple_of(2);
                (1, y.address(), rows && even && y.len() >= most)
            }
            Output::Add(y) => (2, y.address(), rows && y.len() >= most),
            Output::SwiGlu(y) => {
                let whole = outs == w_rows && outs.is_multiple_of(128);
                (3, y.address(), whole && y.len() >= capacity * outs / 2)
            }
            Output::Qkv(heads) => (4, heads.q.address(), outs == w_rows && heads.fits(tokens, outs)),
        };
        let heads =
            if let Output::Qkv(heads) = call.y { heads.arguments() } else { HeadArguments::default() };
        let fits = holds
            && plan.spread.takes(plan.height)
            && cols.is_multiple_of(64)
            && cols > 0
            && w_rows.is_multiple_of(8)
            && capacity.is_multiple_of(8)
            && tokens <= capacity
            && call.w.len() >= w_rows * cols
            && call.x.len() >= capacity * cols
            && call.bias.is_none_or(|bias| bias.len() >= outs)
            && !call.live.is_empty();
        if !fits {
            let what = format!("{tokens} tokens of {cols} by {w_rows} rows do not fit the buffers");
            return Err(DeviceError::new(OP, what));
        }
        if tokens == 0 {
            return Ok(());
        }
        let Plan { spread, height, group, launch } = plan;
        let Some(kernel) = &self.kernels[output][spread as usize] else {
            return Err(DeviceError::new(OP, format!("the kernels for {plan} are not loaded")));
        };
        let blocks = plan.blocks(tokens, w_rows, device.facts().multiprocessors as usize);
        let common = Arguments {
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
        let shape = Launch {
            grid: [blocks as u32, 1, 1],
            block: spread.threads(),
            shared: spread.shared() as u32,
            overlap: true,
        };
        if spread.is_few() {
            let arguments = FewArguments { common, launch: launch as i32, heads };
            // SAFETY: every buffer was checked to be large enough for the shapes.
            return unsafe { device.launch(kernel, &shape, &arguments) };
        }
        let arguments = WalkArguments { common, group: group.max(1) as i32, height: height as i32, heads };
        // SAFETY: every buffer was checked to be large enough for the shapes.
        unsafe { device.launch(kernel, &shape, &arguments) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_tokens_share_sums_and_many_take_whole_tiles() {
        let plan = |tokens, w_rows, cols| super::plan(tokens, w_rows, cols, 132);
        assert_eq!(plan(17, 5120, 2880), Plan::of(Spread::Few64));
        assert_eq!(plan(64, 2880, 4096), Plan { launch: 3, ..Plan::of(Spread::Few64) });
        assert_eq!(plan(65, 5120, 2880), Plan::of(Spread::Few128));
        assert_eq!(plan(64, 201_088, 2880), Plan::of(Spread::Narrow));
        assert_eq!(plan(8192, 5120, 2880), Plan::of(Spread::Wide));
        assert_eq!(plan(256, 5120, 2880).spread, Spread::Narrow);
        // 92 tiles of 256 tokens leave multiprocessors idle; 115 lower ones take one round as well.
        assert_eq!(plan(1024, 2880, 4096).height, 208);
        // 184 tiles of 256 tokens would take two rounds of 132; so do 253 lower ones.
        assert_eq!(plan(2048, 2880, 4096).height, 192);
        assert_eq!(Plan::of(Spread::Few64).blocks(17, 2880, 132), 120);
    }

    #[test]
    fn kernels_are_in_the_order_of_spreads() {
        assert!(Spread::ALL.iter().enumerate().all(|(at, &spread)| spread as usize == at));
    }
}
