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
    x.expect("logits", batch.tokens.len(), norm.len())?;
    let mut wanted = Vec::new();
    batch.logit_rows().for_each(|row| wanted.extend_from_slice(x.row(row)));
    let wanted = rms_norm("logits", &Rows::from_vec(wanted, norm.len()), norm, norm_eps)?;
    linear("logits", backend.fast.as_ref(), head, &wanted)
}
