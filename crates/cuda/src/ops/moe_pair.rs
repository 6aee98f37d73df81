//! Both products of the chosen experts in one launch, small batches on Hopper.

use ctxserve_backend::DeviceError;

use super::moe_down::{self, MoeDown};
use super::moe_gate_up::{self, Plan, Shape, plan_pipe};
use crate::driver::{Buffer, Device, Facts, Kernel, Launch, Params};

const OP: &str = "moe_pair";
/// Columns of a piece.
const PIECE: usize = 192;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    gate_up: u64,
    down: u64,
    gate_up_bias: u64,
    down_bias: u64,
    h: u64,
    choice: u64,
    live: u64,
    a: u64,
    products: u64,
    arrivals: u64,
    hidden: i32,
    inner: i32,
    experts: i32,
    top_k: i32,
    capacity: i32,
    stages: i32,
    alpha: f32,
    limit: f32,
}

// SAFETY: mirrors `Params` of kernels/moe_pair.cu.
unsafe impl Params for Arguments {}

/// The loaded kernel, and the one that adds up what it leaves.
#[derive(Debug)]
pub struct MoePair {
    kernel: Kernel,
    down: MoeDown,
    /// Where the blocks of a launch meet; each leaves it as the next one needs it.
    arrivals: Buffer<u32>,
}

/// `gate_up`, then `down`: bit for bit what the two leave one after the other.
#[derive(Debug)]
pub struct Call<'a> {
    /// The first product.
    pub gate_up: &'a moe_gate_up::Call<'a>,
    /// The second, of its `a`, with room for products. May follow anything in the stream.
    pub down: &'a moe_down::Call<'a>,
}

/// The launch for `rows` rows, where there can be one.
pub fn plan(rows: usize, shape: &Shape, facts: &Facts) -> Option<Plan> {
    let Shape { hidden, inner, .. } = *shape;
    (hidden.div_ceil(PIECE) == inner.div_ceil(PIECE))
        .then(|| plan_pipe(rows * shape.top_k, hidden.max(inner), facts))
        .flatten()
}

impl MoePair {
    /// Loads the kernels.
    ///
    /// # Errors
    /// No code for this device, or no memory.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        let shared = device.facts().shared_memory as usize;
        Ok(Self {
            kernel: device.kernel(OP, "moe_pair", shared)?,
            down: MoeDown::load(device)?,
            arrivals: device.zeros(1)?,
        })
    }

    /// Issues it.
    ///
    /// # Errors
    /// Those of [`Self::issue_products`].
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        self.issue_products(device, call)?;
        let rows = call.down.rows;
        match plan(rows, &call.down.shape, device.facts()) {
            Some(plan) if rows > 0 => self.down.combine(device, rows, &call.down.arguments(&plan)),
            _ => Ok(()),
        }
    }

    /// Issues all but the sum: leaves `products` to be added to x.
    ///
    /// # Errors
    /// A device or shape that [`plan`] has nothing for, buffers that are too small, sizes out of bounds, or a device fault.
    pub fn issue_products(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let (gate_up, down, shape, rows) = (call.gate_up, call.down, call.gate_up.shape, call.gate_up.rows);
        let plan = plan(rows, &shape, device.facts())
            .ok_or_else(|| DeviceError::new(OP, format!("not for {shape:?} on this device")))?;
        let same = down.shape == shape && down.rows == rows && down.a.address() == gate_up.a.address();
        if !same || !gate_up.fits() || !down.fits(&plan) {
            return Err(DeviceError::new(OP, format!("{rows} rows of {shape:?} do not fit")));
        }
        if rows == 0 {
            return Ok(());
        }
        let arguments = Arguments {
            gate_up: gate_up.weights.address(),
            down: down.weights.address(),
            gate_up_bias: gate_up.bias.address(),
            down_bias: down.bias.address(),
            h: gate_up.h.address(),
            choice: gate_up.choice.address(),
            live: gate_up.live.address(),
            a: gate_up.a.address(),
            products: down.products.address(),
            arrivals: self.arrivals.address(),
            hidden: shape.hidden as i32,
            inner: shape.inner as i32,
            experts: shape.experts as i32,
            top_k: shape.top_k as i32,
            capacity: (rows * shape.top_k) as i32,
            stages: plan.stages as i32,
            alpha: gate_up.alpha,
            limit: gate_up.limit,
        };
        let launch =
            Launch { grid: [plan.blocks, 1, 1], block: plan.warps * 32, shared: plan.shared, overlap: true };
        // SAFETY: every buffer was checked to be large enough; the kernel bounds experts and pairs itself. Its blocks, one to a
        // multiprocessor, are all there at once, as they must be to meet.
        unsafe { device.launch(&self.kernel, &launch, &arguments) }
    }
}
