//! The router: RMSNorm, logits, the greatest few, their softmax.

use std::fmt;

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Facts, Kernel, Launch, Params};

const OP: &str = "route";
const THREADS: u32 = 512;
const SPREAD_THREADS: u32 = 256;
/// Blocks of a cluster.
const SPREAD: usize = 8;
const SHARED_ROWS: usize = 8;
/// Shared memory of the larger kernel that is not for rows.
const STATIC: usize = 8 * 1024;
/// Rows from which eight share the reads of the router's weights.
const MANY: usize = 65;
/// First compute capability with clusters of blocks.
const CLUSTERS: (u32, u32) = (9, 0);
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
    spread: Option<Kernel>,
}

/// How rows and blocks go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// A cluster of eight blocks for each row.
    Spread,
    /// A block for each row.
    One,
    /// A block for eight rows, which share the reads of the router's weights.
    Eight,
}

/// How a call is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What a block does.
    pub split: Split,
    /// Blocks.
    pub blocks: u32,
    /// Bytes of shared memory.
    pub shared: u32,
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}, {} blocks, {} bytes shared", self.split, self.blocks, self.shared)
    }
}

/// The launch for `rows` rows of `hidden`.
pub fn plan(rows: usize, hidden: usize, facts: &Facts) -> Plan {
    let (row, shared) = (hidden * 4, facts.shared_memory as usize);
    let (split, blocks, each) = if rows >= MANY && SHARED_ROWS * row + STATIC <= shared {
        (Split::Eight, rows.div_ceil(SHARED_ROWS), SHARED_ROWS * row)
    } else if rows < MANY && facts.capability >= CLUSTERS {
        (Split::Spread, rows * SPREAD, row)
    } else {
        (Split::One, rows, row)
    };
    Plan { split, blocks: blocks as u32, shared: each as u32 }
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
        let facts = device.facts();
        let shared = (facts.shared_memory as usize).saturating_sub(STATIC);
        let spread = if facts.capability >= CLUSTERS {
            Some(device.kernel("route", "route_spread", shared)?)
        } else {
            None
        };
        Ok(Self {
            one: device.kernel("route", "route_one", shared)?,
            eight: device.kernel("route", "route_eight", shared)?,
            spread,
        })
    }

    /// Issues it.
    ///
    /// # Errors
    /// Buffers that are too small, sizes out of bounds, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let Call { rows, hidden, experts, top_k, .. } = *call;
        let shared = device.facts().shared_memory as usize;
        let plan = plan(rows, hidden, device.facts());
        let fits = hidden.is_multiple_of(64)
            && hidden > 0
            && plan.shared as usize + STATIC <= shared
            && (1..=MOST_EXPERTS).contains(&experts)
            && (1..=MOST_CHOICES.min(experts)).contains(&top_k)
            && call.x.len() >= rows * hidden
            && call.norm.len() >= hidden
            && call.router.len() >= experts * hidden
            && call.bias.len() >= experts
            && !call.live.is_empty()
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
        let (kernel, block) = match (plan.split, &self.spread) {
            (Split::Spread, Some(spread)) => (spread, SPREAD_THREADS),
            (Split::Spread, None) => return Err(DeviceError::new(OP, "no kernel with clusters was loaded")),
            (Split::One, _) => (&self.one, THREADS),
            (Split::Eight, _) => (&self.eight, THREADS),
        };
        let launch = Launch { grid: [plan.blocks, 1, 1], block, shared: plan.shared, overlap: true };
        // SAFETY: every buffer was checked to be large enough for `rows`, which `live` does not exceed.
        unsafe { device.launch(kernel, &launch, &arguments) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::moe_gate_up::tests::facts;

    #[test]
    fn decode_spreads_a_row_and_prefill_shares_weights() {
        let h200 = facts(232_448);
        assert_eq!(plan(1, 2880, &h200), Plan { split: Split::Spread, blocks: 8, shared: 11_520 });
        assert_eq!(plan(64, 2880, &h200).blocks, 512);
        assert_eq!(plan(65, 2880, &h200), Plan { split: Split::Eight, blocks: 9, shared: 92_160 });
        // Rows that do not fit eight at a time.
        assert_eq!(plan(100, 8192, &h200), Plan { split: Split::One, blocks: 100, shared: 32_768 });
        let ampere = Facts { capability: (8, 0), ..facts(166_912) };
        assert_eq!(plan(64, 2880, &ampere), Plan { split: Split::One, blocks: 64, shared: 11_520 });
        assert_eq!(plan(100, 2880, &h200).to_string(), "Eight, 13 blocks, 92160 bytes shared");
    }
}
