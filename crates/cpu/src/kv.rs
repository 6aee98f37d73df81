//! The paged KV pools in host memory.

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
                KvDtype::Fp8E4m3 => return fail("the CPU stores KV as f32 or bf16, not fp8"),
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
            Pool::F32(cells) => {
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
        match &mut self.pools[group] {
            Pool::F32(cells) => {
                let (keys, values) = cells[start..start + 2 * half].split_at_mut(half);
                keys.iter_mut().skip(slot).step_by(slots).zip(key).for_each(|(cell, &x)| *cell = x);
                values[slot * dim..][..dim].copy_from_slice(value);
            }
            Pool::Bf16(cells) => {
                let (keys, values) = cells[start..start + 2 * half].split_at_mut(half);
                let keys = keys.iter_mut().skip(slot).step_by(slots);
                keys.zip(key).for_each(|(cell, &x)| *cell = bf16::from_f32(x));
                let values = values[slot * dim..][..dim].iter_mut();
                values.zip(value).for_each(|(cell, &x)| *cell = bf16::from_f32(x));
            }
        }
    }

    /// Fills every cell, for tests that must notice a read of a slot nobody wrote.
    pub fn poison(&mut self, value: f32) {
        for pool in &mut self.pools {
            match pool {
                Pool::F32(cells) => cells.fill(value),
                Pool::Bf16(cells) => cells.fill(bf16::from_f32(value)),
            }
        }
    }
}

/// Zeroed memory, or `None` when there is none: a pool's size comes from a flag. The system zeroes a page of it when
/// it is first written, so that an idle pool costs nothing.
fn zeros<T: bytemuck::Zeroable>(count: usize) -> Option<Vec<T>> {
    bytemuck::allocation::try_zeroed_vec(count).ok()
}
