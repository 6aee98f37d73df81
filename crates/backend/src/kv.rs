//! The paged KV cache as models, engine and backends agree on it.

/// A page of one group's pool.
pub type PageId = u32;

/// Pages that have slid out of a window and are held all the same: with them another sequence can go on from the last page
/// boundaries of this one, and not only from its very end.
pub(crate) const SLACK: usize = 2;

/// How keys and values are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvDtype {
    /// 4 bytes, exact (CPU).
    F32,
    /// 2 bytes.
    Bf16,
    /// 1 byte, and one float32 scale per position, head, and key or value.
    Fp8E4m3,
}

impl KvDtype {
    /// Bytes per element, scales not counted.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
            Self::Fp8E4m3 => 1,
        }
    }

    /// Bytes of one head's key, or value, at one position: `head_dim` elements, and with fp8 the float32 by which
    /// they are scaled.
    pub fn row_bytes(self, head_dim: usize) -> usize {
        let scale = if self == Self::Fp8E4m3 { size_of::<f32>() } else { 0 };
        head_dim * self.bytes() + scale
    }
}

/// Layers that attend alike and so share page tables: position `p` of a sequence lives in logical page
/// `p / page_size`, slot `p % page_size`, of every layer of the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvGroup {
    /// Keys seen by a query, itself included; `None` is full causal attention. With a window, pages that
    /// have slid out of it go back to the pool.
    pub window: Option<usize>,
    /// Indices of the model's layers in this group, ascending.
    pub layers: Vec<usize>,
    /// Storage.
    pub dtype: KvDtype,
}

/// The KV cache a model needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvSpec {
    /// Positions per page.
    pub page_size: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Groups; every layer is in exactly one.
    pub groups: Vec<KvGroup>,
}

impl KvSpec {
    /// Bytes of one page of `group` over all its layers: keys, values and their scales.
    pub fn page_bytes(&self, group: usize) -> usize {
        let group = &self.groups[group];
        2 * self.page_size * self.kv_heads * group.dtype.row_bytes(self.head_dim) * group.layers.len()
    }

    /// Pages of `group` that one sequence can hold at once when `context` positions are stored and a step
    /// appends at most `chunk` more. Of a windowed group up to two pages are held longer than they are seen.
    pub fn pages_for(&self, group: usize, context: usize, chunk: usize) -> usize {
        let live = match self.groups[group].window {
            // A chunk's first query still sees window - 1 positions before it; one page more for alignment.
            Some(window) => context.min(window.saturating_sub(1) + chunk) + (1 + SLACK) * self.page_size - 1,
            None => context,
        };
        live.div_ceil(self.page_size).min(context.div_ceil(self.page_size))
    }

    /// First position that a query at `position` can see in `group`.
    pub fn first_visible(&self, group: usize, position: usize) -> usize {
        self.groups[group].window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// Where a layer's pages are: its group, and its index among the group's layers.
    pub fn place(&self, layer: usize) -> Option<(usize, usize)> {
        self.groups
            .iter()
            .enumerate()
            .find_map(|(g, group)| group.layers.binary_search(&layer).ok().map(|slot| (g, slot)))
    }
}

/// A spec with its pool sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvPlan {
    /// What is stored.
    pub spec: KvSpec,
    /// Pages of each group's pool.
    pub pages: Vec<usize>,
}

impl KvPlan {
    /// Bytes of all pools together.
    pub fn bytes(&self) -> usize {
        self.pages.iter().enumerate().map(|(g, n)| n * self.spec.page_bytes(g)).sum()
    }
}

/// Where a sequence's positions of one group live. Logical pages before `first` have slid out of the window.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageTable {
    /// Logical index of `pages[0]`.
    pub first: usize,
    /// Physical pages of the logical pages from `first` on.
    pub pages: Vec<PageId>,
}

impl PageTable {
    /// Physical page and slot of a position, or `None` where no page is held.
    pub fn locate(&self, position: usize, page_size: usize) -> Option<(PageId, usize)> {
        let logical = (position / page_size).checked_sub(self.first)?;
        Some((*self.pages.get(logical)?, position % page_size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(window: Option<usize>) -> KvSpec {
        let groups = vec![
            KvGroup { window, layers: vec![0, 2], dtype: KvDtype::Bf16 },
            KvGroup { window: None, layers: vec![1], dtype: KvDtype::Fp8E4m3 },
        ];
        KvSpec { page_size: 16, kv_heads: 2, head_dim: 8, groups }
    }

    #[test]
    fn a_page_counts_the_layers_and_scales_of_its_group() {
        assert_eq!(spec(None).page_bytes(0), 2 * 2 * 16 * 2 * 8 * 2);
        assert_eq!(spec(None).page_bytes(1), 2 * 16 * 2 * (8 + 4));
    }

    #[test]
    fn windowed_groups_hold_a_bounded_number_of_pages() {
        let spec = spec(Some(128));
        assert_eq!(spec.pages_for(0, 100_000, 1), (128 + 15_usize + 32).div_ceil(16));
        assert_eq!(spec.pages_for(0, 20, 512), 2);
        assert_eq!(spec.pages_for(1, 100, 1), 7);
    }

    #[test]
    fn visibility_counts_the_query_itself() {
        let spec = spec(Some(4));
        assert_eq!(spec.first_visible(0, 2), 0);
        assert_eq!(spec.first_visible(0, 4), 1);
        assert_eq!(spec.first_visible(1, 400), 0);
    }

    #[test]
    fn tables_find_positions_after_sliding() {
        let table = PageTable { first: 2, pages: vec![9, 4] };
        assert_eq!(table.locate(31, 16), None);
        assert_eq!(table.locate(32, 16), Some((9, 0)));
        assert_eq!(table.locate(63, 16), Some((4, 15)));
        assert_eq!(table.locate(64, 16), None);
        assert_eq!(spec(None).place(1), Some((1, 0)));
        assert_eq!(spec(None).place(2), Some((0, 1)));
        assert_eq!(spec(None).place(3), None);
    }
}
