//! RMSNorm: of rows, the first half of four ops, and of heads.

use ctxserve_backend::DeviceError;

use crate::rows::Rows;

/// `x / sqrt(mean(x^2) + eps) * weight` of each row; the mean is taken in f64, the weight multiplied in f32.
pub(crate) fn rms_norm(op: &'static str, x: &Rows, weight: &[f32], eps: f32) -> Result<Rows, DeviceError> {
    x.expect(op, x.rows(), weight.len())?;
    let mut out = x.clone();
    out.data_mut().chunks_exact_mut(weight.len().max(1)).for_each(|row| rms_norm_in_place(row, weight, eps));
    Ok(out)
}

/// The same of one row, or head, as long as `weight`.
pub(crate) fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    let mut lanes = [0.0_f64; 8];
    for (at, &x) in x.iter().enumerate() {
        lanes[at % 8] += f64::from(x) * f64::from(x);
    }
    let mean = lanes.iter().sum::<f64>() / x.len() as f64;
    let inverse = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
    for (x, w) in x.iter_mut().zip(weight) {
        *x = *x * inverse * w;
    }
}
