//! Down projection of the chosen experts and their weighted sum, small batches.

use ctxserve_backend::DeviceError;

use super::moe_gate_up::{MOST_ROWS, Plan, Shape, Split, plan_strips};
use super::pack_mxfp4::{Rows, Strips};
use crate::driver::{Buffer, Device, Facts, Kernel, Launch, Params};

const OP: &str = "moe_down";
const COMBINE_THREADS: u32 = 256;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    weights: u64,
    bias: u64,
    a: u64,
    choice: u64,
    weight: u64,
    live: u64,
    x: u64,
    products: u64,
    hidden: i32,
    inner: i32,
    experts: i32,
    top_k: i32,
    capacity: i32,
    sums: i32,
}

// SAFETY: mirrors `Params` of kernels/moe_down.cu.
unsafe impl Params for Arguments {}

/// The loaded kernels.
#[derive(Clone, Copy, Debug)]
pub struct MoeDown {
    small: Kernel,
    few: Kernel,
    wide: Kernel,
    large: Kernel,
    vast: Kernel,
    combine: Kernel,
}

/// `x[row] += sum over slots of weight[row, slot] * (W_e a[row, slot] + b_e)`, slots in order. Must follow `moe_gate_up` in the
/// stream, or a launch that does not overlap: it reads `choice` before it waits for the launch before it.
#[derive(Debug)]
pub struct Call<'a> {
    /// Down strips of all experts.
    pub weights: &'a Buffer<u8>,
    /// `[experts, hidden]`.
    pub bias: &'a Buffer<f32>,
    /// `[rows * top_k, inner]`, bits of fp16 in fragment order.
    pub a: &'a Buffer<u16>,
    /// `[rows, top_k]`.
    pub choice: &'a Buffer<i32>,
    /// `[rows, top_k]`.
    pub weight: &'a Buffer<f32>,
    /// One integer: rows to do, at most `rows`.
    pub live: &'a Buffer<i32>,
    /// `[rows, hidden]`.
    pub x: &'a Buffer<f32>,
    /// Scratch for more than 8 rows: `[rows * top_k, hidden]`. May be empty for fewer.
    pub products: &'a Buffer<f32>,
    /// Most rows, at most [`MOST_ROWS`].
    pub rows: usize,
    /// The sizes.
    pub shape: Shape,
}

/// The launch for `rows` rows; `alone` as for `moe_gate_up`.
pub fn plan(rows: usize, shape: &Shape, facts: &Facts, alone: Option<bool>) -> Plan {
    let products = rows * shape.top_k * 64;
    let plan = plan_strips(rows, shape.top_k, shape.inner, products, facts, alone);
    match plan.split {
        Split::Piece | Split::PieceAlone | Split::Pieces => {
            Plan { blocks: plan.blocks.min(shape.hidden as u32 / 16), ..plan }
        }
        Split::Strip | Split::StripOnly => plan,
    }
}

impl MoeDown {
    /// Loads the kernels.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        let shared = device.facts().shared_memory as usize;
        Ok(Self {
            small: device.kernel(OP, "moe_down_small", shared)?,
            few: device.kernel(OP, "moe_down_few", shared)?,
            wide: device.kernel(OP, "moe_down_wide", shared)?,
            large: device.kernel(OP, "moe_down_large", shared)?,
            vast: device.kernel(OP, "moe_down_vast", shared)?,
            combine: device.kernel(OP, "moe_down_combine", 0)?,
        })
    }

    /// Issues it: one launch for few rows, two for more.
    ///
    /// # Errors
    /// Buffers that are too small, sizes out of bounds, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        self.issue_as(device, call, None)
    }

    /// Issues it with or without the whole multiprocessor, where there are few rows.
    ///
    /// # Errors
    /// As [`MoeDown::issue`].
    pub fn issue_as(&self, device: &Device, call: &Call<'_>, alone: Option<bool>) -> Result<(), DeviceError> {
        let Call { rows, shape, .. } = *call;
        let Shape { experts, top_k, hidden, inner } = shape;
        let plan = plan(rows, &shape, device.facts(), alone);
        let fits = shape.is_sound()
            && rows <= MOST_ROWS
            && call.weights.len() >= experts * Strips::of(Rows::Down, hidden, inner).bytes()
            && call.bias.len() >= experts * hidden
            && call.a.len() >= rows * top_k * inner
            && call.choice.len() >= rows * top_k
            && call.weight.len() >= rows * top_k
            && !call.live.is_empty()
            && call.x.len() >= rows * hidden
            && (plan.sums > 0 || call.products.len() >= rows * top_k * hidden);
        if !fits {
            return Err(DeviceError::new(OP, format!("{rows} rows of {shape:?} do not fit")));
        }
        if rows == 0 {
            return Ok(());
        }
        let arguments = Arguments {
            weights: call.weights.address(),
            bias: call.bias.address(),
            a: call.a.address(),
            choice: call.choice.address(),
            weight: call.weight.address(),
            live: call.live.address(),
            x: call.x.address(),
            products: call.products.address(),
            hidden: hidden as i32,
            inner: inner as i32,
            experts: experts as i32,
            top_k: top_k as i32,
            capacity: (rows * top_k) as i32,
            sums: plan.sums as i32,
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
        unsafe { device.launch(kernel, &launch, &arguments) }?;
        // Few rows are summed where they are computed.
        if plan.sums > 0 {
            return Ok(());
        }
        let launch = Launch { grid: [rows as u32, 1, 1], block: COMBINE_THREADS, shared: 0, overlap: true };
        // SAFETY: as above; one block a row.
        unsafe { device.launch(&self.combine, &launch, &arguments) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::moe_gate_up::tests::{CONTEXT_1, facts};

    #[test]
    fn two_blocks_of_few_rows_fit_a_multiprocessor() {
        for rows in 1..=8 {
            let plan = plan(rows, &CONTEXT_1, &facts(232_448), Some(false));
            assert!(plan.split == Split::Piece && plan.blocks == 132, "{plan}");
            assert!(2 * (plan.shared + 1024) <= 228 * 1024, "{rows}: {plan}");
        }
        assert_eq!(plan(9, &CONTEXT_1, &facts(232_448), None).blocks, 132);
    }

    #[test]
    fn a_block_fits_every_device() {
        let wide = Shape { experts: 128, top_k: 8, hidden: 8192, inner: 8192 };
        for shared in [101_376, 166_912, 232_448] {
            for rows in [1, 2, 8, 9, 64] {
                assert!(plan(rows, &CONTEXT_1, &facts(shared), None).shared <= shared);
            }
        }
        assert!(plan(8, &wide, &facts(232_448), None).shared <= 232_448);
    }
}
