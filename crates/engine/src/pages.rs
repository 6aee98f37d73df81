//! Pages and the leases that hold them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ctxserve_backend::{KvPlan, KvSpec, PageId, PageTable};
use thiserror::Error;

/// A broken page invariant: a bug of this module, never a request's doing.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub(crate) enum PageError {
    /// A page is on the free list although a lease owns it, or twice.
    #[error("page {0} is on the free list and owned")]
    FreeAndOwned(PageId),
    /// A page is neither free nor owned.
    #[error("page {0} is lost")]
    Lost(usize),
    /// A page is in the table of a lease that does not own it.
    #[error("page {0} is in a table that does not own it")]
    Stolen(PageId),
}

/// Who holds which page of one pool.
#[derive(Debug)]
struct Ledger {
    /// Free pages; the one freed last is taken first, so that memory never used stays untouched.
    free: Vec<PageId>,
    /// Owning lease of each page, 0 where free.
    owner: Vec<u64>,
    /// The next lease's name.
    next: u64,
}

/// The pages of one KV group.
#[derive(Clone, Debug)]
pub(crate) struct PagePool {
    ledger: Arc<Mutex<Ledger>>,
    capacity: usize,
}

impl PagePool {
    /// A pool of `capacity` free pages.
    pub(crate) fn new(capacity: usize) -> Self {
        let free = (0..capacity).rev().filter_map(|page| PageId::try_from(page).ok()).collect();
        let ledger = Ledger { free, owner: vec![0; capacity], next: 1 };
        Self { ledger: Arc::new(Mutex::new(ledger)), capacity }
    }

    /// Every update leaves the ledger whole before it could unwind, so a poisoned lock is still good.
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pages of the pool.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Pages free now.
    pub(crate) fn free(&self) -> usize {
        self.ledger().free.len()
    }

    /// A lease that holds nothing yet.
    pub(crate) fn lease(&self) -> Lease {
        let mut ledger = self.ledger();
        let id = ledger.next;
        ledger.next += 1;
        Lease { pool: self.clone(), id }
    }

    /// Checks that every page is owned by one lease or free once.
    ///
    /// # Errors
    /// The first page of which that is not so.
    pub(crate) fn check(&self) -> Result<(), PageError> {
        let ledger = self.ledger();
        let mut is_free = vec![false; self.capacity];
        for &page in &ledger.free {
            let slot = is_free.get_mut(page as usize).ok_or(PageError::Lost(page as usize))?;
            if std::mem::replace(slot, true) || ledger.owner[page as usize] != 0 {
                return Err(PageError::FreeAndOwned(page));
            }
        }
        match is_free.iter().zip(&ledger.owner).position(|(&free, &owner)| !free && owner == 0) {
            Some(page) => Err(PageError::Lost(page)),
            None => Ok(()),
        }
    }
}

/// A sequence's name in the ledger of one pool. Its pages are in the table that goes with it.
#[derive(Debug)]
pub(crate) struct Lease {
    pool: PagePool,
    id: u64,
}

/// The first logical page after those of the table.
fn end(table: &PageTable) -> usize {
    table.first + table.pages.len()
}

/// How many pages of the table come before the logical page `logical`.
fn before(table: &PageTable, logical: usize) -> usize {
    logical.saturating_sub(table.first).min(table.pages.len())
}

impl Lease {
    /// Takes `count` more pages at the table's end: all of them, or none and `false`.
    fn extend(&self, table: &mut PageTable, count: usize) -> bool {
        let mut ledger = self.pool.ledger();
        let Ledger { free, owner, .. } = &mut *ledger;
        let Some(rest) = free.len().checked_sub(count) else { return false };
        for page in free.drain(rest..).rev() {
            owner[page as usize] = self.id;
            table.pages.push(page);
        }
        true
    }

    /// Gives back the pages before the logical page `logical`; later pages keep their places.
    fn release_before(&self, table: &mut PageTable, logical: usize) {
        let count = before(table, logical);
        table.first += count;
        let mut ledger = self.pool.ledger();
        for page in table.pages.drain(..count) {
            ledger.owner[page as usize] = 0;
            ledger.free.push(page);
        }
    }

    /// Checks that it owns what its table names.
    fn check(&self, table: &PageTable) -> Result<(), PageError> {
        let ledger = self.pool.ledger();
        match table.pages.iter().find(|&&page| ledger.owner.get(page as usize) != Some(&self.id)) {
            Some(&page) => Err(PageError::Stolen(page)),
            None => Ok(()),
        }
    }
}

/// The pools of every group.
#[derive(Clone, Debug)]
pub(crate) struct KvPools {
    spec: Arc<KvSpec>,
    pools: Vec<PagePool>,
}

impl KvPools {
    /// Pools of the plan's sizes.
    pub(crate) fn new(plan: &KvPlan) -> Self {
        let pools = plan.pages.iter().map(|&pages| PagePool::new(pages)).collect();
        Self { spec: Arc::new(plan.spec.clone()), pools }
    }

    /// The model's layout.
    pub(crate) fn spec(&self) -> &KvSpec {
        &self.spec
    }

    /// A lease over all groups, holding nothing.
    pub(crate) fn lease(&self) -> KvLease {
        let tables = Arc::new(vec![PageTable::default(); self.pools.len()]);
        KvLease {
            spec: Arc::clone(&self.spec),
            leases: self.pools.iter().map(PagePool::lease).collect(),
            tables,
        }
    }

    /// Free pages of each group.
    pub(crate) fn free(&self) -> Vec<usize> {
        self.pools.iter().map(PagePool::free).collect()
    }

    /// Used pages of each group.
    pub(crate) fn used(&self) -> Vec<usize> {
        self.pools.iter().map(|pool| pool.capacity() - pool.free()).collect()
    }

    /// Checks every pool and the leases given.
    ///
    /// # Errors
    /// The first broken page.
    pub(crate) fn check<'a>(&self, leases: impl Iterator<Item = &'a KvLease>) -> Result<(), PageError> {
        self.pools.iter().try_for_each(PagePool::check)?;
        leases.flat_map(|lease| lease.leases.iter().zip(&*lease.tables)).try_for_each(|(l, t)| l.check(t))
    }
}

/// All pages of one sequence; they go back to their pools on drop.
#[derive(Debug)]
pub(crate) struct KvLease {
    spec: Arc<KvSpec>,
    leases: Vec<Lease>,
    /// One per group, pages in logical order. A step's batch shares them until it is launched; nothing changes them
    /// meanwhile, so [`Arc::make_mut`] copies nothing.
    tables: Arc<Vec<PageTable>>,
}

impl Drop for KvLease {
    fn drop(&mut self) {
        self.clear();
    }
}

impl KvLease {
    /// Holds pages for every position below `end` that is still visible: all that is missing, or nothing and `false`.
    pub(crate) fn grow(&mut self, end: usize) -> bool {
        let pages = end.div_ceil(self.spec.page_size);
        let missing = |table: &PageTable| pages.saturating_sub(self::end(table));
        if self.tables.iter().all(|table| missing(table) == 0) {
            return true;
        }
        let mut pairs = self.leases.iter().zip(&*self.tables);
        if !pairs.all(|(lease, table)| lease.pool.free() >= missing(table)) {
            return false;
        }
        let mut pairs = self.leases.iter().zip(Arc::make_mut(&mut self.tables));
        pairs.all(|(lease, table)| lease.extend(table, missing(table)))
    }

    /// Gives back what a query at `next` or later cannot see.
    pub(crate) fn slide(&mut self, next: usize) {
        for (group, lease) in self.leases.iter().enumerate() {
            let first = self.spec.first_visible(group, next) / self.spec.page_size;
            if self.tables.get(group).is_some_and(|table| before(table, first) > 0) {
                lease.release_before(&mut Arc::make_mut(&mut self.tables)[group], first);
            }
        }
    }

    /// Gives everything back.
    pub(crate) fn clear(&mut self) {
        for (lease, table) in self.leases.iter().zip(Arc::make_mut(&mut self.tables)) {
            lease.release_before(table, usize::MAX);
            table.first = 0;
        }
    }

    /// Pages held of one group.
    pub(crate) fn held(&self, group: usize) -> usize {
        self.tables.get(group).map_or(0, |table| table.pages.len())
    }

    /// One table per group.
    pub(crate) fn tables(&self) -> &Arc<Vec<PageTable>> {
        &self.tables
    }
}

#[cfg(test)]
mod tests {
    use ctxserve_backend::{KvDtype, KvGroup};
    use proptest::prelude::*;

    use super::*;

    fn plan(window: usize, pages: [usize; 2]) -> KvPlan {
        let groups = vec![
            KvGroup { window: Some(window), layers: vec![0], dtype: KvDtype::F32 },
            KvGroup { window: None, layers: vec![1], dtype: KvDtype::F32 },
        ];
        let spec = KvSpec { page_size: 4, kv_heads: 1, head_dim: 1, groups };
        KvPlan { spec, pages: pages.to_vec() }
    }

    #[test]
    fn growth_is_all_groups_or_none() {
        let pools = KvPools::new(&plan(4, [8, 2]));
        let mut lease = pools.lease();
        assert!(!lease.grow(9));
        assert_eq!(pools.used(), [0, 0]);
        assert!(lease.grow(8));
        assert_eq!(pools.used(), [2, 2]);
        drop(lease);
        assert_eq!(pools.used(), [0, 0]);
    }

    /// OPS-07.
    #[test]
    fn a_windowed_group_holds_the_window_and_no_more() {
        let plan = plan(6, [10, 100]);
        let pools = KvPools::new(&plan);
        let mut lease = pools.lease();
        for position in 0..200 {
            assert!(lease.grow(position + 1), "no page for {position}");
            let first = plan.spec.first_visible(0, position);
            for seen in first..=position {
                assert!(lease.tables()[0].locate(seen, 4).is_some(), "{seen} unseen at {position}");
            }
            assert!(lease.held(0) <= plan.spec.pages_for(0, position + 1, 1));
            lease.slide(position + 1);
        }
        assert_eq!(lease.held(1), 50);
    }

    proptest! {
        /// Random leases that grow, slide, start over and end: no page is lost, shared or stolen, and nothing is
        /// held once all are gone.
        #[test]
        fn every_page_has_one_owner(
            pages in prop::array::uniform2(1_usize..12),
            window in 1_usize..20,
            actions in prop::collection::vec((0_usize..5, 0_usize..4, 0_usize..40), 1..120),
        ) {
            let pools = KvPools::new(&plan(window, pages));
            let mut leases: Vec<Option<(KvLease, usize)>> = vec![None, None, None, None, None];
            for (which, action, amount) in actions {
                let slot = &mut leases[which];
                match (action, slot.as_mut()) {
                    (_, None) => *slot = Some((pools.lease(), 0)),
                    (0, Some((lease, end))) => {
                        let before = pools.used();
                        if lease.grow(*end + amount) {
                            *end += amount;
                        } else {
                            prop_assert_eq!(pools.used(), before);
                        }
                    }
                    (1, Some((lease, end))) => lease.slide(*end),
                    (2, Some((lease, end))) => {
                        lease.clear();
                        *end = 0;
                    }
                    (_, Some(_)) => *slot = None,
                }
                prop_assert_eq!(pools.check(leases.iter().flatten().map(|(lease, _)| lease)), Ok(()));
                for group in 0..2 {
                    let held: usize = leases.iter().flatten().map(|(lease, _)| lease.held(group)).sum();
                    prop_assert_eq!(held, pools.used()[group]);
                }
            }
            drop(leases);
            prop_assert_eq!(pools.used(), vec![0, 0]);
            prop_assert_eq!(pools.check(std::iter::empty()), Ok(()));
        }
    }
}
