//! The KV pages of all groups: who holds them, and which are kept for prompts that begin as earlier ones did.

mod check;
mod ghosts;
mod pool;
mod tree;

use std::borrow::Cow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ctxserve_backend::{KvPlan, KvSpec, PageTable};
use ctxserve_core::TokenId;

pub(crate) use check::PageError;
pub(crate) use ghosts::Lost;
use pool::{Holder, Pool};
pub(crate) use tree::{Match, Salt};
use tree::{NONE, NodeId, Tree, first_page};

/// Tokens between the points of a long prompt or answer at which windowed groups keep what a query there sees: the most
/// that is computed again where a later prompt parts from it anywhere.
const CHECKPOINT: usize = 2048;

/// A sequence's tokens as far as they are known.
#[derive(Clone, Copy, Debug)]
pub(crate) struct History<'a> {
    /// What was asked.
    pub(crate) prompt: &'a [TokenId],
    /// What was answered so far.
    pub(crate) generated: &'a [TokenId],
}

impl<'a> History<'a> {
    /// Tokens.
    pub(crate) fn len(&self) -> usize {
        self.prompt.len() + self.generated.len()
    }

    /// The tokens of one whole page.
    fn page(&self, page: usize, size: usize) -> Cow<'a, [TokenId]> {
        let (start, end, turn) = (page * size, (page + 1) * size, self.prompt.len());
        if end <= turn {
            Cow::Borrowed(&self.prompt[start..end])
        } else if start >= turn {
            Cow::Borrowed(&self.generated[start - turn..end - turn])
        } else {
            Cow::Owned([&self.prompt[start..], &self.generated[..end - turn]].concat())
        }
    }

    /// Tokens that two sequences begin with alike.
    pub(crate) fn common(&self, other: &Self) -> usize {
        let tokens = |history: &Self| history.prompt.iter().chain(history.generated).copied();
        let shorter = self.prompt.len().min(other.prompt.len());
        if self.prompt[..shorter] == other.prompt[..shorter] {
            let (a, b) = (tokens(self).skip(shorter), tokens(other).skip(shorter));
            return shorter + a.zip(b).take_while(|(a, b)| a == b).count();
        }
        self.prompt.iter().zip(other.prompt).take_while(|(a, b)| a == b).count()
    }
}

/// Pages and the prefix tree.
#[derive(Debug)]
struct State {
    spec: Arc<KvSpec>,
    pools: Vec<Pool>,
    tree: Tree,
    /// The next lease's name.
    next: u64,
}

impl State {
    /// Pages of a group that nobody uses: free ones, and those kept for later prompts.
    fn available(&self, group: usize) -> usize {
        self.pools[group].free().len() + self.tree.evictable(group)
    }

    /// Takes a page, from the tree where none is free.
    fn take(&mut self, group: usize, holder: Holder) -> Option<u32> {
        while self.pools[group].free().is_empty() {
            if self.tree.is_full(group) {
                let pages = self.tree.evict_leaf(Lost::Evicted)?;
                pages.into_iter().for_each(|(group, page)| self.pools[group].give(page));
            } else {
                let page = self.tree.evict_window(group)?;
                self.pools[group].give(page);
            }
        }
        self.pools[group].take(holder)
    }

    /// Takes a page of a windowed group out of a lease's table.
    fn drop_window(&mut self, group: usize, page: u32) {
        match self.pools[group].holder(page) {
            Holder::Lease(_) => self.pools[group].give(page),
            Holder::Node(node) => self.tree.release(node, group),
            Holder::Free => {}
        }
    }
}

/// The pools of every group.
#[derive(Clone, Debug)]
pub(crate) struct KvPools {
    spec: Arc<KvSpec>,
    state: Arc<Mutex<State>>,
    caching: bool,
}

/// Every update leaves the state whole before it could unwind, so a poisoned lock is still good.
fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl KvPools {
    /// Pools of the plan's sizes. With `caching` prompts reuse what was computed for earlier ones; it takes a group
    /// with full attention, whose pages name the tokens.
    pub(crate) fn new(plan: &KvPlan, caching: bool) -> Self {
        let spec = Arc::new(plan.spec.clone());
        let pools = plan.pages.iter().map(|&pages| Pool::new(pages)).collect();
        let state = State { pools, tree: Tree::new(Arc::clone(&spec)), next: 1, spec: Arc::clone(&spec) };
        let caching = caching && spec.groups.iter().any(|group| group.window.is_none());
        Self { spec, state: Arc::new(Mutex::new(state)), caching }
    }

    /// The model's layout.
    pub(crate) fn spec(&self) -> &KvSpec {
        &self.spec
    }

    /// Whether prompts reuse what was computed for earlier ones.
    pub(crate) fn caching(&self) -> bool {
        self.caching
    }

    /// A lease over all groups, holding nothing.
    pub(crate) fn lease(&self) -> KvLease {
        let mut state = lock(&self.state);
        let id = state.next;
        state.next += 1;
        KvLease {
            spec: Arc::clone(&self.spec),
            state: Arc::clone(&self.state),
            id,
            tables: Arc::new(vec![PageTable::default(); self.spec.groups.len()]),
            at: None,
            published: 0,
            known: Match::default(),
            keeps: Vec::new(),
        }
    }

    /// Pages of each group that no sequence uses.
    pub(crate) fn free(&self) -> Vec<usize> {
        let state = lock(&self.state);
        (0..state.pools.len()).map(|group| state.available(group)).collect()
    }

    /// Pages of each group that sequences use.
    pub(crate) fn used(&self) -> Vec<usize> {
        let state = lock(&self.state);
        (0..state.pools.len()).map(|g| state.pools[g].capacity() - state.available(g)).collect()
    }

    /// Pages of each group that are kept for later prompts and that no sequence uses.
    pub(crate) fn kept(&self) -> Vec<usize> {
        let state = lock(&self.state);
        (0..state.pools.len()).map(|group| state.tree.evictable(group)).collect()
    }

    /// Forgets every prefix. What sequences use stays theirs, and is found by nobody else.
    pub(crate) fn reset(&self) {
        let mut state = lock(&self.state);
        state.tree.cut_off();
        while let Some(pages) = state.tree.evict_leaf(Lost::Reset) {
            pages.into_iter().for_each(|(group, page)| state.pools[group].give(page));
        }
    }

    /// Checks that every page is where the books say it is; `leases` are all there are.
    ///
    /// # Errors
    /// The first of which that is not so.
    pub(crate) fn check<'a>(&self, leases: impl Iterator<Item = &'a KvLease>) -> Result<(), PageError> {
        let leases: Vec<_> = leases.collect();
        check::check(&lock(&self.state), &leases)
    }
}

/// All pages of one sequence; they go back to their pools, or stay in the tree, on drop.
#[derive(Debug)]
pub(crate) struct KvLease {
    spec: Arc<KvSpec>,
    state: Arc<Mutex<State>>,
    id: u64,
    /// One per group, pages in logical order. A step's batch shares them until it is launched; nothing changes them
    /// meanwhile, so [`Arc::make_mut`] copies nothing. The first `published` pages of full groups are the tree's.
    tables: Arc<Vec<PageTable>>,
    /// The node of the last published page, or the root; pinned. `None` where nothing is shared.
    at: Option<NodeId>,
    /// Pages that are in the tree.
    published: usize,
    /// What the tree knew of this sequence when it was asked last.
    known: Match,
    /// Depths, in pages, at which someone is likely to part from this sequence.
    keeps: Vec<usize>,
}

impl Drop for KvLease {
    fn drop(&mut self) {
        self.clear();
    }
}

/// The first logical page after those of the table.
fn end(table: &PageTable) -> usize {
    table.first + table.pages.len()
}

impl KvLease {
    /// Holds pages for every position below `end` that is still visible: all that is missing, or nothing and `false`.
    pub(crate) fn grow(&mut self, end: usize) -> bool {
        let pages = end.div_ceil(self.spec.page_size);
        let missing = |table: &PageTable| pages.saturating_sub(self::end(table));
        if self.tables.iter().all(|table| missing(table) == 0) {
            return true;
        }
        let mut state = lock(&self.state);
        let mut groups = self.tables.iter().enumerate();
        if !groups.all(|(group, table)| state.available(group) >= missing(table)) {
            return false;
        }
        for (group, table) in Arc::make_mut(&mut self.tables).iter_mut().enumerate() {
            let taken = (0..missing(table)).map_while(|_| state.take(group, Holder::Lease(self.id)));
            table.pages.extend(taken);
        }
        self.tables.iter().all(|table| missing(table) == 0)
    }

    /// Gives back what a query at `next` or later cannot see. The window of the last two page boundaries stays, so that
    /// another sequence can go on from there.
    pub(crate) fn slide(&mut self, next: usize) {
        let boundary = (next / self.spec.page_size).saturating_sub(1);
        for group in 0..self.tables.len() {
            let first = first_page(&self.spec, group, boundary);
            if self.tables[group].first < first {
                self.drop_before(group, first);
            }
        }
    }

    fn drop_before(&mut self, group: usize, logical: usize) {
        let mut state = lock(&self.state);
        let table = &mut Arc::make_mut(&mut self.tables)[group];
        let count = logical.saturating_sub(table.first).min(table.pages.len());
        table.first += count;
        table.pages.drain(..count).for_each(|page| state.drop_window(group, page));
    }

    /// Gives everything back. What is published stays in the tree.
    pub(crate) fn clear(&mut self) {
        for group in 0..self.tables.len() {
            if self.spec.groups[group].window.is_some() {
                self.drop_before(group, usize::MAX);
            } else if !self.tables[group].pages.is_empty() {
                let mut state = lock(&self.state);
                let pages = &mut Arc::make_mut(&mut self.tables)[group].pages;
                pages.drain(..).skip(self.published).for_each(|page| state.pools[group].give(page));
            }
            if self.tables[group].first > 0 {
                Arc::make_mut(&mut self.tables)[group].first = 0;
            }
        }
        if let Some(node) = self.at.take() {
            lock(&self.state).tree.unpin(node);
        }
        self.published = 0;
        self.keeps.clear();
    }

    /// Looks up how much of a sequence's beginning is known, at most `most` pages. Changes nothing.
    pub(crate) fn seek(&mut self, salt: &Salt, history: &History<'_>, most: usize) -> Match {
        let size = self.spec.page_size;
        self.known = lock(&self.state).tree.find(salt, most, self.known, |page| history.page(page, size));
        self.known
    }

    /// How many pages after the deepest known one were known once, and what became of them. `None`: never seen.
    pub(crate) fn lost(&self, salt: &Salt, history: &History<'_>, most: usize) -> Option<(Lost, usize)> {
        let size = self.spec.page_size;
        lock(&self.state).tree.lost(salt, &self.known, most, |page| history.page(page, size))
    }

    /// Whether others begin like this, whatever their salt.
    pub(crate) fn is_opening(&self, history: &History<'_>) -> bool {
        let size = self.spec.page_size;
        history.len() >= size && lock(&self.state).tree.is_opening(&history.page(0, size))
    }

    /// Takes what the last [`KvLease::seek`] found, which nothing has changed since. Returns the positions it holds.
    pub(crate) fn attach(&mut self, salt: &Salt) -> usize {
        self.clear();
        let mut state = lock(&self.state);
        let tree = &mut state.tree;
        let (from, pages) = match self.known.from {
            Some(node) => (node, self.known.pages),
            None => (tree.root(salt), 0),
        };
        tree.pin(from);
        let (mut node, tables) = (from, Arc::make_mut(&mut self.tables));
        for (group, table) in tables.iter_mut().enumerate() {
            table.first = first_page(&self.spec, group, pages);
            table.pages.resize(pages - table.first, NONE);
        }
        for depth in (0..pages).rev() {
            for (group, table) in tables.iter_mut().enumerate() {
                let Some(slot) = depth.checked_sub(table.first) else { continue };
                let full = tree.is_full(group);
                table.pages[slot] = if full { tree.cell(node, group).page } else { tree.enlist(node, group) };
            }
            node = tree.node(node).parent;
        }
        (self.at, self.published) = (Some(from), pages);
        // Someone has parted from this sequence before, deeper than its window was kept.
        if self.known.deepest > pages {
            self.keeps.push(self.known.deepest);
        }
        pages * self.spec.page_size
    }

    /// Someone is likely to part from this sequence after `pages` pages.
    pub(crate) fn keep(&mut self, pages: usize) {
        self.keeps.push(pages);
    }

    /// Pages that are in the tree.
    pub(crate) fn published(&self) -> usize {
        self.published
    }

    /// Lets others use the whole pages of the first `positions` positions, all of which are computed by a step that has
    /// been launched. Where someone was faster, that one's pages take the place of these.
    pub(crate) fn publish(&mut self, history: &History<'_>, positions: usize) {
        let (size, before) = (self.spec.page_size, self.published);
        let upto = positions.min(history.len()) / size;
        let Some(mut at) = self.at.filter(|_| upto > before) else { return };
        let mut state = lock(&self.state);
        let State { pools, tree, .. } = &mut *state;
        let tables = Arc::make_mut(&mut self.tables);
        for depth in before..upto {
            let (node, new) = tree.enter(at, &history.page(depth, size));
            for (group, table) in tables.iter_mut().enumerate() {
                let Some(page) = table.pages.get_mut(depth).filter(|_| tree.is_full(group)) else { continue };
                if new {
                    pools[group].hand(*page, Holder::Node(node));
                    tree.fill(node, group, *page);
                } else {
                    pools[group].give(std::mem::replace(page, tree.cell(node, group).page));
                }
            }
            tree.pin(node);
            tree.unpin(at);
            at = node;
        }
        (self.at, self.published) = (Some(at), upto);
        drop(state);
        let every = (CHECKPOINT / size).max(1);
        let firm = |depth: usize| self.keeps.contains(&depth);
        let points = (before + 1..=upto).filter(|&depth| firm(depth) || depth.is_multiple_of(every));
        let points: Vec<_> = points.map(|depth| (depth, firm(depth))).collect();
        self.keep_windows(&points);
    }

    /// Lets the tree keep what queries after each of these depths see in windowed groups, and after the page before:
    /// a prompt of whole pages is taken up before its last one, as its last token has to be computed.
    fn keep_windows(&mut self, points: &[(usize, bool)]) {
        let Some(mut node) = self.at.filter(|_| !points.is_empty()) else { return };
        let mut state = lock(&self.state);
        let State { pools, tree, spec, .. } = &mut *state;
        let windowed: Vec<usize> = (0..spec.groups.len()).filter(|&g| !tree.is_full(g)).collect();
        let needs = |group: usize, (point, _): &(usize, bool)| first_page(spec, group, point - 1)..*point;
        let all = windowed.iter().flat_map(|&g| points.iter().map(move |point| needs(g, point).start));
        let Some(first) = all.min() else { return };
        for depth in (first..self.published).rev() {
            for &group in &windowed {
                let wanted = points.iter().filter(|point| needs(group, point).contains(&depth));
                let Some(firm) = wanted.map(|&(_, firm)| firm).reduce(|a, b| a || b) else { continue };
                let table = &self.tables[group];
                let page = depth.checked_sub(table.first).and_then(|slot| table.pages.get(slot));
                let mine = page.filter(|&&page| pools[group].holder(page) == Holder::Lease(self.id));
                match mine {
                    Some(&page) if tree.cell(node, group).page == NONE => {
                        pools[group].hand(page, Holder::Node(node));
                        tree.adopt(node, group, page, firm);
                    }
                    _ if firm && tree.cell(node, group).page != NONE => tree.confirm(node, group),
                    _ => {}
                }
            }
            node = tree.node(node).parent;
        }
    }

    /// Gives everything back, and keeps what the next turn may begin with: [`KvLease::publish`], and the windows at the
    /// end.
    pub(crate) fn retire(&mut self, history: &History<'_>, positions: usize) {
        self.publish(history, positions);
        if self.published > 0 {
            self.keep_windows(&[(self.published, true)]);
        }
        self.clear();
    }

    /// What the last [`KvLease::seek`] found.
    pub(crate) fn known(&self) -> Match {
        self.known
    }

    /// Positions per page.
    pub(crate) fn page_size(&self) -> usize {
        self.spec.page_size
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
mod tests;
