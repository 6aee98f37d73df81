//! The pages of one KV group, and who holds each.

use ctxserve_backend::PageId;

use super::tree::NodeId;

/// Who holds a page: one of these at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holder {
    /// The free list.
    Free,
    /// One sequence's lease, which may write to it.
    Lease(u64),
    /// A node of the prefix tree: it is never written to again, and any number of sequences may read it.
    Node(NodeId),
}

/// The pages of one group.
#[derive(Debug)]
pub(super) struct Pool {
    /// Free pages; the one freed last is taken first, so that memory never used stays untouched.
    free: Vec<PageId>,
    holders: Vec<Holder>,
}

impl Pool {
    /// A pool of `capacity` free pages.
    pub(super) fn new(capacity: usize) -> Self {
        let free = (0..capacity).rev().filter_map(|page| PageId::try_from(page).ok()).collect();
        Self { free, holders: vec![Holder::Free; capacity] }
    }

    /// Pages of the pool.
    pub(super) fn capacity(&self) -> usize {
        self.holders.len()
    }

    /// Pages on the free list.
    pub(super) fn free(&self) -> &[PageId] {
        &self.free
    }

    /// Who holds a page.
    pub(super) fn holder(&self, page: PageId) -> Holder {
        self.holders.get(page as usize).copied().unwrap_or(Holder::Free)
    }

    /// Takes a free page.
    pub(super) fn take(&mut self, holder: Holder) -> Option<PageId> {
        let page = self.free.pop()?;
        self.hand(page, holder);
        Some(page)
    }

    /// Gives a held page to someone else.
    pub(super) fn hand(&mut self, page: PageId, holder: Holder) {
        if let Some(slot) = self.holders.get_mut(page as usize) {
            *slot = holder;
        }
    }

    /// Puts a held page back on the free list.
    pub(super) fn give(&mut self, page: PageId) {
        self.hand(page, Holder::Free);
        self.free.push(page);
    }
}
