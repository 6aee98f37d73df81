//! Dense SwiGLU: norm, gate and up, activation, down, residual.

use ctxserve_backend::{DeviceError, Mlp};
use rayon::prelude::*;

use crate::backend::CpuBackend;
use crate::kernels;
use crate::linear::linear;
use crate::ops::rms_norm;
use crate::rows::Rows;

const OP: &str = "mlp";

/// `x += down * (silu(gate) * up)` of `RMSNorm(x)`.
pub(crate) fn mlp(backend: &CpuBackend, mlp: &Mlp<CpuBackend>, x: &mut Rows) -> Result<(), DeviceError> {
    let (fast, inner) = (backend.fast.as_ref(), mlp.down.cols);
    if mlp.gate_up.rows != 2 * inner || mlp.down.rows != x.cols() {
        return Err(DeviceError::new(OP, "gate and up do not fit down, or down the activations"));
    }
    let normed = rms_norm(OP, x, &mlp.norm, mlp.norm_eps)?;
    let gated = linear(OP, fast, &mlp.gate_up, &normed)?;
    let mut activations = Rows::zeros(x.rows(), inner);
    match fast {
        None => {
            for row in 0..x.rows() {
                let (gate, up) = gated.row(row).split_at(inner);
                let pairs = gate.iter().zip(up);
                activations.row_mut(row).iter_mut().zip(pairs).for_each(|(y, (&g, &u))| *y = silu(g, u));
            }
        }
        Some(fast) => fast.pool.install(|| {
            let rows = activations.data_mut().par_chunks_exact_mut(inner);
            rows.zip(gated.data().par_chunks_exact(2 * inner)).for_each(|(out, gated)| {
                let (gate, up) = gated.split_at(inner);
                kernels::silu(fast.isa, gate, up, out);
            });
        }),
    }
    let y = linear(OP, fast, &mlp.down, &activations)?;
    x.data_mut().iter_mut().zip(y.data()).for_each(|(x, y)| *x += y);
    Ok(())
}

/// `gate * sigmoid(gate) * up`: the definition.
fn silu(gate: f32, up: f32) -> f32 {
    let (gate, up) = (f64::from(gate), f64::from(up));
    (gate / (1.0 + (-gate).exp()) * up) as f32
}
