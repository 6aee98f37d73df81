//! The invariants of pages and tree, checked from scratch.

use std::collections::HashMap;

use ctxserve_backend::PageId;
use thiserror::Error;

use super::pool::Holder;
use super::tree::{NONE, NodeId};
use super::{KvLease, State};

/// A broken invariant: a bug of this module, never a request's doing.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub(crate) enum PageError {
    /// A page is on the free list although someone holds it, or twice.
    #[error("page {0} is on the free list and held")]
    FreeAndHeld(PageId),
    /// A page is neither free nor in a table nor in the tree, or in two places.
    #[error("{0} pages of group {1} are lost")]
    Lost(usize, usize),
    /// A page is in the table of a lease that may not use it.
    #[error("page {0} is in a table that may not have it")]
    Stolen(PageId),
    /// A node's page is held by someone else.
    #[error("node {0} has a page that is not its own")]
    NotItsOwn(NodeId),
    /// A node's counts of users or children are wrong.
    #[error("node {0} is counted wrongly")]
    Counts(NodeId),
    /// The tree's totals are wrong.
    #[error("the prefix tree is counted wrongly")]
    Totals,
}

/// Checks that every page is free, in one lease, or in one node, and that the tree counts its users rightly.
///
/// # Errors
/// The first of which that is not so.
pub(super) fn check(state: &State, leases: &[&KvLease]) -> Result<(), PageError> {
    let State { pools, tree, .. } = state;
    let mut users: HashMap<(NodeId, usize), u32> = HashMap::new();
    for (group, pool) in pools.iter().enumerate() {
        let mut seen = vec![false; pool.capacity()];
        let mut see = |page: PageId| seen.get_mut(page as usize).is_some_and(|s| !std::mem::replace(s, true));
        for &page in pool.free() {
            if !see(page) || pool.holder(page) != Holder::Free {
                return Err(PageError::FreeAndHeld(page));
            }
        }
        for node in tree.ids() {
            let page = tree.cell(node, group).page;
            let expected = tree.is_full(group);
            if page == NONE && !expected {
                continue;
            }
            if page == NONE || !see(page) || pool.holder(page) != Holder::Node(node) {
                return Err(PageError::NotItsOwn(node));
            }
        }
        for lease in leases {
            for &page in &lease.tables[group].pages {
                let good = match pool.holder(page) {
                    Holder::Free => false,
                    Holder::Lease(id) => id == lease.id && see(page),
                    Holder::Node(node) => {
                        *users.entry((node, group)).or_default() += 1;
                        tree.cell(node, group).page == page
                    }
                };
                if !good {
                    return Err(PageError::Stolen(page));
                }
            }
        }
        match seen.iter().filter(|&&seen| !seen).count() {
            0 => {}
            lost => return Err(PageError::Lost(lost, group)),
        }
    }
    counts(state, leases, &users)
}

fn counts(
    state: &State,
    leases: &[&KvLease],
    users: &HashMap<(NodeId, usize), u32>,
) -> Result<(), PageError> {
    let tree = &state.tree;
    let mut children: HashMap<NodeId, u32> = HashMap::new();
    let mut active: HashMap<NodeId, u32> = HashMap::new();
    leases.iter().filter_map(|lease| lease.at).for_each(|at| *active.entry(at).or_default() += 1);
    for node in tree.ids() {
        let parent = tree.node(node).parent;
        *children.entry(parent).or_default() += 1;
        if tree.node(node).active > 0 {
            *active.entry(parent).or_default() += 1;
        }
    }
    let (mut in_use, mut leaves) = (0, 0);
    for node in tree.ids() {
        let state = tree.node(node);
        let count = |of: &HashMap<NodeId, u32>| of.get(&node).copied().unwrap_or(0);
        if state.children != count(&children) || state.active != count(&active) {
            return Err(PageError::Counts(node));
        }
        in_use += usize::from(state.active > 0);
        leaves += usize::from(state.active == 0 && state.children == 0);
        for group in (0..tree.idle.len()).filter(|&group| !tree.is_full(group)) {
            if tree.cell(node, group).users != users.get(&(node, group)).copied().unwrap_or(0) {
                return Err(PageError::Counts(node));
            }
        }
    }
    let idle = |(group, idle): (usize, &std::collections::BTreeSet<_>)| {
        let unused = |&node: &NodeId| {
            let cell = tree.cell(node, group);
            !tree.is_full(group) && cell.page != NONE && cell.users == 0
        };
        idle.len() == tree.ids().filter(unused).count()
    };
    let good = tree.in_use == in_use
        && tree.leaves.len() == leaves
        && tree.leaves.iter().all(|&(_, node)| tree.node(node).active == 0)
        && tree.idle.iter().enumerate().all(idle);
    if good { Ok(()) } else { Err(PageError::Totals) }
}
