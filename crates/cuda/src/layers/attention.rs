//! Attention: norm and QKV, heads, the output projection.

use ctxserve_backend::{AttentionInput, AttentionSpec, DeviceError, HeadNorms as HeadWeights, RopeTable};

use super::dense::{Parts, Sums};
use super::{dense, is_few, missing};
use crate::backend::{CudaBackend, HeadRows};
use crate::driver::Buffer;
use crate::kv::{CudaKv, padded_head};
use crate::ops::attention::{Cache, HEAD_DIM, HeadNorms, Sequences, Tables};
use crate::ops::attention_decode::Queries;
use crate::ops::{
    attention_decode, attention_prefill, gemm, gemv_qkv, kv_append, kv_gather, pack_panels, rope_table,
};
use crate::weights::{CudaMatrix, CudaVector};

/// QKV rows as the product leaves them, in the workspace, and what is to become of them.
#[derive(Debug)]
pub struct RawHeads {
    /// Weights of query heads, of key heads, and the epsilon. Views of the model's.
    norms: Option<(Buffer<f32>, Buffer<f32>, f32)>,
    cache: Cache,
    group: usize,
    mscale: f32,
    heads: usize,
}

impl RawHeads {
    fn norms(&self) -> Option<HeadNorms<'_>> {
        self.norms.as_ref().map(|(q, k, eps)| HeadNorms { q, k, eps: *eps })
    }

    /// Rotates queries and keys, and appends keys and values to the cache.
    fn append(
        &self,
        op: &'static str,
        (device, kernels, state, extent): Parts<'_>,
    ) -> Result<(), DeviceError> {
        let arrays = state.description.arrays();
        let slots = arrays.groups.get(self.group).ok_or_else(|| missing(op, "the page table"))?;
        let Some((_, inv_freq)) = &state.rope else { return Err(missing(op, "the rotary table")) };
        kernels.heads.append.issue(
            device,
            &kv_append::Call {
                qkv: &state.work.qkv,
                q: &state.work.q,
                cache: self.cache,
                position: &arrays.position,
                slot: &slots.slot,
                live: &arrays.rows,
                inv_freq,
                norms: self.norms(),
                mscale: self.mscale,
                rows: extent.rows,
                heads: self.heads,
            },
        )
    }
}

/// The norms of heads of `head_dim` elements, as views that must not outlive the weights.
fn head_norms(
    op: &'static str,
    norms: &HeadWeights<CudaBackend>,
    spec: &AttentionSpec,
) -> Result<(Buffer<f32>, Buffer<f32>, f32), DeviceError> {
    if norms.q.len != spec.head_dim || norms.k.len != spec.head_dim {
        return Err(DeviceError::new(op, "a norm of heads is not as long as a head"));
    }
    let ((q, eps), (k, _)) = (norms.q.as_head_norm(spec.norm_eps), norms.k.as_head_norm(spec.norm_eps));
    // SAFETY: the views live as long as one layer of a step, which the model's weights outlive.
    unsafe { Ok((q.view(0, q.len())?, k.view(0, k.len())?, eps)) }
}

impl CudaBackend {
    pub(crate) fn issue_attention_input(
        &mut self,
        layer: usize,
        weights: &AttentionInput<Self>,
        spec: &AttentionSpec,
        rope: &RopeTable,
        kv: &CudaKv,
    ) -> Result<HeadRows, DeviceError> {
        const OP: &str = "attention_input";
        self.load_rope(rope)?;
        let normed = self.normed;
        let (device, kernels, state, extent) = self.step_parts(OP)?;
        let Some((_, inv_freq)) = &state.rope else { return Err(missing(OP, "the rotary table")) };
        let matrix = &weights.qkv;
        let norm = weights.norm.as_norm(spec.norm_eps);
        let arrays = state.description.arrays();
        let head = padded_head(OP, spec.head_dim)?;
        let (q_width, kv_width) = (spec.heads * head, spec.kv_heads * head);
        let mscale = rope.mscale as f32;
        let rows = extent.rows;
        // It norms for itself, and does not round.
        let narrow = head == HEAD_DIM && weights.head_norms.is_none() && matrix.rounding.is_none();
        if let Some(panels) = matrix.panels.as_ref().filter(|_| narrow && is_few(state, &extent)) {
            let dims = gemv_qkv::Dims { rows, cols: matrix.cols, q_width, kv_width };
            let (norm, eps) = norm;
            kernels.qkv(device, dims)?.issue(
                device,
                &gemv_qkv::Call {
                    weights: panels,
                    bias: &matrix.bias,
                    norm,
                    x: &state.work.x,
                    live: &arrays.rows,
                    positions: &arrays.position,
                    inv_freq,
                    q: &state.work.q,
                    kv: &state.work.qkv,
                    norm_cols: matrix.cols,
                    eps,
                    mscale,
                },
            )?;
            return Ok(HeadRows::Apart);
        }
        let bare = weights.head_norms.is_none() && matrix.panels.is_some();
        if bare && extent.prefill > 0 {
            if !state.turned.replace(true) {
                kernels.turns.issue(
                    device,
                    &rope_table::Call {
                        position: &arrays.position,
                        live: &arrays.rows,
                        inv_freq,
                        turns: &state.work.turns,
                        mscale,
                        rows,
                        pairs: head / 2,
                    },
                )?;
            }
            let (q, kv_rows, turns) = (&state.work.q, &state.work.qkv, &state.work.turns);
            let heads = gemm::Heads { q, kv: kv_rows, turns, q_width, kv_width, head_dim: head };
            dense::norm_and_multiply(
                OP,
                (device, kernels, state, extent),
                (norm, normed),
                matrix,
                Sums::Heads(heads),
            )?;
            let (group, cache) = kv.layer(OP, layer)?;
            let slots = arrays.groups.get(group).ok_or_else(|| missing(OP, "the page table"))?;
            let (slot, live) = (&slots.slot, &arrays.rows);
            kernels
                .heads
                .append
                .store(device, &kv_append::StoreCall { kv: kv_rows, cache, slot, live, rows })?;
            return Ok(HeadRows::Queries);
        }
        let norms = weights.head_norms.as_ref().map(|norms| head_norms(OP, norms, spec)).transpose()?;
        let (group, cache) = kv.layer(OP, layer)?;
        dense::norm_and_multiply(
            OP,
            (device, kernels, state, extent),
            (norm, normed),
            matrix,
            Sums::F32(&state.work.qkv),
        )?;
        let raw = RawHeads { norms, cache, group, mscale, heads: spec.heads };
        // A launch less. At 64 rows of Qwen3's 4B 3.80 ms a step where it is 3.99 with another launch, at 256 rows 11.3 and 11.4.
        if extent.prefill == 0 {
            return Ok(HeadRows::Raw(raw));
        }
        raw.append(OP, (device, kernels, state, extent))?;
        Ok(HeadRows::Queries)
    }

    pub(crate) fn issue_attention(
        &mut self,
        layer: usize,
        spec: &AttentionSpec,
        sinks: Option<&CudaVector>,
        heads: &HeadRows,
        kv: &CudaKv,
    ) -> Result<(), DeviceError> {
        const OP: &str = "attention";
        let (device, kernels, state, extent) = self.step_parts(OP)?;
        let (group, cache) = kv.layer(OP, layer)?;
        let arrays = state.description.arrays();
        let of_group = arrays.groups.get(group).ok_or_else(|| missing(OP, "the page table"))?;
        let tables = Tables { at: &of_group.table_at, first: &of_group.table_first, pages: &of_group.pages };
        let sinks = sinks.map(|sinks| &sinks.values);
        let capacity = (!is_few(state, &extent)).then(|| extent.capacity());
        let work = &state.work;
        let queries = match (heads, &state.rope) {
            (HeadRows::Raw(raw), Some((_, inv_freq))) => {
                let (norms, mscale) = (raw.norms(), raw.mscale);
                Queries::Raw { qkv: &work.qkv, norms, inv_freq, mscale }
            }
            (heads, _) => {
                let apart = matches!(heads, HeadRows::Apart);
                Queries::Rotated { q: &work.q, kv: apart.then_some(&work.qkv) }
            }
        };
        if extent.decode > 0 {
            let splits =
                attention_decode::splits(extent.decode, &cache, device.facts().multiprocessors as usize);
            kernels.heads.decode.issue(
                device,
                &attention_decode::Call {
                    queries,
                    cache,
                    tables,
                    position: &arrays.position,
                    slot: &of_group.slot,
                    live: &arrays.decode,
                    sinks,
                    out: &work.heads,
                    workspace: &work.partials,
                    rows: extent.decode,
                    heads: spec.heads,
                    splits,
                    capacity,
                    scale: spec.scale,
                },
            )?;
        }
        let passes = if extent.prefill > 0 { state.description.passes(group) } else { &[] };
        for pass in passes {
            let sequences = Sequences {
                first: pass.first,
                count: pass.count,
                first_row: &arrays.first_row,
                row_count: &arrays.row_count,
                start: &arrays.start,
            };
            kernels.heads.gather.issue(
                device,
                &kv_gather::Call {
                    cache,
                    tables,
                    sequences,
                    keys: &work.keys,
                    values: &work.values,
                    lines: pass.lines,
                },
            )?;
            kernels.heads.prefill.issue(
                device,
                &attention_prefill::Call {
                    q: &work.q,
                    keys: &work.keys,
                    values: &work.values,
                    sequences,
                    sinks,
                    out: &work.heads,
                    runs: pass.runs,
                    rows: extent.rows,
                    heads: spec.heads,
                    kv_heads: spec.kv_heads,
                    lines: pass.lines,
                    window: cache.window,
                    capacity,
                    scale: spec.scale,
                },
            )?;
        }
        Ok(())
    }

    pub(crate) fn issue_attention_output(
        &mut self,
        output: &CudaMatrix,
        heads: &HeadRows,
    ) -> Result<(), DeviceError> {
        const OP: &str = "attention_output";
        let (device, kernels, state, extent) = self.step_parts(OP)?;
        let work = &state.work;
        let attended = matches!(heads, HeadRows::Attended);
        if let HeadRows::Raw(raw) = heads {
            // Attention was left out; it is what would have rotated them.
            raw.append(OP, (device, kernels, state, extent))?;
        }
        if is_few(state, &extent) {
            let heads = if attended { &work.heads } else { &work.q };
            return dense::add_few(OP, (device, kernels, state, extent), output, heads);
        }
        if !attended {
            // Attention was left out; it is what would have put heads into panels.
            kernels.pack.issue(
                device,
                &pack_panels::Call {
                    source: pack_panels::Source::Bf16(&work.q),
                    rows: extent.rows,
                    cols: output.cols,
                    panels: &work.heads,
                    capacity: extent.capacity(),
                    padded: output.cols,
                    first: 0,
                    count: extent.capacity(),
                    row_map: None,
                    column_map: None,
                },
            )?;
        }
        dense::multiply(OP, (device, kernels, state, extent), output, &work.heads, Sums::Add(&work.x))
    }
}
