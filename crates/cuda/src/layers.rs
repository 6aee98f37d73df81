//! The ops of a layer: which kernels they are for how many rows.
//!
//! Few rows (at most [`GEMV_ROWS`](crate::workspace::GEMV_ROWS) in the dense layers, more in the experts) go through kernels that stream weights once past
//! all rows; others go through matrix products over panels.

mod attention;
mod dense;
mod experts;

pub use attention::RawHeads;

use ctxserve_backend::DeviceError;

use crate::backend::{CudaBackend, HeadRows, State};
use crate::ops::quantise_nvfp4::NormedCall;
use crate::ops::{embed, gemm, gemv_head, narrow, rms_norm};
use crate::step::Extent;
use crate::weights::{CudaMatrix, CudaVector};

/// Rows of logits that the matrix-vector kernel takes. Of 16 the matrix product takes 268 us and 2 for the norm, the other 289.
const GEMV_LOGITS: usize = 8;

fn missing(op: &'static str, what: &str) -> DeviceError {
    DeviceError::new(op, format!("{what}: it was loaded for another purpose"))
}

/// Whether the dense layers of a step go through the matrix-vector kernels.
fn is_few(state: &State, extent: &Extent) -> bool {
    extent.prefill == 0 && extent.rows <= state.few_rows
}

impl CudaBackend {
    pub(crate) fn issue_embed(&mut self, table: &CudaMatrix) -> Result<(), DeviceError> {
        const OP: &str = "embed";
        let (device, kernels, state, extent) = self.step_parts(OP)?;
        let (stored, capacity) = match (&table.plain, &table.panels) {
            (Some(plain), _) => (plain, None),
            (None, Some(panels)) => (panels, Some(table.padded_rows)),
            (None, None) => return Err(missing(OP, "the table")),
        };
        let arrays = state.description.arrays();
        kernels.embed.issue(
            device,
            &embed::Call {
                table: stored,
                capacity,
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

    /// Drops the rows without logits once a layer's keys and values are in the cache. Where those are still beside the queries there
    /// are only few rows, and they stay.
    pub(crate) fn issue_narrow(&mut self, layer: usize, heads: &HeadRows) -> Result<(), DeviceError> {
        const OP: &str = "narrow";
        let (device, kernels, state, extent) = self.step_parts(OP)?;
        if !matches!(heads, HeadRows::Queries) || extent.logits == 0 || extent.logits >= extent.rows {
            return Ok(());
        }
        let group = state.description.group_of(layer).ok_or_else(|| missing(OP, "the page table"))?;
        let arrays = state.description.arrays();
        kernels.narrow.issue(
            device,
            &narrow::Call {
                x: &state.work.x,
                q: &state.work.q,
                row: &arrays.logit_row,
                sequence: &arrays.logit_sequence,
                kept: &arrays.logits,
                position: &arrays.position,
                at: &group.table_at,
                first: &group.table_first,
                rows: &arrays.rows,
                decode: &arrays.decode,
                hidden: state.widths.hidden,
                q_width: state.widths.heads * state.widths.head(),
            },
        )?;
        let rows = extent.logits;
        self.extent = Extent { rows, decode: rows, prefill: 0, logits: rows, narrowed: true };
        Ok(())
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
        let index = (!extent.narrowed).then_some(&arrays.logit_row);
        if rows <= GEMV_LOGITS && head.rounding.is_none() {
            let dims = gemv_head::Dims { rows, cols: head.cols, vocab: head.rows, stride };
            return kernels.head(device, dims)?.issue(
                device,
                &gemv_head::Call {
                    weights: panels,
                    norm: weight,
                    x: &work.x,
                    index,
                    live: &arrays.logits,
                    logits: &work.logits,
                    norm_cols: head.cols,
                    eps,
                },
            );
        }
        let capacity = rows.next_multiple_of(8);
        let (x, y, live, cols) = (&work.x, &work.normed, &arrays.logits, head.cols);
        if let Some(rounding) = &head.rounding {
            let (capacity, rounding) = (Some(capacity), rounding.as_call());
            let call = NormedCall { x, weight, y, live, index, rows, cols, capacity, eps, rounding };
            kernels.quantise(device)?.normed(device, &call)?;
        } else {
            let call = rms_norm::Call { x, weight, y, live, index, rows, cols, capacity, eps };
            kernels.norm.issue(device, &call)?;
        }
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
