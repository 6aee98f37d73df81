//! Rows of a step ordered by expert.

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "moe_sort";
const THREADS: u32 = 1024;
const MOST_EXPERTS: usize = 128;
/// Blocks of the one cluster, where there are clusters.
const CLUSTER: u32 = 8;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    choice: u64,
    live: u64,
    position: u64,
    source: u64,
    tiles: u64,
    counts: u64,
    rows: i32,
    slots: i32,
    experts: i32,
    height: i32,
}

// SAFETY: mirrors `Params` of kernels/moe_sort.cu.
unsafe impl Params for Arguments {}

/// Sizes that bound what a sort writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Most rows.
    pub rows: usize,
    /// Experts that a row chooses.
    pub slots: usize,
    /// Experts, at most 128.
    pub experts: usize,
    /// Most sorted rows of a tile, a multiple of 8.
    pub height: usize,
}

impl Shape {
    /// Most sorted rows, padding included; a multiple of 8.
    pub fn sorted(&self) -> usize {
        let entries = self.rows * self.slots;
        (entries + 7 * self.experts.min(entries)).next_multiple_of(8)
    }

    /// Most tiles.
    pub fn tiles(&self) -> usize {
        self.sorted() / self.height + self.experts.min(self.rows * self.slots)
    }
}

/// The loaded kernel.
#[derive(Clone, Copy, Debug)]
pub struct MoeSort {
    kernel: Kernel,
}

/// Gives each (row, slot) a place among the rows sorted by expert, then row, then slot. An expert's run starts at a multiple of 8 and is
/// filled up to one with padding.
#[derive(Debug)]
pub struct Call<'a> {
    /// `[rows, slots]`: experts.
    pub choice: &'a Buffer<i32>,
    /// One integer: rows to do.
    pub live: &'a Buffer<i32>,
    /// `[rows, slots]`: sorted row of each.
    pub position: &'a Buffer<i32>,
    /// [`Shape::sorted`] elements: row of each sorted row, -1 of padding.
    pub source: &'a Buffer<i32>,
    /// Four integers for each of [`Shape::tiles`]: expert, first sorted row, sorted rows, 0.
    pub tiles: &'a Buffer<i32>,
    /// Two integers: sorted rows with padding (the `live` of what runs over sorted rows), tiles.
    pub counts: &'a Buffer<i32>,
    /// The sizes.
    pub shape: Shape,
}

impl MoeSort {
    /// Loads the kernel.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        Ok(Self { kernel: device.kernel(OP, OP, 0)? })
    }

    /// Issues it.
    ///
    /// # Errors
    /// Buffers that are too small, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let shape = call.shape;
        let Shape { rows, slots, experts, height } = shape;
        let fits = (1..=MOST_EXPERTS).contains(&experts)
            && slots > 0
            && height > 0
            && height.is_multiple_of(8)
            && call.choice.len() >= rows * slots
            && !call.live.is_empty()
            && call.position.len() >= rows * slots
            && call.source.len() >= shape.sorted()
            && call.tiles.len() >= 4 * shape.tiles()
            && call.counts.len() >= 2;
        if !fits {
            return Err(DeviceError::new(OP, format!("{shape:?} does not fit its buffers")));
        }
        let arguments = Arguments {
            choice: call.choice.address(),
            live: call.live.address(),
            position: call.position.address(),
            source: call.source.address(),
            tiles: call.tiles.address(),
            counts: call.counts.address(),
            rows: rows as i32,
            slots: slots as i32,
            experts: experts as i32,
            height: height as i32,
        };
        let blocks = if device.facts().capability >= (9, 0) { CLUSTER } else { 1 };
        let launch = Launch { grid: [blocks, 1, 1], block: THREADS, shared: 0, overlap: true };
        // SAFETY: every buffer was checked to be large enough; the kernel keeps experts inside its table.
        unsafe { device.launch(&self.kernel, &launch, &arguments) }
    }
}
