//! Memory for what flows between ops: taken once, at fixed addresses, so that recorded launches stay valid.

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Facts};
use crate::ops::attention::{Cache, HEAD_DIM, HEAD_DIMS};
use crate::ops::attention_decode::{self, splits};
use crate::ops::gemv_nvfp4;
use crate::ops::kv_gather::LINES;
use crate::ops::moe_sort;
use crate::step::Capacity;
use crate::weights::PANEL;

/// Rows that the matrix-vector kernels take; more go through the matrix products.
pub(crate) const GEMV_ROWS: usize = 16;
/// The same in NVFP4: the four products of a layer of Qwen3's 4B take 39 us of 8 rows, and of 16 rows 63 where matrix products take 40.
const GEMV_ROWS_NVFP4: usize = 8;
/// Widest input of the matrix-vector kernels.
const GEMV_COLS: usize = 16_384;
/// Rows whose experts go through the kernels that stream weights. At 64 rows they take 130 us on an H200 where the products of sorted
/// rows and what goes with them take 192; at 96, 150 us.
pub(crate) const EXPERT_ROWS: usize = 64;
/// Sorted rows of a tile, at the least: bounds the number of tiles.
const LEAST_HEIGHT: usize = 16;

/// Widths of a model, padded as the kernels want them. Grows as weights are loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Widths {
    /// The residual stream.
    pub hidden: usize,
    /// Query heads, a layer's most.
    pub heads: usize,
    /// Key/value heads, a layer's most.
    pub kv_heads: usize,
    /// Elements of a head, as the model has it.
    pub head_dim: usize,
    /// Experts, a layer's most; 0 without any.
    pub experts: usize,
    /// Experts of a token.
    pub top_k: usize,
    /// Width between the experts' products.
    pub inner: usize,
    /// Width between the products of a dense layer, a layer's most; 0 without any.
    pub dense: usize,
    /// Logits.
    pub vocab: usize,
    /// Whether there are projections in NVFP4.
    pub nvfp4: bool,
    /// Ways in which inputs are rounded to NVFP4 for one product, a product's most; 0 where they are not rounded.
    pub roundings: usize,
}

impl Widths {
    /// Elements from one row of logits to the next.
    pub(crate) fn stride(&self) -> usize {
        self.vocab.next_multiple_of(8)
    }

    /// Elements of a head as kernels have it.
    pub(crate) fn head(&self) -> usize {
        HEAD_DIMS.into_iter().find(|&dim| dim >= self.head_dim).unwrap_or(HEAD_DIM)
    }

    /// Most rows of a step whose dense layers go through the matrix-vector kernels: none of a model that is too wide for them, or that
    /// they cannot take on this device as it is stored.
    pub(crate) fn few_rows(&self, facts: &Facts) -> usize {
        let rows = if self.nvfp4 { GEMV_ROWS_NVFP4 } else { GEMV_ROWS };
        let takes = |cols: usize, normed| {
            let dims = gemv_nvfp4::Dims { rows, cols, outputs: PANEL, normed };
            facts.is_hopper() && gemv_nvfp4::Plan::all(&dims, facts).is_ok_and(|plans| !plans.is_empty())
        };
        let inner = self.q().max(self.dense);
        let normed = self.normed();
        // Inputs that are rounded come normed already.
        let fits = inner.max(normed) <= GEMV_COLS
            && (!self.nvfp4 || takes(inner, false) && takes(normed, self.roundings == 0));
        if fits { rows } else { 0 }
    }

    /// A row of the normed residual stream, as many times as it is rounded.
    fn normed(&self) -> usize {
        self.hidden * self.roundings.max(1)
    }

    fn q(&self) -> usize {
        self.heads * self.head()
    }

    fn kv(&self) -> usize {
        self.kv_heads * self.head()
    }
}

/// Lengths of the buffers, in elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sizes {
    x: usize,
    q: usize,
    heads: usize,
    normed: usize,
    qkv: usize,
    turns: usize,
    choice: usize,
    scale: usize,
    h: usize,
    a: usize,
    products: usize,
    sorted: usize,
    tiles: usize,
    dense: usize,
    scratch: usize,
    logits: usize,
    partials: [usize; 3],
}

impl Sizes {
    fn new(widths: &Widths, capacity: Capacity, multiprocessors: usize) -> Self {
        let Widths { hidden, top_k, inner, experts, kv_heads, dense, .. } = *widths;
        let rows = capacity.rows.next_multiple_of(8);
        let few = rows.min(EXPERT_ROWS);
        let shape =
            moe_sort::Shape { rows, slots: top_k.max(1), experts: experts.max(1), height: LEAST_HEIGHT };
        let large = experts > 0;
        let decode = capacity.sequences.min(rows).max(1);
        Self {
            x: rows * hidden,
            q: rows * widths.q(),
            turns: rows * widths.head(),
            heads: rows * widths.q(),
            normed: rows.max(capacity.sequences.next_multiple_of(8)) * widths.normed(),
            qkv: rows * (widths.q() + 2 * widths.kv()),
            choice: rows * top_k,
            scale: rows,
            h: few * hidden,
            a: few * top_k * inner,
            products: few * top_k * hidden,
            sorted: if large { shape.sorted() } else { 0 },
            tiles: if large { shape.tiles() } else { 0 },
            dense: rows * dense,
            scratch: kv_heads * capacity.scratch_lines.next_multiple_of(LINES) * widths.head(),
            logits: capacity.sequences * widths.stride(),
            partials: [decode, kv_heads.max(1), most_partials(decode, kv_heads, multiprocessors)],
        }
    }

    fn bytes(&self, widths: &Widths) -> usize {
        let Self {
            x,
            q,
            turns,
            heads,
            normed,
            qkv,
            choice,
            scale,
            h,
            a,
            products,
            sorted,
            tiles,
            dense,
            scratch,
            logits,
            partials,
        } = *self;
        let sorted_bytes = sorted * (2 * widths.hidden + 2 * widths.inner + 2 * widths.hidden + 4);
        let [rows, kv_heads, splits] = partials;
        4 * (x + turns + qkv + 3 * choice + scale + products + 4 * tiles + logits)
            + 2 * (q + heads + normed + h + a + dense + 2 * scratch)
            + sorted_bytes
            + attention_decode::Workspace::bytes_for(widths.head(), rows, kv_heads, splits)
    }
}

/// Splits that give `rows` rows the partials of any smaller number, which are split more.
fn most_partials(rows: usize, kv_heads: usize, multiprocessors: usize) -> usize {
    let cache = Cache { data: 0, scales: 0, page_size: 16, kv_heads: kv_heads.max(1), window: None };
    let one = splits(1, &cache, multiprocessors) * kv_heads.max(1);
    1 + one.div_ceil((rows * kv_heads).max(1))
}

/// The buffers.
#[derive(Debug)]
pub(crate) struct Workspace {
    /// `[rows, hidden]`: the residual stream.
    pub(crate) x: Buffer<f32>,
    /// `[rows, heads * head]`.
    pub(crate) q: Buffer<u16>,
    /// `[rows, head / 2, 2]`: rotations of the step's positions.
    pub(crate) turns: Buffer<f32>,
    /// `[rows, heads * head]`, row-major or panels.
    pub(crate) heads: Buffer<u16>,
    /// Panels `[rows, hidden]`; or rounded, `[rows, roundings * hidden]`, row-major or panels.
    pub(crate) normed: Buffer<u16>,
    /// `[rows, (heads + 2 * kv_heads) * head]`; or `[rows, 2 * kv_heads * head]`, keys and values that are rotated.
    pub(crate) qkv: Buffer<f32>,
    /// `[rows, top_k]`.
    pub(crate) choice: Buffer<i32>,
    /// `[rows, top_k]`.
    pub(crate) weight: Buffer<f32>,
    /// `[rows]`: of the experts' norm.
    pub(crate) scale: Buffer<f32>,
    /// `[few rows, hidden]`.
    pub(crate) h: Buffer<u16>,
    /// `[few rows * top_k, inner]`.
    pub(crate) a: Buffer<u16>,
    /// `[few rows * top_k, hidden]`.
    pub(crate) products: Buffer<f32>,
    /// `[rows, top_k]`: places among the sorted rows.
    pub(crate) position: Buffer<i32>,
    /// `[sorted]`.
    pub(crate) source: Buffer<i32>,
    /// `[tiles, 4]`.
    pub(crate) tiles: Buffer<i32>,
    /// Sorted rows, tiles.
    pub(crate) counts: Buffer<i32>,
    /// Panels `[sorted, hidden]`.
    pub(crate) sorted_h: Buffer<u16>,
    /// Panels `[sorted, inner]`.
    pub(crate) sorted_a: Buffer<u16>,
    /// `[sorted, hidden]`, bits of bf16.
    pub(crate) sorted_y: Buffer<u16>,
    /// `[rows, dense]`, row-major or panels.
    pub(crate) dense: Buffer<u16>,
    /// `[kv_heads, head / 64, lines, 64]`.
    pub(crate) keys: Buffer<u16>,
    /// The same, of values.
    pub(crate) values: Buffer<u16>,
    /// `[logit rows, stride]`.
    pub(crate) logits: Buffer<f32>,
    /// Where the parts of a row's attention meet.
    pub(crate) partials: attention_decode::Workspace,
    /// Sorted rows that there is room for.
    pub(crate) sorted: usize,
}

/// Bytes that the workspace of such a model takes.
pub fn bytes(widths: &Widths, capacity: Capacity, multiprocessors: usize) -> usize {
    Sizes::new(widths, capacity, multiprocessors).bytes(widths)
}

impl Workspace {
    pub(crate) fn new(device: &Device, widths: &Widths, capacity: Capacity) -> Result<Self, DeviceError> {
        let multiprocessors = device.facts().multiprocessors as usize;
        let sizes = Sizes::new(widths, capacity, multiprocessors);
        let Sizes { sorted, .. } = sizes;
        let [rows, kv_heads, splits] = sizes.partials;
        // Zeros, not garbage: padding is read by matrix instructions, and NaN times zero is NaN.
        Ok(Self {
            x: device.zeros(sizes.x)?,
            q: device.zeros(sizes.q)?,
            turns: device.zeros(sizes.turns)?,
            heads: device.zeros(sizes.heads)?,
            normed: device.zeros(sizes.normed)?,
            qkv: device.zeros(sizes.qkv)?,
            choice: device.zeros(sizes.choice)?,
            weight: device.zeros(sizes.choice)?,
            scale: device.zeros(sizes.scale)?,
            h: device.zeros(sizes.h)?,
            a: device.zeros(sizes.a)?,
            products: device.zeros(sizes.products)?,
            position: device.zeros(sizes.choice)?,
            source: device.zeros(sorted)?,
            tiles: device.zeros(4 * sizes.tiles)?,
            counts: device.zeros(2)?,
            sorted_h: device.zeros(sorted * widths.hidden)?,
            sorted_a: device.zeros(sorted * widths.inner)?,
            sorted_y: device.zeros(sorted * widths.hidden)?,
            dense: device.zeros(sizes.dense)?,
            keys: device.zeros(sizes.scratch)?,
            values: device.zeros(sizes.scratch)?,
            logits: device.zeros(sizes.logits)?,
            partials: attention_decode::Workspace::new_for(device, widths.head(), rows, kv_heads, splits)?,
            sorted,
        })
    }
}
