//! KV pools in device memory, laid out as `kernels/README.md` says.

use ctxserve_backend::{DeviceError, KvDtype, KvPlan, KvSpec};

use crate::driver::{Buffer, Device};
use crate::ops::attention::{Cache, HEAD_DIMS};

const OP: &str = "allocate_kv";

/// The pools of all groups.
#[derive(Debug)]
pub struct CudaKv {
    plan: KvPlan,
    pools: Vec<Pool>,
}

/// The pool of one group.
#[derive(Debug)]
struct Pool {
    data: Buffer<u8>,
    /// Bytes of one layer.
    layer: usize,
    /// Bytes of a layer before its scales; `None` without scales.
    scales: Option<usize>,
}

/// Elements of a head as kernels have it: the next of [`HEAD_DIMS`].
///
/// # Errors
/// A longer head than there are kernels for.
pub(crate) fn padded_head(op: &'static str, head_dim: usize) -> Result<usize, DeviceError> {
    let [.., most] = HEAD_DIMS;
    HEAD_DIMS.into_iter().find(|&dim| dim >= head_dim).ok_or_else(|| {
        DeviceError::new(op, format!("heads of {head_dim} elements; there are kernels for up to {most}"))
    })
}

/// Whether the kernels know this storage.
///
/// # Errors
/// What they do not know, and what they do.
pub fn check(spec: &KvSpec) -> Result<(), DeviceError> {
    let fail = |what: String| Err(DeviceError::new(OP, what));
    if !spec.page_size.is_power_of_two() || !(16..=256).contains(&spec.page_size) {
        return fail(format!("pages of {} positions; they must be 16, 32, 64, 128 or 256", spec.page_size));
    }
    padded_head(OP, spec.head_dim)?;
    if spec.head_dim == 0 || !spec.head_dim.is_multiple_of(2) {
        return fail(format!("heads of {} elements; they must be even", spec.head_dim));
    }
    if spec.groups.iter().any(|group| group.dtype == KvDtype::F32) {
        return fail("keys and values in float32 are for the CPU".to_owned());
    }
    Ok(())
}

impl CudaKv {
    pub(crate) fn new(device: &Device, plan: &KvPlan) -> Result<Self, DeviceError> {
        let spec = &plan.spec;
        check(spec)?;
        let head_dim = padded_head(OP, spec.head_dim)?;
        if plan.pages.len() != spec.groups.len() || plan.pages.contains(&0) {
            return Err(DeviceError::new(OP, "a group without pages"));
        }
        let pool = |(group, &pages): (&ctxserve_backend::KvGroup, &usize)| {
            let fp8 = group.dtype == KvDtype::Fp8E4m3;
            let lines = [2, spec.kv_heads, spec.page_size].iter().try_fold(pages, |n, &by| n.checked_mul(by));
            let bytes = |lines: usize| {
                let data = lines.checked_mul(head_dim * if fp8 { 1 } else { 2 })?;
                let layer = data.checked_add(if fp8 { lines.checked_mul(size_of::<f32>())? } else { 0 })?;
                Some((data, layer, layer.checked_mul(group.layers.len())?))
            };
            let Some((data, layer, all)) = lines.and_then(bytes) else {
                return Err(DeviceError::new(OP, "the pool's size overflows"));
            };
            // Zeroed: a slot that no token has written yet never reads as NaN.
            Ok(Pool { data: device.zeros(all)?, layer, scales: fp8.then_some(data) })
        };
        let pools = spec.groups.iter().zip(&plan.pages).map(pool).collect::<Result<_, _>>()?;
        Ok(Self { plan: plan.clone(), pools })
    }

    pub(crate) fn plan(&self) -> &KvPlan {
        &self.plan
    }

    /// The cache of a model's layer, and the index of its group.
    pub(crate) fn layer(&self, op: &'static str, layer: usize) -> Result<(usize, Cache), DeviceError> {
        let spec = &self.plan.spec;
        let found = spec.place(layer).and_then(|(group, at)| Some((group, at, self.pools.get(group)?)));
        let Some((group, at, pool)) = found else {
            return Err(DeviceError::new(op, format!("layer {layer} has no KV group")));
        };
        let data = pool.data.at(op, at * pool.layer)?;
        let scales = pool.scales.map_or(0, |offset| data + offset as u64);
        let window = spec.groups[group].window;
        Ok((group, Cache { data, scales, page_size: spec.page_size, kv_heads: spec.kv_heads, window }))
    }
}
