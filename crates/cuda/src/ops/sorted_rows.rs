//! What the experts' products over sorted rows have in common, whatever the weights are.

use ctxserve_backend::DeviceError;

use crate::driver::Buffer;

/// What becomes of the sums.
#[derive(Clone, Copy, Debug)]
pub enum Output<'a> {
    /// Rows are gates and ups: `gate * sigmoid(alpha * gate) * (up + 1)` with `gate <= limit`, `-limit <= up <= limit`.
    SwiGlu {
        /// Panel layout of `[capacity, rows / 2]`, 16 bits each, of the kind that `x` has.
        y: &'a Buffer<u16>,
        /// Factor of the sigmoid.
        alpha: f32,
        /// The clamp.
        limit: f32,
    },
    /// Stored as they are, `[capacity, rows]`.
    F32(&'a Buffer<f32>),
    /// Stored as bits of bf16, `[capacity, rows]`.
    Bf16(&'a Buffer<u16>),
}

/// All of a product but the weights, which have the shape `[experts, rows, cols]`.
#[derive(Clone, Copy, Debug)]
pub struct SortedRows<'a> {
    /// `[experts, rows]`: gate `i` at `2i` and up `i` at `2i + 1`; or rows in order.
    pub bias: &'a Buffer<f32>,
    /// Panel layout of `[capacity, cols]`, 16 bits each.
    pub x: &'a Buffer<u16>,
    /// The result.
    pub y: Output<'a>,
    /// Of `moe_sort`: four integers a tile.
    pub tiles: &'a Buffer<i32>,
    /// Of `moe_sort`: sorted rows, tiles.
    pub counts: &'a Buffer<i32>,
    /// Experts.
    pub experts: usize,
    /// Weight rows of an expert, a multiple of 16 (of 128 for gates and ups).
    pub rows: usize,
    /// Elements summed over, a multiple of 64.
    pub cols: usize,
    /// Sorted rows that `x` and `y` are laid out for, a multiple of 8.
    pub capacity: usize,
    /// Most sorted rows of a tile: what `moe_sort` was told, one of the product's `height`.
    pub height: usize,
    /// Most tiles, which the grid is made for.
    pub most_tiles: usize,
}

impl SortedRows<'_> {
    /// Address of the result, factor of the sigmoid, the clamp.
    pub(super) fn output(&self) -> (u64, f32, f32) {
        match self.y {
            Output::SwiGlu { y, alpha, limit } => (y.address(), alpha, limit),
            Output::F32(y) => (y.address(), 0.0, 0.0),
            Output::Bf16(y) => (y.address(), 0.0, 0.0),
        }
    }

    /// Whether the shape is a legal one and every buffer holds it.
    pub(super) fn fit(&self) -> bool {
        let Self { experts, rows, cols, capacity, most_tiles, .. } = *self;
        let (unit, has, wants) = match self.y {
            Output::SwiGlu { y, .. } => (128, y.len(), capacity * rows / 2),
            Output::F32(y) => (16, y.len(), capacity * rows),
            Output::Bf16(y) => (16, y.len(), capacity * rows),
        };
        let small = |value: usize| value <= 1 << 30;
        [experts * rows, cols, capacity, most_tiles].into_iter().all(small)
            && cols > 0
            && cols.is_multiple_of(64)
            && rows > 0
            && rows.is_multiple_of(unit)
            && experts > 0
            && capacity.is_multiple_of(8)
            && self.bias.len() >= experts * rows
            && self.x.len() >= capacity * cols
            && has >= wants
            && self.tiles.len() >= 4 * most_tiles
            && self.counts.len() >= 2
    }

    /// Of a product that cannot be issued.
    pub(super) fn misfit(&self, op: &'static str) -> DeviceError {
        let Self { experts, rows, cols, capacity, height, .. } = self;
        let what = format!(
            "{experts} experts of {rows} x {cols}, {capacity} rows in tiles of {height}, do not fit the buffers"
        );
        DeviceError::new(op, what)
    }

    /// The grid, if a block takes `rows` weight rows of a tile at a time and at most `blocks` run at once.
    pub(super) fn grid(&self, rows: usize, blocks: usize) -> [u32; 3] {
        let all = (self.most_tiles * self.rows.div_ceil(rows)).max(1);
        [all.min(blocks) as u32, 1, 1]
    }
}
