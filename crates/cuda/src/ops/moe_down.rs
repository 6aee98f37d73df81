//! Down projection of the chosen experts and their weighted sum, small batches.

use ctxserve_backend::DeviceError;

use super::moe_gate_up::{MOST_ROWS, Plan, Shape, Split, plan_strips};
use super::pack_mxfp4::{Rows, Strips};
use crate::driver::{Buffer, Device, Facts, Kernel, Launch, Params};

const OP: &str = "moe_down";
const COMBINE_THREADS: u32 = 128;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Arguments {
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
    stages: i32,
}

// SAFETY: mirrors `Params` of kernels/moe_down.cu.
unsafe impl Params for Arguments {}

/// The loaded kernels.
#[derive(Clone, Copy, Debug)]
pub struct MoeDown {
    few: Kernel,
    wide: Kernel,
    pipe: Kernel,
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

impl Call<'_> {
    pub(super) fn arguments(&self, plan: &Plan) -> Arguments {
        Arguments {
            weights: self.weights.address(),
            bias: self.bias.address(),
            a: self.a.address(),
            choice: self.choice.address(),
            weight: self.weight.address(),
            live: self.live.address(),
            x: self.x.address(),
            products: self.products.address(),
            hidden: self.shape.hidden as i32,
            inner: self.shape.inner as i32,
            experts: self.shape.experts as i32,
            top_k: self.shape.top_k as i32,
            capacity: (self.rows * self.shape.top_k) as i32,
            sums: plan.sums as i32,
            stages: plan.stages as i32,
        }
    }

    pub(super) fn fits(&self, plan: &Plan) -> bool {
        let Shape { experts, top_k, hidden, inner } = self.shape;
        let pairs = self.rows * top_k;
        self.shape.is_sound()
            && self.rows <= MOST_ROWS
            && self.weights.len() >= experts * Strips::of(Rows::Down, hidden, inner).bytes()
            && self.bias.len() >= experts * hidden
            && self.a.len() >= pairs * inner
            && self.choice.len() >= pairs
            && self.weight.len() >= pairs
            && !self.live.is_empty()
            && self.x.len() >= self.rows * hidden
            && (plan.sums > 0 || self.products.len() >= pairs * hidden)
    }
}

/// The launch for `rows` rows; `wish` is taken where it can be.
pub fn plan(rows: usize, shape: &Shape, facts: &Facts, wish: Option<Split>) -> Plan {
    let products = rows * shape.top_k * 64;
    let plan = plan_strips(rows, shape.top_k, shape.inner, products, facts, wish);
    match plan.split {
        Split::Piece | Split::Pieces => Plan { blocks: plan.blocks.min(shape.hidden as u32 / 16), ..plan },
        Split::Pipe | Split::Strip | Split::StripOnly => plan,
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
            few: device.kernel(OP, "moe_down_few", shared)?,
            wide: device.kernel(OP, "moe_down_wide", shared)?,
            pipe: device.kernel(OP, "moe_down_pipe", shared)?,
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

    /// `x += ` the weighted products.
    fn combine(&self, device: &Device, rows: usize, arguments: &Arguments) -> Result<(), DeviceError> {
        let grid = [(arguments.hidden as u32).div_ceil(4 * COMBINE_THREADS), rows as u32, 1];
        let launch = Launch { grid, block: COMBINE_THREADS, shared: 0, overlap: true };
        // SAFETY: `issue_as` checks that every buffer is large enough.
        unsafe { device.launch(&self.combine, &launch, arguments) }
    }

    /// Issues it as wished, where that can be.
    ///
    /// # Errors
    /// As [`MoeDown::issue`].
    pub fn issue_as(&self, device: &Device, call: &Call<'_>, wish: Option<Split>) -> Result<(), DeviceError> {
        let plan = plan(call.rows, &call.shape, device.facts(), wish);
        if self.multiply(device, call, &plan)? {
            return self.combine(device, call.rows, &call.arguments(&plan));
        }
        Ok(())
    }

    /// Issues all but the sum of products. Whether there is one left to do: few rows are summed where they are computed.
    ///
    /// # Errors
    /// As [`MoeDown::issue`].
    pub fn issue_products(&self, device: &Device, call: &Call<'_>) -> Result<bool, DeviceError> {
        self.multiply(device, call, &plan(call.rows, &call.shape, device.facts(), None))
    }

    fn multiply(&self, device: &Device, call: &Call<'_>, plan: &Plan) -> Result<bool, DeviceError> {
        let Call { rows, shape, .. } = *call;
        if !call.fits(plan) {
            return Err(DeviceError::new(OP, format!("{rows} rows of {shape:?} do not fit")));
        }
        if rows == 0 {
            return Ok(false);
        }
        let arguments = call.arguments(plan);
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
        unsafe { device.launch(kernel, &launch, &arguments) }?;
        Ok(plan.sums == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::moe_gate_up::tests::{CONTEXT_1, facts};

    #[test]
    fn a_block_fits_every_device() {
        let wide = Shape { experts: 128, top_k: 8, hidden: 8192, inner: 8192 };
        for shared in [101_376, 166_912, 232_448] {
            for rows in [1, 2, 8, 9, 64] {
                for wish in [None, Some(Split::Piece), Some(Split::Strip)] {
                    assert!(plan(rows, &CONTEXT_1, &facts(shared), wish).shared <= shared);
                }
            }
        }
        assert!(plan(8, &wide, &facts(232_448), None).shared <= 232_448);
    }
}
