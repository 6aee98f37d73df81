//! RMSNorm, the first half of three ops.

use ctxserve_backend::DeviceError;

use crate::rows::Rows;

/// `x / sqrt(mean(x^2) + eps) * weight` of each row; the mean is taken in f64, the weight multiplied in f32.
pub(crate) fn rms_norm(op: &'static str, x: &Rows, weight: &[f32], eps: f32) -> Result<Rows, DeviceError> {
    x.expect(op, x.rows(), weight.len())?;
    let mut out = Rows::zeros(x.rows(), x.cols());
    for row in 0..x.rows() {
        let x = x.row(row);
        let mut lanes = [0.0_f64; 8];
        for (at, &x) in x.iter().enumerate() {
            lanes[at % 8] += f64::from(x) * f64::from(x);
        }
        let mean = lanes.iter().sum::<f64>() / x.len() as f64;
        let inverse = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
        for ((out, x), w) in out.row_mut(row).iter_mut().zip(x).zip(weight) {
            *out = x * inverse * w;
        }
    }
    Ok(out)
}
