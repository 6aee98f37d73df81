//! Causal attention over pages.

use ctxserve_backend::{AttentionSpec, Batch, DeviceError, PageTable};
use rayon::prelude::*;

use crate::backend::{CpuBackend, Fast};
use crate::kernels::{self, PageShape};
use crate::kv::{Cells, CpuKv};
use crate::rows::Rows;

const OP: &str = "attention";

/// Everything about the layer that a row needs.
struct Layer<'a> {
    spec: &'a AttentionSpec,
    sinks: Option<&'a [f32]>,
    kv: &'a CpuKv,
    place: (usize, usize),
}

/// What one row sees: positions `first..=last` through `table`.
struct Seen<'a> {
    first: usize,
    last: usize,
    table: &'a PageTable,
}

/// Queries `[rows, heads * head_dim]` to outputs of the same shape.
pub(crate) fn attention(
    backend: &CpuBackend,
    layer: usize,
    spec: &AttentionSpec,
    sinks: Option<&[f32]>,
    q: &Rows,
    kv: &CpuKv,
    batch: &Batch,
) -> Result<Rows, DeviceError> {
    let cache = &kv.plan().spec;
    let fail = |what: String| DeviceError::new(OP, what);
    let place = cache.place(layer).ok_or_else(|| fail(format!("layer {layer} has no KV group")))?;
    if spec.kv_heads == 0 || !spec.heads.is_multiple_of(spec.kv_heads) || cache.kv_heads != spec.kv_heads {
        return Err(fail("query heads are not a multiple of the cache's heads".to_owned()));
    }
    if cache.head_dim != spec.head_dim || cache.groups[place.0].window != spec.window {
        return Err(fail("the layer and the KV cache differ in shape".to_owned()));
    }
    if sinks.is_some_and(|sinks| sinks.len() != spec.heads) {
        return Err(fail("one sink per query head is needed".to_owned()));
    }
    let narrowed = q.rows() != batch.tokens.len();
    let rows = if narrowed { batch.logit_rows().count() } else { batch.tokens.len() };
    q.expect(OP, rows, spec.heads * spec.head_dim)?;
    let mut seen = Vec::with_capacity(rows);
    for slice in batch.sequences.iter().filter(|slice| !narrowed || slice.sample.is_some()) {
        let table = slice.tables.get(place.0).ok_or_else(|| fail("a page table is missing".to_owned()))?;
        let end = slice.start + slice.rows.len();
        for last in if narrowed { end - 1 } else { slice.start }..end {
            seen.push(Seen { first: cache.first_visible(place.0, last), last, table });
        }
    }
    if seen.len() != q.rows() {
        return Err(fail("rows without a sequence".to_owned()));
    }
    let layer = Layer { spec, sinks, kv, place };
    let mut out = Rows::zeros(q.rows(), q.cols());
    match &backend.fast {
        None => seen.iter().enumerate().try_for_each(|(row, seen)| {
            plain(&layer, seen, q.row(row), out.row_mut(row)).ok_or_else(|| fail("no page".to_owned()))
        })?,
        Some(fast) => {
            let group = spec.heads / spec.kv_heads * spec.head_dim;
            let tasks = out.data_mut().par_chunks_mut(group).zip(q.data().par_chunks(group)).enumerate();
            fast.pool.install(|| {
                tasks.try_for_each_init(Vec::new, |scores, (task, (out, q))| {
                    let (row, head) = (task / spec.kv_heads, task % spec.kv_heads);
                    grouped(fast, &layer, &seen[row], head, q, scores, out)
                        .ok_or_else(|| fail("no page".to_owned()))
                })
            })?;
        }
    }
    Ok(out)
}

/// One row, all heads: the definition. `None` where a position has no page.
fn plain(layer: &Layer<'_>, seen: &Seen<'_>, q: &[f32], out: &mut [f32]) -> Option<()> {
    let AttentionSpec { heads, kv_heads, head_dim: dim, scale, .. } = *layer.spec;
    let (page_size, slots) = (layer.kv.plan().spec.page_size, layer.kv.slots());
    for head in 0..heads {
        let q = &q[head * dim..][..dim];
        let kv_head = head / (heads / kv_heads);
        let mut cells = Vec::new();
        for position in seen.first..=seen.last {
            let (page, slot) = seen.table.locate(position, page_size)?;
            let (keys, values) = layer.kv.page(layer.place.0, layer.place.1, page, kv_head);
            let dot: f64 = q
                .iter()
                .enumerate()
                .map(|(d, &q)| f64::from(q) * f64::from(keys.get(d * slots + slot)))
                .sum();
            cells.push((dot * f64::from(scale), slot, values));
        }
        let sink = layer.sinks.map(|sinks| f64::from(sinks[head]));
        let peak = cells.iter().map(|cell| cell.0).fold(sink.unwrap_or(f64::NEG_INFINITY), f64::max);
        let mut total = sink.map_or(0.0, |sink| (sink - peak).exp());
        let mut sums = vec![0.0_f64; dim];
        for (score, slot, values) in cells {
            let p = (score - peak).exp();
            total += p;
            sums.iter_mut()
                .enumerate()
                .for_each(|(d, sum)| *sum += p * f64::from(values.get(slot * dim + d)));
        }
        out[head * dim..][..dim].iter_mut().zip(sums).for_each(|(out, sum)| *out = (sum / total) as f32);
    }
    Some(())
}

/// One row and one key/value head with all its query heads: scores page by page, softmax, values page by page.
fn grouped(
    fast: &Fast,
    layer: &Layer<'_>,
    seen: &Seen<'_>,
    head: usize,
    q: &[f32],
    scores: &mut Vec<f32>,
    out: &mut [f32],
) -> Option<()> {
    let AttentionSpec { heads, kv_heads, head_dim: dim, scale, .. } = *layer.spec;
    let (page_size, slots) = (layer.kv.plan().spec.page_size, layer.kv.slots());
    let (first_page, last_page) = (seen.first / page_size, seen.last / page_size);
    let group = heads / kv_heads;
    let stride = (last_page + 1 - first_page) * slots;
    let shape = PageShape { dim, slots, stride };
    scores.clear();
    scores.resize(group * stride, 0.0);
    let page = |logical: usize| {
        let (page, _) = seen.table.locate(logical * page_size, page_size)?;
        Some(layer.kv.page(layer.place.0, layer.place.1, page, head))
    };
    for logical in first_page..=last_page {
        let at = (logical - first_page) * slots;
        kernels::page_scores(fast.isa, q, page(logical)?.0, shape, &mut scores[at..]);
    }
    // Slots seen of the `n`-th page.
    let visible = |n: usize| {
        let start = (first_page + n) * page_size;
        seen.first.saturating_sub(start)..(seen.last + 1 - start).min(page_size)
    };
    let pages = last_page + 1 - first_page;
    for (h, scores) in scores.chunks_exact_mut(stride).enumerate() {
        // Seen scores move together, so that the softmax's order is by position and not by page.
        let mut count = 0;
        for n in 0..pages {
            let range = visible(n);
            scores.copy_within(n * slots + range.start..n * slots + range.end, count);
            count += range.len();
        }
        let sink = layer.sinks.map(|sinks| sinks[head * group + h]);
        kernels::softmax(fast.isa, &mut scores[..count], scale, sink);
    }
    let mut count = 0;
    for n in 0..pages {
        let range = visible(n);
        let values = match page(first_page + n)?.1 {
            Cells::F32(values) => Cells::F32(&values[range.start * dim..]),
            Cells::Bf16(values) => Cells::Bf16(&values[range.start * dim..]),
        };
        kernels::add_values(fast.isa, &scores[count..], values, range.len(), shape, out);
        count += range.len();
    }
    Some(())
}
