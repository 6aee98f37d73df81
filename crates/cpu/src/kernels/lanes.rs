//! Loops that the compiler vectorises, compiled once per instruction set: attention over a page, softmax, both kinds of SwiGLU.

use half::bf16;

use crate::isa::Isa;
use crate::kv::{Cells, SLOT_LANES};

/// Compiles `$body` for each instruction set and picks at run time.
macro_rules! per_isa {
    ($(#[$doc:meta])* $vis:vis fn $name:ident = $body:ident($($arg:ident: $ty:ty),* $(,)?)) => {
        $(#[$doc])*
        $vis fn $name(isa: Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) {
                $body::<true>($($arg),*);
            }
            match isa {
                // SAFETY: `Isa` is only made by detection of these features.
                #[cfg(target_arch = "x86_64")]
                Isa::Avx2 | Isa::Avx512 => unsafe { avx2($($arg),*) },
                _ => $body::<{ cfg!(target_arch = "aarch64") }>($($arg),*),
            }
        }
    };
}

/// What one page's loops need to know.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PageShape {
    /// Elements per head.
    pub(crate) dim: usize,
    /// Slots of a page, padding included.
    pub(crate) slots: usize,
    /// Scores kept per query: the distance between one query's scores and the next one's.
    pub(crate) stride: usize,
}

per_isa! {
    /// `scores[h * stride + slot] = q[h] . key[slot]` for all slots of a page, written or not; keys are `[dim, slots]`.
    pub(crate) fn page_scores = page_scores_body(q: &[f32], keys: Cells<'_>, shape: PageShape, scores: &mut [f32])
}

per_isa! {
    /// `out[h] += sum over slots of p[h * stride + slot] * value[slot]`, slots ascending; `slots` counts those read,
    /// values start at the first of them.
    pub(crate) fn add_values = add_values_body(
        p: &[f32], values: Cells<'_>, slots: usize, shape: PageShape, out: &mut [f32],
    )
}

per_isa! {
    /// Scores to probabilities in place; `sink` joins the denominator.
    pub(crate) fn softmax = softmax_body(scores: &mut [f32], scale: f32, sink: Option<f32>)
}

per_isa! {
    /// Clamped SwiGLU of interleaved pairs: `gated[2i]` is the gate, `gated[2i + 1]` the up value.
    pub(crate) fn swiglu = swiglu_body(gated: &[f32], bias: &[f32], alpha: f32, limit: f32, out: &mut [f32])
}

per_isa! {
    /// SwiGLU of gates and up values.
    pub(crate) fn silu = silu_body(gate: &[f32], up: &[f32], out: &mut [f32])
}

#[inline(always)]
fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// `e^x` within 2 units in the last place, without a branch: `2^n * e^r` with `|r| <= ln 2 / 2`.
#[inline(always)]
fn exp<const FMA: bool>(x: f32) -> f32 {
    // Adding this constant rounds to an integer in the low bits; below -87.3 the result is a flushed zero.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.clamp(-87.3, 88.3);
    let shifted = fma::<FMA>(clamped, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<FMA>(n, -22_713.0 / 32_768.0, clamped);
    let r = fma::<FMA>(n, -1.428_606_8e-6, r);
    let mut sum = 1.0 / 720.0;
    for term in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = fma::<FMA>(sum, r, term);
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    let value = sum * power;
    if x < -87.3 { 0.0 } else { value }
}

#[inline(always)]
fn page_scores_body<const FMA: bool>(q: &[f32], keys: Cells<'_>, shape: PageShape, scores: &mut [f32]) {
    match keys {
        Cells::F32(keys) => scores_loop::<FMA, f32>(q, keys, |x| x, shape, scores),
        Cells::Bf16(keys) => scores_loop::<FMA, bf16>(q, keys, widen, shape, scores),
    }
}

/// bf16 to f32 in a form that vectorises.
#[inline(always)]
fn widen(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

#[inline(always)]
fn scores_loop<const FMA: bool, T: Copy>(
    q: &[f32],
    keys: &[T],
    widen: impl Fn(T) -> f32 + Copy,
    shape: PageShape,
    scores: &mut [f32],
) {
    for (head, q) in q.chunks_exact(shape.dim).enumerate() {
        let scores = &mut scores[head * shape.stride..][..shape.slots];
        for (at, scores) in scores.chunks_exact_mut(SLOT_LANES).enumerate() {
            let mut sum = [0.0_f32; SLOT_LANES];
            for (&q, keys) in q.iter().zip(keys.chunks_exact(shape.slots)) {
                let keys = &keys[at * SLOT_LANES..][..SLOT_LANES];
                for lane in 0..SLOT_LANES {
                    sum[lane] = fma::<FMA>(q, widen(keys[lane]), sum[lane]);
                }
            }
            scores.copy_from_slice(&sum);
        }
    }
}

#[inline(always)]
fn add_values_body<const FMA: bool>(
    p: &[f32],
    values: Cells<'_>,
    slots: usize,
    shape: PageShape,
    out: &mut [f32],
) {
    match values {
        Cells::F32(values) => values_loop::<FMA, f32>(p, values, |x| x, slots, shape, out),
        Cells::Bf16(values) => values_loop::<FMA, bf16>(p, values, widen, slots, shape, out),
    }
}

#[inline(always)]
fn values_loop<const FMA: bool, T: Copy>(
    p: &[f32],
    values: &[T],
    widen: impl Fn(T) -> f32 + Copy,
    slots: usize,
    shape: PageShape,
    out: &mut [f32],
) {
    const LANES: usize = 32;
    for (head, out) in out.chunks_exact_mut(shape.dim).enumerate() {
        let p = &p[head * shape.stride..][..slots];
        let mut parts = out.chunks_exact_mut(LANES);
        let mut at = 0;
        for part in parts.by_ref() {
            let mut sum = [0.0_f32; LANES];
            sum.copy_from_slice(part);
            for (&p, values) in p.iter().zip(values.chunks_exact(shape.dim)) {
                let values = &values[at..][..LANES];
                for lane in 0..LANES {
                    sum[lane] = fma::<FMA>(p, widen(values[lane]), sum[lane]);
                }
            }
            part.copy_from_slice(&sum);
            at += LANES;
        }
        for (lane, out) in parts.into_remainder().iter_mut().enumerate() {
            for (&p, values) in p.iter().zip(values.chunks_exact(shape.dim)) {
                *out = fma::<FMA>(p, widen(values[at + lane]), *out);
            }
        }
    }
}

#[inline(always)]
fn softmax_body<const FMA: bool>(scores: &mut [f32], scale: f32, sink: Option<f32>) {
    let mut peak = sink.unwrap_or(f32::NEG_INFINITY);
    for score in scores.iter_mut() {
        *score *= scale;
        peak = peak.max(*score);
    }
    for score in scores.iter_mut() {
        *score = exp::<FMA>(*score - peak);
    }
    let mut lanes = [0.0_f64; SLOT_LANES];
    for (at, &p) in scores.iter().enumerate() {
        lanes[at % SLOT_LANES] += f64::from(p);
    }
    let total = lanes.iter().sum::<f64>() + sink.map_or(0.0, |sink| f64::from((sink - peak).exp()));
    let inverse = (1.0 / total) as f32;
    for score in scores.iter_mut() {
        *score *= inverse;
    }
}

#[inline(always)]
fn swiglu_body<const FMA: bool>(gated: &[f32], bias: &[f32], alpha: f32, limit: f32, out: &mut [f32]) {
    for ((pair, bias), out) in gated.chunks_exact(2).zip(bias.chunks_exact(2)).zip(out) {
        let (gate, up) = (pair[0] + bias[0], pair[1] + bias[1]);
        // Comparisons and not `min`, which would turn a NaN into the limit.
        let gate = if gate > limit { limit } else { gate };
        let up = if up > limit { limit } else { up };
        let up = if up < -limit { -limit } else { up };
        *out = gate / (1.0 + exp::<FMA>(-alpha * gate)) * (up + 1.0);
    }
}

#[inline(always)]
fn silu_body<const FMA: bool>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((&gate, &up), out) in gate.iter().zip(up).zip(out) {
        *out = gate / (1.0 + exp::<FMA>(-gate)) * up;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for step in -8700..8800 {
            let x = step as f32 * 0.01 + 0.001;
            let (got, want) = (exp::<false>(x), f64::from(x).exp());
            assert!((f64::from(got) / want - 1.0).abs() < 2.5e-7, "exp({x}) = {got}, not {want}");
        }
        assert_eq!(
            (exp::<false>(0.0), exp::<false>(f32::NEG_INFINITY), exp::<false>(-100.0)),
            (1.0, 0.0, 0.0)
        );
        assert!(exp::<false>(f32::NAN).is_nan());
    }
}
