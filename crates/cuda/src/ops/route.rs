//! The router: RMSNorm, logits, the greatest few, their softmax.

use std::fmt;

use ctxserve_backend::DeviceError;

use crate::driver::{Buffer, Device, Facts, Kernel, Launch, Params};

const OP: &str = "route";
/// Threads of a block for one row.
const ONE_THREADS: u32 = 512;
/// Threads of every other block.
const THREADS: u32 = 256;
/// Blocks of a cluster.
const CLUSTER: usize = 8;
/// Static shared memory of any of the kernels, at the most.
const STATIC: usize = 9 * 1024;
/// Warps of a block on the tensor cores.
const WARPS: usize = 8;
/// Rows up to which each has a cluster of its own, those up to which a cluster shares the columns of sixteen rows, and those up to
/// which a block has sixteen.
const SPREAD_ROWS: usize = 16;
const SPLIT_ROWS: usize = 512;
const SOME_ROWS: usize = 2112;
/// Experts that the narrow kernels take.
const NARROW: usize = 32;
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
    scale: u64,
    rows: i32,
    hidden: i32,
    experts: i32,
    top_k: i32,
    eps: f32,
}

// SAFETY: mirrors `Params` of kernels/route.cu.
unsafe impl Params for Arguments {}

/// The loaded kernels.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    one: Kernel,
    many: [Kernel; 2],
    some: Kernel,
    /// Of devices with clusters: a row's, and those of sixteen rows.
    clusters: Option<(Kernel, [Kernel; 2])>,
}

/// How rows and blocks go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// A cluster of eight blocks for each row.
    Spread,
    /// A block for each row.
    One,
    /// On the tensor cores: a cluster of eight blocks for sixteen rows.
    Split,
    /// On the tensor cores: a block for thirty-two rows, sixteen where there are more than 32 experts.
    Many,
    /// On the tensor cores: a block for sixteen rows.
    Some,
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

/// Shared memory in which the warps of a block meet: `Meeting` of kernels/route.cu.
fn meeting(rows: usize, experts: usize) -> usize {
    let columns = if experts <= NARROW { NARROW } else { MOST_EXPERTS };
    WARPS * rows * (columns + 8 + 1) * 4
}

impl Plan {
    /// The launch of a way of splitting.
    pub fn of(split: Split, rows: usize, hidden: usize, experts: usize) -> Self {
        let many = if experts <= NARROW { 32 } else { 16 };
        let (blocks, shared) = match split {
            Split::Spread => (rows * CLUSTER, hidden * 4),
            Split::One => (rows, hidden * 4),
            Split::Split => (rows.div_ceil(16) * CLUSTER, meeting(16, experts)),
            Split::Many => (rows.div_ceil(many), meeting(many, experts)),
            Split::Some => (rows.div_ceil(16), meeting(16, experts)),
        };
        Self { split, blocks: blocks as u32, shared: shared as u32 }
    }
}

/// The launch for `rows` rows of `hidden`, with the normed rows or with their scales.
pub fn plan(rows: usize, hidden: usize, experts: usize, normed: bool, facts: &Facts) -> Plan {
    let clusters = facts.capability >= CLUSTERS;
    let split = match (normed, clusters) {
        (true, true) if rows <= SPREAD_ROWS => Split::Spread,
        (true, true) => Split::Split,
        (true, false) => Split::One,
        (false, true) if rows <= SPLIT_ROWS => Split::Split,
        (false, _) if rows <= SOME_ROWS && experts <= NARROW => Split::Some,
        (false, _) => Split::Many,
    };
    Plan::of(split, rows, hidden, experts)
}

/// What is kept of the norm.
#[derive(Clone, Copy, Debug)]
pub enum Normed<'a> {
    /// `[rows, hidden]`: `RMSNorm(x)`, bits of fp16 in fragment order, which `moe_gate_up` reads. Meant for few rows.
    Rows(&'a Buffer<u16>),
    /// `[rows]`: `1 / sqrt(mean(x^2) + eps)`, which `moe_scatter` reads. Meant for many rows.
    Scales(&'a Buffer<f32>),
}

/// The logits of `RMSNorm(x)`, and of them the `top_k` greatest (ties: the lowest index; a NaN is above all) with their softmax.
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
    /// What else is written.
    pub normed: Normed<'a>,
    /// Most rows, which the grid is made for.
    pub rows: usize,
    /// Width, a multiple of 64.
    pub hidden: usize,
    /// Experts, at most 128.
    pub experts: usize,
    /// Experts of a row, at most 8.
    pub top_k: usize,
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
        let kernel = |function| device.kernel(OP, function, shared);
        let clusters = if facts.capability >= CLUSTERS {
            Some((kernel("route_spread")?, [kernel("route_split_32")?, kernel("route_split_128")?]))
        } else {
            None
        };
        Ok(Self {
            one: kernel("route_one")?,
            many: [kernel("route_many_32")?, kernel("route_many_128")?],
            some: kernel("route_some_32")?,
            clusters,
        })
    }

    /// Issues it as [`plan`] says.
    ///
    /// # Errors
    /// Buffers that are too small, sizes out of bounds, or a device fault.
    pub fn issue(&self, device: &Device, call: &Call<'_>) -> Result<(), DeviceError> {
        let normed = matches!(call.normed, Normed::Rows(_));
        let plan = plan(call.rows, call.hidden, call.experts, normed, device.facts());
        self.issue_as(device, call, plan.split)
    }

    /// Issues it split in a given way, for tests and measurements.
    ///
    /// # Errors
    /// A way that does not write what is asked for or that the device does not have; those of [`Self::issue`].
    pub fn issue_as(&self, device: &Device, call: &Call<'_>, split: Split) -> Result<(), DeviceError> {
        let Call { rows, hidden, experts, top_k, .. } = *call;
        let room = (device.facts().shared_memory as usize).saturating_sub(STATIC);
        let plan = Plan::of(split, rows, hidden, experts);
        let (h, scale, normed_fits) = match call.normed {
            Normed::Rows(h) => (h.address(), 0, h.len() >= rows * hidden),
            Normed::Scales(scale) => (0, scale.address(), scale.len() >= rows),
        };
        let wide = usize::from(experts > NARROW);
        let kernel = match (split, &self.clusters, call.normed) {
            (Split::Spread, Some((spread, _)), Normed::Rows(_)) => spread,
            (Split::One, _, Normed::Rows(_)) => &self.one,
            (Split::Split, Some((_, split)), _) => &split[wide],
            (Split::Some, _, Normed::Scales(_)) if wide == 0 => &self.some,
            (Split::Many, _, Normed::Scales(_)) => &self.many[wide],
            _ => return Err(DeviceError::new(OP, format!("there is no kernel for {split:?}"))),
        };
        let fits = hidden.is_multiple_of(64)
            && hidden > 0
            && plan.shared as usize <= room
            && (1..=MOST_EXPERTS).contains(&experts)
            && (1..=MOST_CHOICES.min(experts)).contains(&top_k)
            && call.x.len() >= rows * hidden
            && call.norm.len() >= hidden
            && call.router.len() >= experts * hidden
            && call.bias.len() >= experts
            && !call.live.is_empty()
            && call.choice.len() >= rows * top_k
            && call.weight.len() >= rows * top_k
            && normed_fits;
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
            h,
            scale,
            rows: rows as i32,
            hidden: hidden as i32,
            experts: experts as i32,
            top_k: top_k as i32,
            eps: call.eps,
        };
        let block = if split == Split::One { ONE_THREADS } else { THREADS };
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
        let plan = |rows, experts, normed, facts| plan(rows, 2880, experts, normed, facts);
        assert_eq!(plan(1, 32, true, &h200), Plan { split: Split::Spread, blocks: 8, shared: 11_520 });
        assert_eq!(plan(64, 32, true, &h200), plan(64, 32, false, &h200));
        assert_eq!(plan(64, 32, false, &h200), Plan { split: Split::Split, blocks: 32, shared: 20_992 });
        assert_eq!(plan(8192, 32, false, &h200), Plan { split: Split::Many, blocks: 256, shared: 41_984 });
        assert_eq!(plan(8192, 128, false, &h200), Plan { split: Split::Many, blocks: 512, shared: 70_144 });
        let ampere = Facts { capability: (8, 0), ..facts(166_912) };
        assert_eq!(plan(16, 32, true, &ampere), Plan { split: Split::One, blocks: 16, shared: 11_520 });
        assert_eq!(plan(64, 32, false, &ampere).to_string(), "Some, 4 blocks, 20992 bytes shared");
        assert_eq!(plan(2113, 32, false, &ampere).blocks, 67);
    }
}
