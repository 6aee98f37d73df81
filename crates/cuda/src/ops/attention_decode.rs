//! Attention of rows that are one new token of a sequence each.

use ctxserve_backend::DeviceError;

use super::attention::{
    Cache, CacheArguments, HEAD_DIM, HeadNorms, MOST_GROUP, NormsArguments, Tables, TablesArguments,
    kernel_of,
};
use crate::driver::{Buffer, Device, Facts, Kernel, Launch, Params};

const OP: &str = "attention_decode";
const STAGES: usize = 3;
/// Floats of a cluster's part of the results of a row and key/value head.
const fn partial(head_dim: usize) -> usize {
    MOST_GROUP * (head_dim + 2)
}
/// Splits that any number of rows may use; `Workspace` has room for them.
const MANY_ROWS: usize = 4;
/// Blocks of a large cluster.
const CLUSTER: usize = 8;
const LOG2_E: f32 = std::f32::consts::LOG2_E;

/// `Raw` of kernels/common/attention_decode.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct RawArguments {
    qkv: u64,
    inv_freq: u64,
    norms: NormsArguments,
    mscale: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    q: u64,
    kv: u64,
    raw: RawArguments,
    cache: CacheArguments,
    tables: TablesArguments,
    position: u64,
    slot: u64,
    live: u64,
    sinks: u64,
    out: u64,
    partial: u64,
    arrived: u64,
    group: i32,
    capacity: i32,
    depth_shift: i32,
    scale: f32,
}

// SAFETY: mirrors `Params` of kernels/attention_decode.cu.
unsafe impl Params for Arguments {}

/// Which kernel, and when it uses more of its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Warps of a block.
    pub warps: usize,
    /// Blocks of a cluster: 1, 2 or 8.
    pub cluster: usize,
    /// log2 of the tiles that each warp of a cluster has before another cluster takes part.
    pub depth_shift: usize,
}

impl Shape {
    /// The kernel for `splits` blocks a row and key/value head of which there are `pairs`.
    pub fn of(pairs: usize, splits: usize, facts: &Facts) -> Self {
        let blocks = BLOCKS * facts.multiprocessors as usize;
        let clusters = facts.capability >= (9, 0);
        if clusters && splits.is_multiple_of(CLUSTER) {
            return Self { warps: 8, cluster: CLUSTER, depth_shift: 2 };
        }
        if clusters && splits.is_multiple_of(2) && pairs * 2 <= blocks {
            return Self { warps: 8, cluster: 2, depth_shift: 2 };
        }
        let warps = if pairs <= blocks { 8 } else { 4 };
        // Without clusters blocks meet in global memory, which only longer rows are worth, or blocks that would be idle.
        let depth_shift = match warps {
            4 => 5,
            _ if pairs * CLUSTER <= blocks => 1,
            _ if pairs * 2 <= blocks => 2,
            _ => 4,
        };
        Self { warps, cluster: 1, depth_shift }
    }

    /// Bytes of shared memory of a block: stages of 32 keys and values of 64 bytes, or of 16 longer ones, and their scales.
    fn shared(self, head_dim: usize, fp8: bool) -> usize {
        let line = head_dim * if fp8 { 1 } else { 2 };
        let keys = if line == 64 { 32 } else { 16 };
        self.warps * STAGES * 2 * keys * (line + if fp8 { 4 } else { 0 })
    }
}

/// The loaded kernels, each for e4m3 and for bf16.
#[derive(Clone, Copy, Debug)]
pub struct AttentionDecode {
    four: [Kernel; 2],
    eight: [Kernel; 2],
    clusters: Option<[[Kernel; 2]; 2]>,
    head_dim: usize,
}

/// Memory in which the parts of a row's result meet. One launch at a time uses it.
#[derive(Debug)]
pub struct Workspace {
    partial: Buffer<f32>,
    arrived: Buffer<i32>,
}

impl Workspace {
    /// Room for up to `rows` rows of `kv_heads` in the [`splits`] of any number of rows, or in `splits` parts if those are more.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(device: &Device, rows: usize, kv_heads: usize, splits: usize) -> Result<Self, DeviceError> {
        Self::new_for(device, HEAD_DIM, rows, kv_heads, splits)
    }

    /// The same for heads of `head_dim` elements.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new_for(
        device: &Device,
        head_dim: usize,
        rows: usize,
        kv_heads: usize,
        splits: usize,
    ) -> Result<Self, DeviceError> {
        let pairs = rows * kv_heads;
        Ok(Self {
            partial: device.allocate(pairs * splits.max(MANY_ROWS) * partial(head_dim))?,
            arrived: device.zeros(pairs * MOST_GROUP)?,
        })
    }

    /// Bytes that `new` takes.
    pub fn bytes(rows: usize, kv_heads: usize, splits: usize) -> usize {
        Self::bytes_for(HEAD_DIM, rows, kv_heads, splits)
    }

    /// Bytes that `new_for` takes.
    pub fn bytes_for(head_dim: usize, rows: usize, kv_heads: usize, splits: usize) -> usize {
        rows * kv_heads * 4 * (MOST_GROUP + splits.max(MANY_ROWS) * partial(head_dim))
    }
}

/// What comes to attention: queries, and the new tokens where the cache does not have them yet.
#[derive(Clone, Copy, Debug)]
pub enum Queries<'a> {
    /// Ready for the product with keys.
    Rotated {
        /// `[rows, heads * head_dim]`, bits of bf16, rotated.
        q: &'a Buffer<u16>,
        /// `[rows, 2 * kv_heads * head_dim]`: rotated keys, then values. Absent: they are in the cache.
        kv: Option<&'a Buffer<f32>>,
    },
    /// As the QKV product leaves them. Queries are rounded and tokens appended as `kv_append` does it, bit for bit.
    Raw {
        /// `[rows, (heads + 2 * kv_heads) * head_dim]`; in q and k heads the elements `i` and `i + head_dim / 2` are adjacent.
        qkv: &'a Buffer<f32>,
        /// What q and k heads are normed with before they are rotated.
        norms: Option<HeadNorms<'a>>,
        /// `head_dim / 2` frequencies.
        inv_freq: &'a Buffer<f32>,
        /// Multiplies cosine and sine.
        mscale: f32,
    },
}

impl Queries<'_> {
    fn fit(&self, rows: usize, heads: usize, kv_heads: usize, head_dim: usize) -> bool {
        match *self {
            Self::Rotated { q, kv } => {
                q.len() >= rows * heads * head_dim
                    && kv.is_none_or(|kv| kv.len() >= rows * 2 * kv_heads * head_dim)
            }
            Self::Raw { qkv, norms, inv_freq, .. } => {
                qkv.len() >= rows * (heads + 2 * kv_heads) * head_dim
                    && inv_freq.len() >= head_dim / 2
                    && norms.is_none_or(|norms| norms.fit(head_dim))
            }
        }
    }

    /// Addresses of queries and tokens, where they are rotated, and of what is not.
    fn arguments(&self) -> (u64, u64, RawArguments) {
        match *self {
            Self::Rotated { q, kv } => {
                let raw =
                    RawArguments { qkv: 0, inv_freq: 0, norms: HeadNorms::arguments(None), mscale: 0.0 };
                (q.address(), kv.map_or(0, Buffer::address), raw)
            }
            Self::Raw { qkv, norms, inv_freq, mscale } => {
                let (qkv, inv_freq) = (qkv.address(), inv_freq.address());
                (0, 0, RawArguments { qkv, inv_freq, norms: HeadNorms::arguments(norms), mscale })
            }
        }
    }
}

/// Appends each row's key and value to the cache, then attends over what the row sees.
#[derive(Debug)]
pub struct Call<'a> {
    /// Queries and new tokens.
    pub queries: Queries<'a>,
    /// The layer's cache.
    pub cache: Cache,
    /// Row `r` is sequence `r`.
    pub tables: Tables<'a>,
    /// Position of each row.
    pub position: &'a Buffer<i32>,
    /// `page * page_size + offset` of each row's new token; negative: it is not stored.
    pub slot: &'a Buffer<i32>,
    /// One integer: rows to do.
    pub live: &'a Buffer<i32>,
    /// A logit for each query head that joins the denominator.
    pub sinks: Option<&'a Buffer<f32>>,
    /// Bits of bf16 `[rows, heads * head_dim]`: row-major, or panels of `capacity` rows.
    pub out: &'a Buffer<u16>,
    /// Made for at least these rows, heads and splits.
    pub workspace: &'a Workspace,
    /// Most rows, which the grid is made for.
    pub rows: usize,
    /// Query heads.
    pub heads: usize,
    /// Blocks that may share a row's positions; see [`splits`].
    pub splits: usize,
    /// Rows that the panels of `out` are laid out for, a multiple of 8; absent: row-major.
    pub capacity: Option<usize>,
    /// Multiplies the scores.
    pub scale: f32,
}

/// Blocks on a multiprocessor when few rows are live.
const BLOCKS: usize = 2;

/// Blocks that may share a row and key/value head when `rows` rows are live. Rows that are short use fewer.
pub fn splits(rows: usize, cache: &Cache, multiprocessors: usize) -> usize {
    const MOST: usize = 64;
    // One block covers a window.
    if cache.window.is_some_and(|window| window <= 512) {
        return 1;
    }
    let (pairs, blocks) = ((rows * cache.kv_heads).max(1), BLOCKS * multiprocessors);
    // Large clusters do not fit everywhere on a device: a fifth of it is left to chance.
    let large = blocks * 4 / 5 / pairs / CLUSTER * CLUSTER;
    if large > 0 {
        return large.min(MOST);
    }
    // Blocks that rows have no use for still come and go: the more rows, the fewer of them.
    let small = (blocks / pairs / 2 * 2).max(if pairs <= 4 * blocks { MANY_ROWS } else { 2 });
    if small.is_multiple_of(CLUSTER) { small - 2 } else { small }
}

impl AttentionDecode {
    /// Loads the kernels for heads of 64 elements.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        Self::load_for(device, HEAD_DIM)
    }

    /// Loads the kernels for heads of so many elements.
    ///
    /// # Errors
    /// Heads that there are no kernels for, or no code for this device.
    pub fn load_for(device: &Device, head_dim: usize) -> Result<Self, DeviceError> {
        let load = |names: [[&'static str; 2]; 2], warps: usize| {
            let shape = Shape { warps, cluster: 1, depth_shift: 0 };
            let [e4m3, bf16] = names;
            let kernel =
                |names, fp8| device.kernel(OP, kernel_of(OP, head_dim, names)?, shape.shared(head_dim, fp8));
            Ok([kernel(e4m3, true)?, kernel(bf16, false)?])
        };
        macro_rules! names {
            ($suffix:literal) => {
                [
                    [
                        concat!("attention_decode_e4m3_", $suffix),
                        concat!("attention_decode_e4m3_128_", $suffix),
                    ],
                    [
                        concat!("attention_decode_bf16_", $suffix),
                        concat!("attention_decode_bf16_128_", $suffix),
                    ],
                ]
            };
        }
        let clusters = if device.facts().capability >= (9, 0) {
            Some([load(names!("cluster_2"), 8)?, load(names!("cluster_8"), 8)?])
        } else {
            None
        };
        Ok(Self { four: load(names!("4"), 4)?, eight: load(names!("8"), 8)?, clusters, head_dim })
    }

    fn kernel(&self, shape: Shape) -> &[Kernel; 2] {
        match (&self.clusters, shape.cluster) {
            (Some([two, _]), 2) => two,
            (Some([_, eight]), CLUSTER) => eight,
            _ if shape.warps == 4 => &self.four,
            _ => &self.eight,
        }
    }

    /// Issues it.
    ///
    /// # Errors
    /// Buffers that are too small, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let Call { rows, heads, splits, cache, workspace, .. } = *call;
        let (kv_heads, head_dim) = (cache.kv_heads, self.head_dim);
        let arguments = cache.arguments(OP)?;
        let fp8 = cache.is_fp8();
        let shape = Shape::of(rows * kv_heads, splits, device.facts());
        let width = heads * head_dim;
        let clusters = splits / shape.cluster;
        let parts = if clusters > 1 { rows * kv_heads * clusters * partial(head_dim) } else { 0 };
        let fits = heads.is_multiple_of(kv_heads)
            && (1..=MOST_GROUP).contains(&(heads / kv_heads))
            && (1..=65_535).contains(&rows)
            && splits >= 1
            && call.queries.fit(rows, heads, kv_heads, head_dim)
            && call.tables.holds(rows)
            && call.position.len() >= rows
            && call.slot.len() >= rows
            && !call.live.is_empty()
            && call.sinks.is_none_or(|sinks| sinks.len() >= heads)
            && call.capacity.is_none_or(|capacity| capacity.is_multiple_of(8) && capacity >= rows)
            && call.out.len() >= call.capacity.unwrap_or(rows) * width
            && workspace.partial.len() >= parts
            && workspace.arrived.len() >= rows * kv_heads * MOST_GROUP;
        if !fits {
            let what = format!("{rows} rows of {heads} heads over {kv_heads} do not fit their buffers");
            return Err(DeviceError::new(OP, what));
        }
        let (q, kv, raw) = call.queries.arguments();
        let arguments = Arguments {
            q,
            kv,
            raw,
            cache: arguments,
            tables: call.tables.arguments(),
            position: call.position.address(),
            slot: call.slot.address(),
            live: call.live.address(),
            sinks: call.sinks.map_or(0, Buffer::address),
            out: call.out.address(),
            partial: workspace.partial.address(),
            arrived: workspace.arrived.address(),
            group: (heads / kv_heads) as i32,
            capacity: call.capacity.unwrap_or(0) as i32,
            depth_shift: shape.depth_shift as i32,
            scale: call.scale * LOG2_E,
        };
        let kernel = &self.kernel(shape)[usize::from(!fp8)];
        let launch = Launch {
            grid: [(shape.cluster * kv_heads) as u32, rows as u32, clusters as u32],
            block: shape.warps as u32 * 32,
            shared: shape.shared(head_dim, fp8) as u32,
            overlap: true,
        };
        // SAFETY: every buffer was checked to be large enough; pages and slots are inside the cache by the caller's plan.
        unsafe { device.launch(kernel, &launch, &arguments) }
    }
}
