//! The prefix tree: which pages hold the keys and values of which beginnings of prompts and answers.
//!
//! A node is one page of tokens after those of its parent; its path names the tokens from the start of a sequence on.
//! It has the page of every full-attention group. Of a windowed group it may have one: a query after the node sees only
//! so many pages before it, so these pages are kept where someone is likely to go on, and a prefix can be taken up at
//! any depth whose window is still there.
//!
//! A node that a sequence works below is in use, and so are its ancestors. Others are evicted from the leaves up, the
//! one that has been out of use the longest first.

use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use ctxserve_backend::{KvSpec, PageId};
use ctxserve_core::TokenId;
use hashbrown::HashTable;

use super::ghosts::{Ghosts, Lost};

/// A node's place in the tree's memory.
pub(crate) type NodeId = u32;

/// No node, no page.
pub(super) const NONE: u32 = u32::MAX;

/// What keeps tenants' prefixes apart; `None` is everybody's.
pub(crate) type Salt = Option<Arc<str>>;

/// A node's state beside its tokens and pages.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) parent: NodeId,
    /// Changes when the place is used again, so that a remembered id can be told to be stale.
    pub(super) generation: u32,
    /// A keyed hash of the whole path.
    chain: u64,
    pub(super) children: u32,
    /// Sequences that work right below it, and children that are in use.
    pub(super) active: u32,
    /// When it went out of use.
    stamp: u64,
}

/// A node's page of one group.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cell {
    pub(super) page: PageId,
    /// Windowed groups: leases whose tables have it.
    pub(super) users: u32,
    /// Windowed groups: whether someone is likely to go on from here; others are evicted first.
    pub(super) firm: bool,
    /// Windowed groups: when it went out of use.
    stamp: u64,
}

const EMPTY: Cell = Cell { page: NONE, users: 0, firm: false, stamp: 0 };

/// How well a sequence's beginning is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Match {
    /// The deepest node on the way, and its generation.
    pub(super) last: Option<(NodeId, u32)>,
    /// Its depth, pages.
    pub(crate) deepest: usize,
    /// The node to go on from: the deepest whose windows are there.
    pub(super) from: Option<NodeId>,
    /// Its depth, pages.
    pub(crate) pages: usize,
    /// How often the tree had been cut off.
    epoch: u32,
}

/// The tree. Pages belong to pools: what is taken out of it is given back there by the caller.
#[derive(Debug)]
pub(super) struct Tree {
    spec: Arc<KvSpec>,
    hasher: RandomState,
    pub(super) nodes: Vec<Node>,
    /// `page_size` of each node.
    tokens: Vec<TokenId>,
    /// One for each group of each node.
    cells: Vec<Cell>,
    unused: Vec<NodeId>,
    /// Nodes that are no roots, by `chain`.
    index: HashTable<NodeId>,
    /// Where the paths of each salt begin. A root that is not here any more was cut off by a reset.
    roots: HashMap<Salt, NodeId>,
    salts: HashMap<NodeId, Salt>,
    /// Times that a page begins a path, whatever its salt, by a hash of its tokens.
    openings: HashMap<u64, u32>,
    /// Nodes out of use without children, the one longest out of use first.
    pub(super) leaves: BTreeSet<(u64, NodeId)>,
    /// Of each group, nodes whose page nobody has in a table, the one to evict next first. Empty for full groups.
    pub(super) idle: Vec<BTreeSet<(bool, u64, NodeId)>>,
    /// Nodes in use that are no roots.
    pub(super) in_use: usize,
    clock: u64,
    /// Times that the tree was cut off.
    epoch: u32,
    pub(super) ghosts: Ghosts,
}

impl Tree {
    pub(super) fn new(spec: Arc<KvSpec>) -> Self {
        Self {
            hasher: RandomState::new(),
            nodes: Vec::new(),
            tokens: Vec::new(),
            cells: Vec::new(),
            unused: Vec::new(),
            index: HashTable::new(),
            roots: HashMap::new(),
            salts: HashMap::new(),
            openings: HashMap::new(),
            leaves: BTreeSet::new(),
            idle: vec![BTreeSet::new(); spec.groups.len()],
            in_use: 0,
            clock: 0,
            epoch: 0,
            ghosts: Ghosts::default(),
            spec,
        }
    }

    /// Nodes that are no roots: each has one page of every full group.
    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    /// Pages of a group that could be evicted now.
    pub(super) fn evictable(&self, group: usize) -> usize {
        if self.is_full(group) { self.len() - self.in_use } else { self.idle[group].len() }
    }

    pub(super) fn is_full(&self, group: usize) -> bool {
        self.spec.groups[group].window.is_none()
    }

    pub(super) fn node(&self, node: NodeId) -> &Node {
        &self.nodes[node as usize]
    }

    fn place(&self, node: NodeId, group: usize) -> usize {
        node as usize * self.spec.groups.len() + group
    }

    /// A node's page of one group.
    pub(super) fn cell(&self, node: NodeId, group: usize) -> Cell {
        self.cells[self.place(node, group)]
    }

    fn cell_mut(&mut self, node: NodeId, group: usize) -> &mut Cell {
        let place = self.place(node, group);
        &mut self.cells[place]
    }

    fn tokens_of(&self, node: NodeId) -> &[TokenId] {
        &self.tokens[node as usize * self.spec.page_size..][..self.spec.page_size]
    }

    pub(super) fn is_root(&self, node: NodeId) -> bool {
        self.node(node).parent == NONE
    }

    /// Every node that is no root.
    pub(super) fn ids(&self) -> impl Iterator<Item = NodeId> {
        self.index.iter().copied()
    }

    fn add(&mut self, parent: NodeId, chain: u64) -> NodeId {
        let state = Node { parent, generation: 0, chain, children: 0, active: 0, stamp: self.clock };
        if let Some(node) = self.unused.pop() {
            let generation = self.node(node).generation;
            self.nodes[node as usize] = Node { generation, ..state };
            return node;
        }
        let node = self.nodes.len() as NodeId;
        self.nodes.push(state);
        self.tokens.resize(self.tokens.len() + self.spec.page_size, 0);
        self.cells.resize(self.cells.len() + self.spec.groups.len(), EMPTY);
        node
    }

    /// Where the paths of a salt begin. It has to be pinned, or given a child, before anything else happens.
    pub(super) fn root(&mut self, salt: &Salt) -> NodeId {
        if let Some(&root) = self.roots.get(salt) {
            return root;
        }
        let chain = self.hasher.hash_one(salt);
        let root = self.add(NONE, chain);
        self.roots.insert(salt.clone(), root);
        self.salts.insert(root, salt.clone());
        root
    }

    /// The child of these tokens.
    fn child(&self, parent: NodeId, chain: u64, tokens: &[TokenId]) -> Option<NodeId> {
        let same = |&node: &NodeId| self.node(node).parent == parent && self.tokens_of(node) == tokens;
        self.index.find(chain, same).copied()
    }

    /// The child of these tokens, and whether it was made just now: then it has no pages yet.
    pub(super) fn enter(&mut self, parent: NodeId, tokens: &[TokenId]) -> (NodeId, bool) {
        let chain = self.hasher.hash_one((self.node(parent).chain, tokens));
        if let Some(child) = self.child(parent, chain, tokens) {
            return (child, false);
        }
        let child = self.add(parent, chain);
        let at = child as usize * self.spec.page_size;
        self.tokens[at..at + tokens.len()].copy_from_slice(tokens);
        let nodes = &self.nodes;
        self.index.insert_unique(chain, child, |&node| nodes[node as usize].chain);
        if self.is_root(parent) {
            *self.openings.entry(self.hasher.hash_one(tokens)).or_default() += 1;
        }
        if self.node(parent).children == 0 {
            self.leaves.remove(&(self.node(parent).stamp, parent));
        }
        self.nodes[parent as usize].children += 1;
        if self.node(parent).active == 0 {
            self.leaves.insert((self.node(child).stamp, child));
        }
        (child, true)
    }

    /// Follows a sequence as far as it is known, at most `most` pages, and then back to where its windows are there.
    /// `page` gives its tokens; `known` is the last answer for the same sequence, to go on from there.
    pub(super) fn find<'a>(
        &self,
        salt: &Salt,
        most: usize,
        known: Match,
        mut page: impl FnMut(usize) -> std::borrow::Cow<'a, [TokenId]>,
    ) -> Match {
        let epoch = self.epoch;
        let alive = |(node, generation): (NodeId, u32)| {
            known.epoch == epoch && self.node(node).generation == generation
        };
        let start = known.last.filter(|&last| alive(last)).map(|(node, _)| (node, known.deepest));
        let Some((mut at, mut deepest)) = start.or_else(|| Some((*self.roots.get(salt)?, 0))) else {
            return Match { epoch, ..Match::default() };
        };
        while deepest < most {
            let tokens = page(deepest);
            let chain = self.hasher.hash_one((self.node(at).chain, &*tokens));
            let Some(child) = self.child(at, chain, &tokens) else { break };
            (at, deepest) = (child, deepest + 1);
        }
        let last = Some((at, self.node(at).generation));
        let (from, pages) = self.last_with_windows(at, deepest);
        Match { last, deepest, from: Some(from), pages, epoch }
    }

    /// The deepest node from `node` up, at depth `depth`, whose windows are there.
    fn last_with_windows(&self, node: NodeId, depth: usize) -> (NodeId, usize) {
        let windowed: Vec<usize> = (0..self.spec.groups.len()).filter(|&g| !self.is_full(g)).collect();
        // A candidate holds until a page is missing that it needs.
        let (mut candidate, mut candidate_depth) = (node, depth);
        let (mut at, mut last) = (node, depth);
        while last > 0 {
            // Logical page `last - 1` is the one of node `at`.
            let needs = |&&g: &&usize| first_page(&self.spec, g, candidate_depth) < last;
            let mut needed = windowed.iter().filter(needs).peekable();
            if needed.peek().is_none() {
                break;
            }
            let parent = self.node(at).parent;
            if needed.any(|&g| self.cell(at, g).page == NONE) {
                (candidate, candidate_depth) = (parent, last - 1);
            }
            (at, last) = (parent, last - 1);
        }
        (candidate, candidate_depth)
    }

    /// How many pages after the deepest known one were lost, at most `most`, and how.
    pub(super) fn lost<'a>(
        &self,
        salt: &Salt,
        found: &Match,
        most: usize,
        mut page: impl FnMut(usize) -> std::borrow::Cow<'a, [TokenId]>,
    ) -> Option<(Lost, usize)> {
        let mut chain = match found.last {
            Some((node, _)) => self.node(node).chain,
            None => self.hasher.hash_one(salt),
        };
        let mut lost = None;
        for depth in found.deepest..most {
            chain = self.hasher.hash_one((chain, &*page(depth)));
            let Some(how) = self.ghosts.get(chain) else { break };
            lost = Some((lost.map_or(how, |(first, _)| first), depth + 1 - found.deepest));
        }
        lost
    }

    /// Whether a path begins with this page under any salt.
    pub(super) fn is_opening(&self, tokens: &[TokenId]) -> bool {
        self.openings.contains_key(&self.hasher.hash_one(tokens))
    }

    /// A sequence works below the node: it and its ancestors stay.
    pub(super) fn pin(&mut self, mut node: NodeId) {
        loop {
            let state = &mut self.nodes[node as usize];
            state.active += 1;
            if state.active > 1 {
                return;
            }
            let (leaf, parent) = ((state.stamp, node), state.parent);
            self.leaves.remove(&leaf);
            if parent == NONE {
                return;
            }
            self.in_use += 1;
            node = parent;
        }
    }

    /// Undoes one [`Tree::pin`].
    pub(super) fn unpin(&mut self, mut node: NodeId) {
        self.clock += 1;
        loop {
            let state = &mut self.nodes[node as usize];
            state.active = state.active.saturating_sub(1);
            if state.active > 0 {
                return;
            }
            state.stamp = self.clock;
            let (parent, children) = (state.parent, state.children);
            if parent == NONE {
                if children == 0 {
                    self.forget_root(node);
                }
                return;
            }
            self.in_use -= 1;
            if children == 0 {
                self.leaves.insert((self.clock, node));
            }
            node = parent;
        }
    }

    /// Gives a new node its page of a full group.
    pub(super) fn fill(&mut self, node: NodeId, group: usize, page: PageId) {
        *self.cell_mut(node, group) = Cell { page, ..EMPTY };
    }

    /// Gives a node its page of a windowed group, from a lease that still has it in its table.
    pub(super) fn adopt(&mut self, node: NodeId, group: usize, page: PageId, firm: bool) {
        *self.cell_mut(node, group) = Cell { page, users: 1, firm, stamp: 0 };
    }

    /// Someone is likely to go on from here.
    pub(super) fn confirm(&mut self, node: NodeId, group: usize) {
        let (clock, Cell { users, firm, stamp, .. }) = (self.clock, self.cell(node, group));
        if users == 0 {
            self.idle[group].remove(&(firm, stamp, node));
            self.idle[group].insert((true, clock, node));
        }
        let cell = self.cell_mut(node, group);
        (cell.firm, cell.stamp) = (true, clock);
    }

    /// A lease takes a node's page of a windowed group into its table.
    pub(super) fn enlist(&mut self, node: NodeId, group: usize) -> PageId {
        let Cell { page, users, firm, stamp } = self.cell(node, group);
        if users == 0 {
            self.idle[group].remove(&(firm, stamp, node));
        }
        *self.cell_mut(node, group) = Cell { page, users: users + 1, firm: true, stamp };
        page
    }

    /// A lease lost a node's page of a windowed group from its table.
    pub(super) fn release(&mut self, node: NodeId, group: usize) {
        let clock = self.clock;
        let cell = self.cell_mut(node, group);
        cell.users = cell.users.saturating_sub(1);
        if cell.users == 0 {
            cell.stamp = clock;
            let key = (cell.firm, clock, node);
            self.idle[group].insert(key);
        }
    }

    /// Removes the leaf that has been out of use the longest. Returns its pages, each with its group.
    pub(super) fn evict_leaf(&mut self, how: Lost) -> Option<Vec<(usize, PageId)>> {
        let (_, node) = self.leaves.pop_first()?;
        let mut pages = Vec::with_capacity(self.spec.groups.len());
        for group in 0..self.spec.groups.len() {
            let Cell { page, firm, stamp, .. } = std::mem::replace(self.cell_mut(node, group), EMPTY);
            if page != NONE {
                pages.push((group, page));
                self.idle[group].remove(&(firm, stamp, node));
            }
        }
        let Node { parent, chain, .. } = *self.node(node);
        self.ghosts.add(chain, how);
        if let Ok(entry) = self.index.find_entry(chain, |&found| found == node) {
            entry.remove();
        }
        if self.salts.get(&parent).and_then(|salt| self.roots.get(salt)) == Some(&parent) {
            let opening = self.hasher.hash_one(self.tokens_of(node));
            if let Some(count) = self.openings.get_mut(&opening) {
                *count -= 1;
                if *count == 0 {
                    self.openings.remove(&opening);
                }
            }
        }
        self.retire(node);
        let above = &mut self.nodes[parent as usize];
        above.children -= 1;
        if above.children == 0 && above.active == 0 {
            let stamp = above.stamp;
            if self.is_root(parent) {
                self.forget_root(parent);
            } else {
                self.leaves.insert((stamp, parent));
            }
        }
        Some(pages)
    }

    /// Takes the page of a windowed group that is least likely to be wanted.
    pub(super) fn evict_window(&mut self, group: usize) -> Option<PageId> {
        let (_, _, node) = self.idle[group].pop_first()?;
        Some(std::mem::replace(self.cell_mut(node, group), EMPTY).page)
    }

    /// Nothing that is in the tree now is found again; what sequences use stays until they are done with it.
    pub(super) fn cut_off(&mut self) {
        self.roots.clear();
        self.openings.clear();
        self.epoch = self.epoch.wrapping_add(1);
    }

    fn forget_root(&mut self, root: NodeId) {
        if let Some(salt) = self.salts.remove(&root)
            && self.roots.get(&salt) == Some(&root)
        {
            self.roots.remove(&salt);
        }
        self.retire(root);
    }

    fn retire(&mut self, node: NodeId) {
        let generation = &mut self.nodes[node as usize].generation;
        *generation = generation.wrapping_add(1);
        self.unused.push(node);
    }
}

/// The first logical page that a query right after `pages` pages sees.
pub(super) fn first_page(spec: &KvSpec, group: usize, pages: usize) -> usize {
    spec.first_visible(group, pages * spec.page_size) / spec.page_size
}
