//! The paged KV pools in host memory.

use std::borrow::Cow;

use ctxserve_backend::{DeviceError, KvDtype, KvPlan, PageId};
use half::bf16;

/// Slots of a page are padded to this many, so that a vector of scores never crosses a page.
pub(crate) const SLOT_LANES: usize = 8;

/// The pools of all groups.
///
/// A page of one layer holds, per key/value head, keys as `[head_dim, slots]` (slots contiguous, so that scores
/// of neighbouring positions share a vector) and values as `[slots, head_dim]`.
#[derive(Debug)]
pub struct CpuKv {
    plan: KvPlan,
    slots: usize,
    pools: Vec<Pool>,
}

/// One group's pages.
#[derive(Debug)]
enum Pool {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    /// What e4m3 with one scale per position and head would hold, as f32: the definition of that storage, without its
    /// thrift.
    Fp8(Vec<f32>),
}

/// Part of a page.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cells<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

impl Cells<'_> {
    pub(crate) fn get(&self, index: usize) -> f32 {
        match self {
            Self::F32(values) => values[index],
            Self::Bf16(values) => values[index].to_f32(),
        }
    }
}

impl CpuKv {
    pub(crate) fn new(plan: &KvPlan) -> Result<Self, DeviceError> {
        let fail = |what: &str| Err(DeviceError::new("allocate_kv", what));
        let spec = &plan.spec;
        if plan.pages.len() != spec.groups.len() {
            return fail("one page count per group is needed");
        }
        if spec.page_size == 0 || spec.kv_heads == 0 || spec.head_dim == 0 {
            return fail("page size, heads and head size must be positive");
        }
        let slots = spec.page_size.next_multiple_of(SLOT_LANES);
        let mut pools = Vec::with_capacity(plan.pages.len());
        for (group, &pages) in spec.groups.iter().zip(&plan.pages) {
            let page = (2 * slots * spec.head_dim).checked_mul(spec.kv_heads);
            let count =
                page.and_then(|n| n.checked_mul(pages)).and_then(|n| n.checked_mul(group.layers.len()));
            let Some(count) = count else { return fail("the pool's size overflows") };
            let pool = match group.dtype {
                KvDtype::F32 => zeros(count).map(Pool::F32),
                KvDtype::Bf16 => zeros(count).map(Pool::Bf16),
                KvDtype::Fp8E4m3 => zeros(count).map(Pool::Fp8),
            };
            match pool {
                Some(pool) => pools.push(pool),
                None => return fail("out of memory"),
            }
        }
        Ok(Self { plan: plan.clone(), slots, pools })
    }

    /// What was allocated.
    pub fn plan(&self) -> &KvPlan {
        &self.plan
    }

    /// Slots of a page, padding included: the stride of a key's elements.
    pub(crate) fn slots(&self) -> usize {
        self.slots
    }

    /// Elements of the keys, or of the values, of one head in one page.
    fn head_cells(&self) -> usize {
        self.slots * self.plan.spec.head_dim
    }

    fn offset(&self, group: usize, slot: usize, page: PageId, head: usize) -> usize {
        let heads = self.plan.spec.kv_heads;
        let page = slot * self.plan.pages[group] + page as usize;
        (page * heads + head) * 2 * self.head_cells()
    }

    /// Keys `[head_dim, slots]` and values `[slots, head_dim]` of one head in one page of the `layer`-th layer of
    /// `group`.
    pub(crate) fn page(
        &self,
        group: usize,
        layer: usize,
        page: PageId,
        head: usize,
    ) -> (Cells<'_>, Cells<'_>) {
        let (start, half) = (self.offset(group, layer, page, head), self.head_cells());
        match &self.pools[group] {
            Pool::F32(cells) | Pool::Fp8(cells) => {
                let (keys, values) = cells[start..start + 2 * half].split_at(half);
                (Cells::F32(keys), Cells::F32(values))
            }
            Pool::Bf16(cells) => {
                let (keys, values) = cells[start..start + 2 * half].split_at(half);
                (Cells::Bf16(keys), Cells::Bf16(values))
            }
        }
    }

    /// Stores one position's key and value of one head.
    pub(crate) fn write(
        &mut self,
        (group, layer): (usize, usize),
        (page, slot): (PageId, usize),
        head: usize,
        key: &[f32],
        value: &[f32],
    ) {
        let (start, half, slots) = (self.offset(group, layer, page, head), self.head_cells(), self.slots);
        let dim = self.plan.spec.head_dim;
        let (mut key, mut value) = (Cow::Borrowed(key), Cow::Borrowed(value));
        if matches!(self.pools[group], Pool::Fp8(_)) {
            round_to_e4m3(key.to_mut());
            round_to_e4m3(value.to_mut());
        }
        match &mut self.pools[group] {
            Pool::F32(cells) | Pool::Fp8(cells) => {
                let (keys, values) = cells[start..start + 2 * half].split_at_mut(half);
                keys.iter_mut().skip(slot).step_by(slots).zip(&*key).for_each(|(cell, &x)| *cell = x);
                values[slot * dim..][..dim].copy_from_slice(&value);
            }
            Pool::Bf16(cells) => {
                let (keys, values) = cells[start..start + 2 * half].split_at_mut(half);
                let keys = keys.iter_mut().skip(slot).step_by(slots);
                keys.zip(&*key).for_each(|(cell, &x)| *cell = bf16::from_f32(x));
                let values = values[slot * dim..][..dim].iter_mut();
                values.zip(&*value).for_each(|(cell, &x)| *cell = bf16::from_f32(x));
            }
        }
    }

    /// Fills every cell, for tests that must notice a read of a slot nobody wrote.
    pub fn poison(&mut self, value: f32) {
        for pool in &mut self.pools {
            match pool {
                Pool::F32(cells) | Pool::Fp8(cells) => cells.fill(value),
                Pool::Bf16(cells) => cells.fill(bf16::from_f32(value)),
            }
        }
    }
}

/// Rounds one head's values to e4m3 times a scale of amax / 448 (OCP 8-bit floating point, E4M3: three bits of mantissa,
/// smallest normal exponent -6, largest value 448). A NaN makes the scale one.
fn round_to_e4m3(values: &mut [f32]) {
    const LARGEST: f32 = 448.0;
    let peak = values.iter().fold(0.0, |peak: f32, x| if x.is_nan() { *x } else { peak.max(x.abs()) });
    let scale = peak / LARGEST;
    for x in values {
        if scale == 0.0 {
            continue;
        }
        let y = *x / scale;
        let exponent = y.abs().max(f32::MIN_POSITIVE).log2().floor().max(-6.0);
        let step = (exponent - 3.0).exp2();
        *x = ((y / step).round_ties_even() * step).clamp(-LARGEST, LARGEST) * scale;
    }
}

/// Zeroed memory, or `None` when there is none: a pool's size comes from a flag. The system zeroes a page of it when
/// it is first written, so that an idle pool costs nothing.
fn zeros<T: bytemuck::Zeroable>(count: usize) -> Option<Vec<T>> {
    bytemuck::allocation::try_zeroed_vec(count).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_keeps_three_bits_of_mantissa() {
        let mut values = [448.0, 17.0, 18.0, 19.0, -0.3, 0.001, 0.0];
        round_to_e4m3(&mut values);
        // 17 lies between 16 and 18 and goes to the even one; 0.001 is half of the smallest subnormal, 2^-9.
        assert_eq!(values, [448.0, 16.0, 18.0, 20.0, -0.3125, 0.001_953_125, 0.0]);
        let mut nan = [1.0, f32::NAN];
        round_to_e4m3(&mut nan);
        assert!(nan.iter().all(|x| x.is_nan()));
    }
}
