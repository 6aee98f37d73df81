//! The router: RMSNorm, logits, the greatest few, their softmax.

use std::fmt;

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Kernel, Launch, Params};

const OP: &str = "route";
const THREADS: u32 = 512;
const SHARED_ROWS: usize = 8;
/// Shared memory of the larger kernel that is not for rows.
const STATIC: usize = 8 * 1024;
/// Rows from which eight share the reads of the router's weights.
const MANY: usize = 65;
pub(super) const MOST_EXPERTS: usize = 128;
pub(super) const MOST_CHOICES: usize = 8;

#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Arguments {
    x: u64,
    norm: u64,
    router: u64,
    bias: u64,
    live: u64,
    choice: u64,
    weight: u64,
    h: u64,
    hidden: i32,
    experts: i32,
    top_k: i32,
    fragments: i32,
    eps: f32,
}

// SAFETY: mirrors `Params` of kernels/route.cu.
unsafe impl Params for Arguments {}

/// The loaded kernels.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    one: Kernel,
    eight: Kernel,
}

/// How a call is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Rows of a block: 1, or 8 that share the router's weights.
    pub rows: usize,
    /// Blocks.
    pub blocks: u32,
    /// Bytes of shared memory.
    pub shared: u32,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} blocks of {} rows, {} bytes shared", self.blocks, self.rows, self.shared)
    }
}

/// The launch for `rows` rows of `hidden` where a block may have `shared` bytes of shared memory.
pub fn plan(rows: usize, hidden: usize, shared: usize) -> Plan {
    let many = rows >= MANY && SHARED_ROWS * hidden * 4 + STATIC <= shared;
    let each = if many { SHARED_ROWS } else { 1 };
    Plan { rows: each, blocks: rows.div_ceil(each) as u32, shared: (each * hidden * 4) as u32 }
}

/// `h = RMSNorm(x)`, and of its logits the `top_k` greatest (ties: the lowest index; a NaN is above all) with their softmax.
#[derive(Debug)]
pub struct Call<'a> {
    /// `[rows, hidden]`.
    pub x: &'a Buffer<f32>,
    /// `[hidden]`.
    pub norm: &'a Buffer<f32>,
    /// `[experts, hidden]`, bits of bf16.
    pub router: &'a Buffer<u16>,
    /// `[experts]`.
    pub bias: &'a Buffer<f32>,
    /// One integer: rows to do, at most `rows`.
    pub live: &'a Buffer<i32>,
    /// `[rows, top_k]`: experts, the greatest logit first.
    pub choice: &'a Buffer<i32>,
    /// `[rows, top_k]`: their weights.
    pub weight: &'a Buffer<f32>,
    /// `[rows, hidden]`: the normed rows, bits of fp16.
    pub h: &'a Buffer<u16>,
    /// Most rows, which the grid is made for.
    pub rows: usize,
    /// Width, a multiple of 64.
    pub hidden: usize,
    /// Experts, at most 128.
    pub experts: usize,
    /// Experts of a row, at most 8.
    pub top_k: usize,
    /// Whether `h` is in fragment order, which `moe_gate_up` reads, or row-major.
    pub fragments: bool,
    /// Added to the mean square.
    pub eps: f32,
}

impl Route {
    /// Loads the kernels.
    ///
    /// # Errors
    /// No code for this device.
    pub fn load(device: &Device) -> Result<Self, DeviceError> {
        let shared = (device.facts().shared_memory as usize).saturating_sub(STATIC);
        Ok(Self {
            one: device.kernel("route", "route_one", shared)?,
            eight: device.kernel("route", "route_eight", shared)?,
        })
    }

    /// Issues it.
    ///
    /// # Errors
    /// Buffers that are too small, sizes out of bounds, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let Call { rows, hidden, experts, top_k, .. } = *call;
        let shared = device.facts().shared_memory as usize;
        let plan = plan(rows, hidden, shared);
        let fits = hidden.is_multiple_of(64)
            && hidden > 0
            && plan.shared as usize + STATIC <= shared
            && (1..=MOST_EXPERTS).contains(&experts)
            && (1..=MOST_CHOICES.min(experts)).contains(&top_k)
            && call.x.len() >= rows * hidden
            && call.norm.len() >= hidden
            && call.router.len() >= experts * hidden
            && call.bias.len() >= experts
            && call.live.len() >= 1
            && call.choice.len() >= rows * top_k
            && call.weight.len() >= rows * top_k
            && call.h.len() >= rows * hidden;
        if !fits {
            let what = format!("{rows} rows of {hidden}, {top_k} of {experts} experts, do not fit");
            return Err(DeviceError::new(OP, what));
        }
        if rows == 0 {
            return Ok(());
        }
        let arguments = Arguments {
            x: call.x.address(),
            norm: call.norm.address(),
            router: call.router.address(),
            bias: call.bias.address(),
            live: call.live.address(),
            choice: call.choice.address(),
            weight: call.weight.address(),
            h: call.h.address(),
            hidden: hidden as i32,
            experts: experts as i32,
            top_k: top_k as i32,
            fragments: i32::from(call.fragments),
            eps: call.eps,
        };
        let kernel = if plan.rows == 1 { &self.one } else { &self.eight };
        let launch = Launch { grid: [plan.blocks, 1, 1], block: THREADS, shared: plan.shared, overlap: true };
        // SAFETY: every buffer was checked to be large enough for `rows`, which `live` does not exceed.
        unsafe { device.launch(kernel, &launch, &arguments) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const H200: usize = 232_448;

    #[test]
    fn decode_has_a_block_a_row_and_prefill_shares_weights() {
        assert_eq!(plan(1, 2880, H200), Plan { rows: 1, blocks: 1, shared: 11_520 });
        assert_eq!(plan(64, 2880, H200).blocks, 64);
        assert_eq!(plan(65, 2880, H200), Plan { rows: 8, blocks: 9, shared: 92_160 });
        // Rows that do not fit eight at a time.
        assert_eq!(plan(100, 8192, H200), Plan { rows: 1, blocks: 100, shared: 32_768 });
        assert_eq!(plan(100, 2880, H200).to_string(), "13 blocks of 8 rows, 92160 bytes shared");
    }
}
