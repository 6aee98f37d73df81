//! What the tests of the products of few rows share.

use ctxserve_cuda::driver::{Buffer, Device};
use half::bf16;

use crate::common::{Random, from_bf16, panel, to_bf16};

/// A buffer whose last elements belong to nobody.
pub const CANARIES: usize = 256;

/// Poisoned memory for `len` elements and the canaries after them.
pub fn poisoned<T: ctxserve_cuda::driver::Pod>(device: &Device, len: usize) -> Buffer<T> {
    let mut buffer = device.allocate(len + CANARIES).unwrap();
    buffer.fill(0xff).unwrap();
    buffer
}

/// Bits of a random bf16 matrix `[rows, cols]`.
pub fn matrix(random: &mut Random, rows: usize, cols: usize) -> Vec<u16> {
    to_bf16(&random.units(rows * cols, 1.0 / (cols as f32).sqrt()))
}

pub fn in_panels(bits: &[u16], rows: usize, cols: usize) -> Vec<u16> {
    let mut panels = vec![0x7fff; rows * cols];
    for (at, &value) in bits.iter().enumerate() {
        panels[panel(at / cols, at % cols, rows)] = value;
    }
    panels
}

/// The normed row as the kernels feed it to the product: `bf16(x * weight)`, and `1 / rms`.
pub fn normed(x: &[f32], weight: &[f32], norm_cols: usize, eps: f64) -> (Vec<f64>, f64) {
    let mean = x.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / norm_cols as f64;
    let operand = x.iter().zip(weight).map(|(v, w)| f64::from(bf16::from_f32(v * w))).collect();
    (operand, 1.0 / (mean + eps).sqrt())
}

pub fn dot(x: &[f64], weights: &[u16]) -> f64 {
    x.iter().zip(from_bf16(weights)).map(|(x, w)| x * w).sum()
}

/// Rows of `cols`, zero from `real` on.
pub fn padded(random: &mut Random, rows: usize, real: usize, cols: usize, scale: f32) -> Vec<f32> {
    let mut values = random.units(rows * cols, scale);
    values.iter_mut().enumerate().filter(|(at, _)| at % cols >= real).for_each(|(_, value)| *value = 0.0);
    values
}

/// Poisons the rows of `x` that no kernel may look at.
pub fn poison_dead(x: &mut [f32], live: usize, cols: usize) {
    x[live * cols..].fill(f32::NAN);
}
