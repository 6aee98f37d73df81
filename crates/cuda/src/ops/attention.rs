//! What the attention ops share: where a layer's keys and values are.

use ctxserve_backend::DeviceError;

use crate::driver::Buffer;

/// Elements of a head that kernels are loaded for where nothing else is asked.
pub const HEAD_DIM: usize = 64;
/// Elements of a head that there are kernels for.
pub const HEAD_DIMS: [usize; 2] = [64, 128];
/// Most query heads of one key/value head.
pub const MOST_GROUP: usize = 8;

/// Where one layer keeps its keys and values (kernels/README.md, "KV pages"). Whoever makes one keeps the memory alive and
/// gives no op a page or slot beyond it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cache {
    /// Address of the pages.
    pub data: u64,
    /// Address of the scales; 0 without any.
    pub scales: u64,
    /// Positions of a page: a power of two from 16 to 256.
    pub page_size: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Keys that a query sees, itself included; `None` is all before it.
    pub window: Option<usize>,
}

/// `Cache` of kernels/common/attention.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct CacheArguments {
    data: u64,
    scales: u64,
    kv_heads: i32,
    page_shift: i32,
    window: i32,
}

impl Cache {
    /// Whether elements are e4m3 bytes with a scale a head; else they are bf16.
    pub fn is_fp8(&self) -> bool {
        self.scales != 0
    }

    pub(super) fn arguments(&self, op: &'static str) -> Result<CacheArguments, DeviceError> {
        let fits = self.page_size.is_power_of_two()
            && (16..=256).contains(&self.page_size)
            && self.kv_heads > 0
            && self.window.is_none_or(|window| window > 0 && window <= i32::MAX as usize);
        if !fits {
            return Err(DeviceError::new(op, format!("there are no kernels for {self:?}")));
        }
        Ok(CacheArguments {
            data: self.data,
            scales: self.scales,
            kv_heads: self.kv_heads as i32,
            page_shift: self.page_size.trailing_zeros() as i32,
            window: self.window.unwrap_or(0) as i32,
        })
    }
}

/// Which of the kernels for each of [`HEAD_DIMS`] to load.
pub(super) fn kernel_of(
    op: &'static str,
    head_dim: usize,
    names: [&'static str; 2],
) -> Result<&'static str, DeviceError> {
    let which = HEAD_DIMS.iter().zip(names).find(|(dim, _)| **dim == head_dim);
    which
        .map(|(_, name)| name)
        .ok_or_else(|| DeviceError::new(op, format!("there are no kernels for heads of {head_dim} elements")))
}

/// Where the pages of each sequence are, for one group: position `p` of sequence `s` lives in page
/// `pages[at[s] + p / page_size - first[s]]`. The entries, and that every visible position has one, are the caller's plan.
#[derive(Clone, Copy, Debug)]
pub struct Tables<'a> {
    /// Offset of each sequence's entries.
    pub at: &'a Buffer<i32>,
    /// Logical page of each sequence's first entry.
    pub first: &'a Buffer<i32>,
    /// Physical pages.
    pub pages: &'a Buffer<i32>,
}

/// `Tables` of kernels/common/attention.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct TablesArguments {
    at: u64,
    first: u64,
    pages: u64,
}

impl Tables<'_> {
    /// Whether there are entries for `sequences`.
    pub(super) fn holds(&self, sequences: usize) -> bool {
        self.at.len() >= sequences && self.first.len() >= sequences
    }

    pub(super) fn arguments(&self) -> TablesArguments {
        TablesArguments { at: self.at.address(), first: self.first.address(), pages: self.pages.address() }
    }
}

/// What query and key heads are normed with before they are rotated: a head over the root of its mean square, times these weights.
#[derive(Clone, Copy, Debug)]
pub struct HeadNorms<'a> {
    /// `head_dim` weights of query heads, in natural order.
    pub q: &'a Buffer<f32>,
    /// `head_dim` weights of key heads.
    pub k: &'a Buffer<f32>,
    /// Joins the mean of a head's squares, which is over all of `head_dim`.
    pub eps: f32,
}

/// `HeadNorms` of kernels/common/attention_heads.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct NormsArguments {
    q: u64,
    k: u64,
    eps: f32,
}

impl HeadNorms<'_> {
    /// Whether there are weights for heads of so many elements.
    pub(super) fn fit(&self, head_dim: usize) -> bool {
        self.q.len() >= head_dim && self.k.len() >= head_dim
    }

    pub(super) fn arguments(norms: Option<Self>) -> NormsArguments {
        norms.map_or(NormsArguments { q: 0, k: 0, eps: 0.0 }, |norms| NormsArguments {
            q: norms.q.address(),
            k: norms.k.address(),
            eps: norms.eps,
        })
    }
}

/// Sequences of many rows each, among all sequences of a step: those that `kv_gather` and `attention_prefill` work on together.
#[derive(Clone, Copy, Debug)]
pub struct Sequences<'a> {
    /// The first of them.
    pub first: usize,
    /// How many.
    pub count: usize,
    /// First row of each sequence of the step.
    pub first_row: &'a Buffer<i32>,
    /// Rows of each sequence of the step.
    pub row_count: &'a Buffer<i32>,
    /// Position of the first row of each sequence of the step.
    pub start: &'a Buffer<i32>,
}

/// `Sequences` of kernels/common/attention.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct SequencesArguments {
    first_row: u64,
    row_count: u64,
    start: u64,
    first: i32,
    count: i32,
}

impl Sequences<'_> {
    pub(super) fn fit(&self) -> bool {
        let end = self.first.saturating_add(self.count);
        [self.first_row, self.row_count, self.start].iter().all(|array| array.len() >= end)
    }

    pub(super) fn arguments(&self) -> SequencesArguments {
        SequencesArguments {
            first_row: self.first_row.address(),
            row_count: self.row_count.address(),
            start: self.start.address(),
            first: self.first as i32,
            count: self.count as i32,
        }
    }
}
