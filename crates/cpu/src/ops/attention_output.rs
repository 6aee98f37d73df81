//! Output projection and residual.

use ctxserve_backend::DeviceError;

use crate::backend::CpuBackend;
use crate::linear::{CpuMatrix, linear};
use crate::rows::Rows;

/// `x += heads * O^T + bias`.
pub(crate) fn attention_output(
    backend: &CpuBackend,
    output: &CpuMatrix,
    heads: &Rows,
    x: &mut Rows,
) -> Result<(), DeviceError> {
    x.expect("attention_output", heads.rows(), output.rows)?;
    let projected = linear("attention_output", backend.fast.as_ref(), output, heads)?;
    x.data_mut().iter_mut().zip(projected.data()).for_each(|(x, y)| *x += y);
    Ok(())
}
