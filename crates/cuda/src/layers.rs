//! The ops of a layer: which kernels they are for how many rows.
//!
//! Few rows (at most [`GEMV_ROWS`] in the dense layers, more in the experts) go through kernels that stream weights once past
//! all rows; others go through matrix products over panels.

mod experts;

use ctxserve_backend::{AttentionInput, AttentionSpec, DeviceError, RopeTable};

use crate::backend::{CudaBackend, Extent, HeadRows, NormKey, State};
use crate::kv::CudaKv;
use crate::ops::attention::{HEAD_DIM, Sequences, Tables};
use crate::ops::{
    attention_decode, attention_prefill, embed, gemm, gemv_head, gemv_out, gemv_qkv, kv_append, kv_gather,
    pack_panels, rms_norm,
};
use crate::weights::{CudaMatrix, CudaVector};
use crate::workspace::GEMV_ROWS;

/// Rows of logits that the matrix-vector kernel takes. Of 16 the matrix product takes 268 us and 2 for the norm, the other 289.
const GEMV_LOGITS: usize = 8;

fn missing(op: &'static str, what: &str) -> DeviceError {
    DeviceError::new(op, format!("{what}: it was loaded for another purpose"))
}

/// Whether the dense layers of a step go through the matrix-vector kernels.
fn is_few(extent: &Extent) -> bool {
    extent.prefill == 0 && extent.rows <= GEMV_ROWS
}

impl CudaBackend {
    pub(crate) fn issue_embed(&mut self, table: &CudaMatrix) -> Result<(), DeviceError> {
        const OP: &str = "embed";
        let (device, kernels, state, extent) = self.step_parts(OP)?;
        let plain = table.plain.as_ref().ok_or_else(|| missing(OP, "the table"))?;
        let arrays = state.description.arrays();
        kernels.embed.issue(
            device,
            &embed::Call {
                table: plain,
                tokens: &arrays.tokens,
                feed: Some((&arrays.feed, state.sampler.ids())),
                live: &arrays.rows,
                x: &state.work.x,
                rows: extent.rows,
                vocab: table.rows,
                hidden: table.cols,
                cols: table.cols,
            },
        )
    }

    pub(crate) fn issue_attention_input(
        &mut self,
        layer: usize,
        weights: &AttentionInput<Self>,
        spec: &AttentionSpec,
        rope: &RopeTable,
        kv: &CudaKv,
    ) -> Result<(), DeviceError> {
        const OP: &str = "attention_input";
        self.load_rope(rope)?;
        let normed = self.normed;
        let (device, kernels, state, extent) = self.step_parts(OP)?;
        let Some((_, inv_freq)) = &state.rope else { return Err(missing(OP, "the rotary table")) };
        let matrix = &weights.qkv;
        let panels = matrix.panels.as_ref().ok_or_else(|| missing(OP, "the QKV matrix"))?;
        let (norm, eps) = weights.norm.as_norm(spec.norm_eps);
        let arrays = state.description.arrays();
        let (q_width, kv_width) = (spec.heads * HEAD_DIM, spec.kv_heads * HEAD_DIM);
        let mscale = rope.mscale as f32;
        let rows = extent.rows;
        if is_few(&extent) {
            let dims = gemv_qkv::Dims { rows, cols: matrix.cols, q_width, kv_width };
            return kernels.qkv(device, dims)?.issue(
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
                    kv: &state.work.kv,
                    norm_cols: matrix.cols,
                    eps,
                    mscale,
                },
            );
        }
        let (group, cache) = kv.layer(OP, layer)?;
        let capacity = extent.capacity();
        if normed != Some(NormKey::new(norm, eps)) {
            kernels.norm.issue(
                device,
                &rms_norm::Call {
                    x: &state.work.x,
                    weight: norm,
                    y: &state.work.normed,
                    live: &arrays.rows,
                    index: None,
                    rows,
                    cols: matrix.cols,
                    capacity,
                    eps,
                },
            )?;
        }
        kernels.gemm.issue(
            device,
            &gemm::Call {
                w: panels,
                x: &state.work.normed,
                bias: Some(&matrix.bias),
                y: gemm::Output::F32(&state.work.qkv),
                live: &arrays.rows,
                tokens: rows,
                cols: matrix.cols,
                w_rows: matrix.padded_rows,
                outs: matrix.padded_rows,
                capacity,
                stride: matrix.padded_rows,
            },
        )?;
        let slots = arrays.groups.get(group).ok_or_else(|| missing(OP, "the page table"))?;
        kernels.append.issue(
            device,
            &kv_append::Call {
                qkv: &state.work.qkv,
                q: &state.work.q,
                cache,
                position: &arrays.position,
                slot: &slots.slot,
                live: &arrays.rows,
                inv_freq,
                norms: None,
                mscale,
                rows,
                heads: spec.heads,
            },
        )
    }

    pub(crate) fn issue_attention(
        &mut self,
        layer: usize,
        spec: &AttentionSpec,
        sinks: Option<&CudaVector>,
        kv: &CudaKv,
    ) -> Result<(), DeviceError> {
        const OP: &str = "attention";
        let (device, kernels, state, extent) = self.step_parts(OP)?;
        let (group, cache) = kv.layer(OP, layer)?;
        let arrays = state.description.arrays();
        let of_group = arrays.groups.get(group).ok_or_else(|| missing(OP, "the page table"))?;
        let tables = Tables { at: &of_group.table_at, first: &of_group.table_first, pages: &of_group.pages };
        let sinks = sinks.map(|sinks| &sinks.values);
        let few = is_few(&extent);
        let capacity = (!few).then(|| extent.capacity());
        let work = &state.work;
        if extent.decode > 0 {
            let splits =
                attention_decode::splits(extent.decode, &cache, device.facts().multiprocessors as usize);
            kernels.decode.issue(
                device,
                &attention_decode::Call {
                    queries: attention_decode::Queries::Rotated {
                        q: &work.q,
                        kv: few.then_some(&work.kv),
                    },
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
        for pass in state.description.passes(group) {
            let sequences = Sequences {
                first: pass.first,
                count: pass.count,
                first_row: &arrays.first_row,
                row_count: &arrays.row_count,
                start: &arrays.start,
            };
            kernels.gather.issue(
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
            kernels.prefill.issue(
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
        heads: HeadRows,
    ) -> Result<(), DeviceError> {
        const OP: &str = "attention_output";
        let (device, kernels, state, extent) = self.step_parts(OP)?;
        let panels = output.panels.as_ref().ok_or_else(|| missing(OP, "the output matrix"))?;
        let live = &state.description.arrays().rows;
        let (rows, work) = (extent.rows, &state.work);
        if is_few(&extent) {
            let dims = gemv_out::Dims { rows, q_width: output.cols, hidden: output.padded_rows };
            let heads = if heads == HeadRows::Queries { &work.q } else { &work.heads };
            let call = gemv_out::Call { weights: panels, bias: &output.bias, heads, x: &work.x, live };
            return kernels.out(device, dims)?.issue(device, &call);
        }
        if heads == HeadRows::Queries {
            // Attention was left out; it is what would have put heads into panels.
            kernels.pack.issue(
                device,
                &pack_panels::Call {
                    source: pack_panels::Source::Bf16(&work.q),
                    rows,
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
        kernels.gemm.issue(
            device,
            &gemm::Call {
                w: panels,
                x: &work.heads,
                bias: Some(&output.bias),
                y: gemm::Output::Add(&work.x),
                live,
                tokens: rows,
                cols: output.cols,
                w_rows: output.padded_rows,
                outs: output.padded_rows,
                capacity: extent.capacity(),
                stride: output.padded_rows,
            },
        )
    }

    pub(crate) fn issue_logits(
        &mut self,
        norm: &CudaVector,
        eps: f32,
        head: &CudaMatrix,
    ) -> Result<(), DeviceError> {
        const OP: &str = "logits";
        let (device, kernels, state, extent) = self.step_parts(OP)?;
        let panels = head.panels.as_ref().ok_or_else(|| missing(OP, "the LM head"))?;
        let (weight, eps) = norm.as_norm(eps);
        let State { work, description, .. } = state;
        let arrays = description.arrays();
        let stride = state.widths.stride();
        if head.rows > stride || extent.logits * stride > work.logits.len() {
            return Err(DeviceError::new(
                OP,
                format!("{} rows of {} logits do not fit", extent.logits, head.rows),
            ));
        }
        if extent.logits == 0 {
            return Ok(());
        }
        let rows = extent.logits;
        if rows <= GEMV_LOGITS {
            let dims = gemv_head::Dims { rows, cols: head.cols, vocab: head.rows, stride };
            return kernels.head(device, dims)?.issue(
                device,
                &gemv_head::Call {
                    weights: panels,
                    norm: weight,
                    x: &work.x,
                    index: Some(&arrays.logit_row),
                    live: &arrays.logits,
                    logits: &work.logits,
                    norm_cols: head.cols,
                    eps,
                },
            );
        }
        let capacity = rows.next_multiple_of(8);
        kernels.norm.issue(
            device,
            &rms_norm::Call {
                x: &work.x,
                weight,
                y: &work.normed,
                live: &arrays.logits,
                index: Some(&arrays.logit_row),
                rows,
                cols: head.cols,
                capacity,
                eps,
            },
        )?;
        kernels.gemm.issue(
            device,
            &gemm::Call {
                w: panels,
                x: &work.normed,
                bias: None,
                y: gemm::Output::F32(&work.logits),
                live: &arrays.logits,
                tokens: rows,
                cols: head.cols,
                w_rows: head.padded_rows,
                outs: head.rows,
                capacity,
                stride,
            },
        )
    }
}
