//! Mixture of experts: routing, gate/up, clamped SwiGLU, down, weighted sum.

mod grouped;

use ctxserve_backend::{DeviceError, ExpertSpec, ExpertWeights, Moe};
use ctxserve_core::Matrix;

use crate::backend::CpuBackend;
use crate::linear::{Weights, linear, plain};
use crate::ops::rms_norm;
use crate::rows::Rows;

const OP: &str = "experts";

/// A stack of experts.
#[derive(Debug)]
pub struct CpuExperts {
    gate_up: Weights,
    gate_up_bias: Vec<f32>,
    down: Weights,
    down_bias: Vec<f32>,
    spec: ExpertSpec,
}

/// One of a token's experts.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Choice {
    expert: usize,
    weight: f32,
}

impl CpuExperts {
    pub(crate) fn load(
        backend: &CpuBackend,
        weights: ExpertWeights,
        spec: &ExpertSpec,
    ) -> Result<Self, DeviceError> {
        let ExpertSpec { experts, top_k, hidden, inner, .. } = *spec;
        let shaped = |m: &Matrix, bias: &[f32], out: usize, cols: usize| {
            let rows = experts.checked_mul(out);
            rows == Some(m.rows()) && m.cols() == cols && bias.len() == m.rows()
        };
        if top_k == 0 || top_k > experts || hidden == 0 || inner == 0 {
            return Err(DeviceError::new("load_experts", "no experts, or fewer than each token uses"));
        }
        if !shaped(&weights.gate_up, &weights.gate_up_bias, 2 * inner, hidden)
            || !shaped(&weights.down, &weights.down_bias, hidden, inner)
        {
            return Err(DeviceError::new("load_experts", "weights and spec differ in shape"));
        }
        for weights in [&weights.gate_up, &weights.down] {
            if !backend.input_factors(weights)?.is_empty() {
                let what = "activations of experts are not quantised to NVFP4";
                return Err(DeviceError::new("load_experts", what));
            }
        }
        let int8 = backend.fast.as_ref().is_some_and(|fast| fast.int8);
        Ok(Self {
            gate_up: backend.keep(weights.gate_up, experts, int8)?,
            gate_up_bias: weights.gate_up_bias,
            down: backend.keep(weights.down, experts, int8)?,
            down_bias: weights.down_bias,
            spec: *spec,
        })
    }
}

/// `x += MoE(RMSNorm(x))`.
pub(crate) fn experts(backend: &CpuBackend, moe: &Moe<CpuBackend>, x: &mut Rows) -> Result<(), DeviceError> {
    let spec = &moe.spec;
    if moe.experts.spec != *spec || moe.router.rows != spec.experts {
        return Err(DeviceError::new(OP, "router, experts and spec differ"));
    }
    x.expect(OP, x.rows(), spec.hidden)?;
    let normed = rms_norm(OP, x, &moe.norm, spec.norm_eps)?;
    let router = linear(OP, backend.fast.as_ref(), &moe.router, &normed)?;
    let choices: Vec<Vec<Choice>> = (0..x.rows()).map(|row| route(router.row(row), spec.top_k)).collect();
    match (&moe.experts.gate_up, &moe.experts.down, &backend.fast) {
        (Weights::Plain(gate_up), Weights::Plain(down), _) => {
            for (row, choices) in choices.iter().enumerate() {
                plain_row((gate_up, down), &moe.experts, normed.row(row), choices, x.row_mut(row));
            }
        }
        (Weights::Packed(gate_up), Weights::Packed(down), Some(fast)) => {
            grouped::add(fast, (gate_up, down), &moe.experts, &normed, &choices, x);
        }
        _ => return Err(DeviceError::new(OP, "weights of another backend")),
    }
    Ok(())
}

/// The `top_k` greatest logits, ties by lowest index, and their softmax.
fn route(logits: &[f32], top_k: usize) -> Vec<Choice> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    order.truncate(top_k);
    let peak = logits[order[0]];
    let powers: Vec<f32> = order.iter().map(|&expert| (logits[expert] - peak).exp()).collect();
    let total: f32 = powers.iter().sum();
    order.into_iter().zip(powers).map(|(expert, power)| Choice { expert, weight: power / total }).collect()
}

/// One token, expert after expert: the definition.
fn plain_row(
    (gate_up, down): (&Matrix, &Matrix),
    experts: &CpuExperts,
    normed: &[f32],
    choices: &[Choice],
    x: &mut [f32],
) {
    let ExpertSpec { hidden, inner, alpha, limit, .. } = experts.spec;
    let (mut u, mut y) = (vec![0.0; 2 * inner], vec![0.0; hidden]);
    let mut sums = vec![0.0_f64; hidden];
    for &Choice { expert, weight } in choices {
        plain(gate_up, expert * 2 * inner, normed, &mut u);
        let bias = &experts.gate_up_bias[expert * 2 * inner..][..2 * inner];
        u.iter_mut().zip(bias).for_each(|(u, b)| *u += b);
        let a: Vec<f32> = u.chunks_exact(2).map(|pair| swiglu(pair[0], pair[1], alpha, limit)).collect();
        plain(down, expert * hidden, &a, &mut y);
        let bias = &experts.down_bias[expert * hidden..][..hidden];
        for ((sum, y), b) in sums.iter_mut().zip(&y).zip(bias) {
            *sum += f64::from(weight) * (f64::from(*y) + f64::from(*b));
        }
    }
    x.iter_mut().zip(sums).for_each(|(x, sum)| *x += sum as f32);
}

/// `gate * sigmoid(alpha * gate) * (up + 1)` of the clamped pair. A NaN stays one.
fn swiglu(gate: f32, up: f32, alpha: f32, limit: f32) -> f32 {
    let gate = if gate > limit { limit } else { gate };
    let up = if up > limit {
        limit
    } else if up < -limit {
        -limit
    } else {
        up
    };
    let (gate, up) = (f64::from(gate), f64::from(up));
    (gate / (1.0 + (-f64::from(alpha) * gate).exp()) * (up + 1.0)) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_lowest_index_and_the_rest_has_no_weight() {
        let choices = route(&[1.0, 3.0, 3.0, 2.0, 3.0], 2);
        assert_eq!(choices, [Choice { expert: 1, weight: 0.5 }, Choice { expert: 2, weight: 0.5 }]);
    }

    #[test]
    fn the_gate_is_clamped_above_only() {
        assert_eq!(swiglu(9.0, 0.0, 1.702, 7.0), swiglu(7.0, 0.0, 1.702, 7.0));
        assert_ne!(swiglu(-9.0, 0.0, 1.702, 7.0), swiglu(-7.0, 0.0, 1.702, 7.0));
        assert_eq!(swiglu(1.0, -9.0, 1.702, 7.0), swiglu(1.0, -7.0, 1.702, 7.0));
        assert!(swiglu(f32::NAN, 0.0, 1.702, 7.0).is_nan());
    }
}
