//! Final norm and LM head, for the rows that are sampled.

use ctxserve_backend::{Batch, DeviceError};

use crate::backend::CpuBackend;
use crate::linear::{CpuMatrix, linear};
use crate::ops::rms_norm;
use crate::rows::Rows;

/// `[rows, hidden]` to `[logit rows, vocab]`.
pub(crate) fn logits(
    backend: &CpuBackend,
    norm: &[f32],
    norm_eps: f32,
    head: &CpuMatrix,
    x: &Rows,
    batch: &Batch,
) -> Result<Rows, DeviceError> {
    let wanted = match x.rows() == batch.tokens.len() {
        true => rms_norm("logits", &x.of(batch.logit_rows()), norm, norm_eps)?,
        false => {
            x.expect("logits", batch.logit_rows().count(), norm.len())?;
            rms_norm("logits", x, norm, norm_eps)?
        }
    };
    linear("logits", backend.fast.as_ref(), head, &wanted)
}
