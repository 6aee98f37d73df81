//! RMSNorm into the experts' operand: each row to its places among the rows sorted by expert.

use ctxserve_backend::DeviceError;

use super::moe_sort::Shape;
use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "moe_scatter";
const THREADS: u32 = 384;
const MOST_SLOTS: usize = 8;
const MOST_EXPERTS: usize = 128;
/// Most choices that a block counts by itself.
const MOST_ENTRIES: usize = 3 * THREADS as usize;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    x: u64,
    weight: u64,
    scale: u64,
    y: u64,
    position: u64,
    live: u64,
    cols: i32,
    capacity: i32,
    slots: i32,
    choice: u64,
    tiles: u64,
    counts: u64,
    most_rows: i32,
    experts: i32,
    height: i32,
}

// SAFETY: mirrors `Params` of kernels/moe_scatter.cu.
unsafe impl Params for Arguments {}

/// The loaded kernels.
#[derive(Clone, Copy, Debug)]
pub struct MoeScatter {
    /// To fp16, to bf16.
    plain: [Kernel; 2],
    /// The same.
    sorting: [Kernel; 2],
}

/// What `moe_sort` would have done, for few rows.
#[derive(Clone, Copy, Debug)]
pub struct Sort<'a> {
    /// `[rows, slots]`: experts.
    pub choice: &'a Buffer<i32>,
    /// As of `moe_sort`.
    pub tiles: &'a Buffer<i32>,
    /// As of `moe_sort`.
    pub counts: &'a Buffer<i32>,
    /// The sizes; `rows` and `slots` are those of the call.
    pub shape: Shape,
}

/// Whether so many rows can be sorted while they are scattered.
pub fn can_sort(shape: &Shape) -> bool {
    shape.rows * shape.slots <= MOST_ENTRIES
}

/// `y[position[row, slot]] = x[row] * scale[row] * weight` for every slot. Other rows of `y` keep what they hold.
#[derive(Debug)]
pub struct Call<'a> {
    /// `[rows, cols]`.
    pub x: &'a Buffer<f32>,
    /// `[cols]`.
    pub weight: &'a Buffer<f32>,
    /// `[rows]`: of the norm, as `route` found it.
    pub scale: &'a Buffer<f32>,
    /// Panel layout of `[capacity, cols]`, bits of fp16 or bf16.
    pub y: &'a Buffer<u16>,
    /// Whether these are bf16.
    pub bf16: bool,
    /// `[rows, slots]`: rows of `y`, of `moe_sort`, or written if `sort` is there.
    pub position: &'a Buffer<i32>,
    /// One integer: rows to do.
    pub live: &'a Buffer<i32>,
    /// Most rows, which the grid is made for.
    pub rows: usize,
    /// Elements of a row, a multiple of 64.
    pub cols: usize,
    /// Rows that `y` is laid out for, a multiple of 8.
    pub capacity: usize,
    /// Experts of a row, at most 8.
    pub slots: usize,
    /// Sorts as well, where [`can_sort`] says so.
    pub sort: Option<Sort<'a>>,
}

impl MoeScatter {
    /// Loads the kernels.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        let kernel = |function| device.kernel(OP, function, 0);
        Ok(Self {
            plain: [kernel(OP)?, kernel("moe_scatter_bf16")?],
            sorting: [kernel("moe_scatter_sorting")?, kernel("moe_scatter_sorting_bf16")?],
        })
    }

    /// Issues it.
    ///
    /// # Errors
    /// Buffers that are too small, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let Call { rows, cols, capacity, slots, .. } = *call;
        let sort_fits = call.sort.is_none_or(|Sort { choice, tiles, counts, shape }| {
            can_sort(&shape)
                && (shape.rows, shape.slots) == (rows, slots)
                && (1..=MOST_EXPERTS).contains(&shape.experts)
                && shape.height > 0
                && shape.height.is_multiple_of(8)
                && shape.sorted() <= capacity
                && choice.len() >= rows * slots
                && tiles.len() >= 4 * shape.tiles()
                && counts.len() >= 2
        });
        let fits = cols.is_multiple_of(64)
            && slots <= MOST_SLOTS
            && capacity.is_multiple_of(8)
            && call.x.len() >= rows * cols
            && call.weight.len() >= cols
            && call.scale.len() >= rows
            && call.y.len() >= capacity * cols
            && call.position.len() >= rows * slots
            && !call.live.is_empty()
            && sort_fits;
        if !fits {
            return Err(DeviceError::new(OP, format!("{rows} rows of {cols} do not fit the buffers")));
        }
        if rows == 0 {
            return Ok(());
        }
        let arguments = Arguments {
            x: call.x.address(),
            weight: call.weight.address(),
            scale: call.scale.address(),
            y: call.y.address(),
            position: call.position.address(),
            live: call.live.address(),
            cols: cols as i32,
            capacity: capacity as i32,
            slots: slots as i32,
            choice: call.sort.map_or(0, |sort| sort.choice.address()),
            tiles: call.sort.map_or(0, |sort| sort.tiles.address()),
            counts: call.sort.map_or(0, |sort| sort.counts.address()),
            most_rows: rows as i32,
            experts: call.sort.map_or(1, |sort| sort.shape.experts as i32),
            height: call.sort.map_or(8, |sort| sort.shape.height as i32),
        };
        let kernels = if call.sort.is_some() { &self.sorting } else { &self.plain };
        let kernel = &kernels[usize::from(call.bf16)];
        // One more writes the tiles.
        let blocks = rows as u32 + u32::from(call.sort.is_some());
        let launch = Launch { grid: [blocks, 1, 1], block: THREADS, shared: 0, overlap: true };
        // SAFETY: every buffer was checked to be large enough; `position` holds rows of `y` by the caller's plan.
        unsafe { device.launch(kernel, &launch, &arguments) }
    }
}
