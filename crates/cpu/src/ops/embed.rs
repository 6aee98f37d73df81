//! Token ids to rows of the embedding table.

use ctxserve_backend::{Batch, DeviceError};

use crate::decode::decode_row;
use crate::linear::{CpuMatrix, Weights};
use crate::rows::Rows;

/// `[vocab, hidden]` and ids to `[rows, hidden]`.
pub(crate) fn embed(table: &CpuMatrix, batch: &Batch) -> Result<Rows, DeviceError> {
    let mut out = Rows::zeros(batch.tokens.len(), table.cols);
    for (row, &id) in batch.tokens.iter().enumerate() {
        let id = id as usize;
        if id >= table.rows {
            return Err(DeviceError::new("embed", format!("token {id} of a vocabulary of {}", table.rows)));
        }
        match &table.weights {
            Weights::Plain(matrix) => decode_row(matrix, id, out.row_mut(row)),
            Weights::Packed(packed) => packed.read_row(id, out.row_mut(row)),
        }
    }
    Ok(out)
}
