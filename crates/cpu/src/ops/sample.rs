//! Logits to token ids.

mod candidates;
mod logprobs;

use std::borrow::Cow;

use ctxserve_backend::{Batch, DeviceError, SampleError, SampleRow, Sampled};
use ctxserve_core::SamplingParams;
use rayon::prelude::*;

use crate::backend::CpuBackend;
use crate::rows::Rows;

/// One token per logit row, each row on its own.
pub(crate) fn sample(
    backend: &CpuBackend,
    logits: &Rows,
    batch: &Batch,
) -> Result<Vec<Result<Sampled, SampleError>>, DeviceError> {
    let rows: Vec<&SampleRow> = batch.sample_rows().collect();
    if rows.len() != logits.rows() {
        return Err(DeviceError::new("sample", "logits and sampling rows differ in number"));
    }
    Ok(match &backend.fast {
        None => rows.iter().enumerate().map(|(at, row)| sample_row(logits.row(at), row)).collect(),
        Some(fast) => fast.pool.install(|| {
            rows.par_iter().enumerate().map(|(at, row)| sample_row(logits.row(at), row)).collect()
        }),
    })
}

/// Picks one token from `logits` (`[vocab]`) in the order that [`SamplingParams`] documents.
///
/// # Errors
/// [`SampleError::NonFinite`] for a NaN, a positive infinity or nothing but negative ones;
/// [`SampleError::NothingLeft`] when bans leave no candidate.
pub fn sample_row(logits: &[f32], row: &SampleRow) -> Result<Sampled, SampleError> {
    let mut best = f32::NEG_INFINITY;
    let mut tainted = false;
    for &z in logits {
        tainted |= z.is_nan();
        best = best.max(z);
    }
    if tainted || !best.is_finite() {
        return Err(SampleError::NonFinite);
    }
    let adjusted = adjust(logits, row);
    let (greedy, best) = argmax(&adjusted).ok_or(SampleError::NothingLeft)?;
    let params = &*row.params;
    let id = if params.is_greedy() {
        greedy
    } else {
        candidates::draw(&adjusted, best, params, uniform(row.seed, row.step))
    };
    let logprobs = params.logprobs.map(|top| Box::new(logprobs::read(&adjusted, best, id, top)));
    Ok(Sampled { id, logprobs })
}

/// Applies bans, masks, bias and penalties; borrows the logits where none of them is asked for.
fn adjust<'a>(logits: &'a [f32], row: &SampleRow) -> Cow<'a, [f32]> {
    let params = &*row.params;
    if row.banned.is_empty() && row.mask.is_none() && params.logit_bias.is_empty() && !params.has_penalties()
    {
        return Cow::Borrowed(logits);
    }
    let mut logits = logits.to_vec();
    for &(id, bias) in &params.logit_bias {
        if let Some(z) = logits.get_mut(id as usize) {
            *z += bias;
        }
    }
    if params.has_penalties() {
        penalise(&mut logits, params, row);
    }
    // Last, so that nothing lifts a banned token again.
    for &id in row.banned.iter() {
        if let Some(z) = logits.get_mut(id as usize) {
            *z = f32::NEG_INFINITY;
        }
    }
    if let Some(mask) = &row.mask {
        for (z, id) in logits.iter_mut().zip(0..) {
            if !mask.allows(id) {
                *z = f32::NEG_INFINITY;
            }
        }
    }
    Cow::Owned(logits)
}

/// Repetition over prompt and output, then frequency and presence over the output.
fn penalise(logits: &mut [f32], params: &SamplingParams, row: &SampleRow) {
    let mut generated = row.generated.to_vec();
    generated.sort_unstable();
    if params.repetition_penalty != 1.0 {
        let mut seen: Vec<_> = row.prompt.iter().chain(&generated).copied().collect();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            if let Some(z) = logits.get_mut(id as usize) {
                let penalty = params.repetition_penalty;
                *z = if *z > 0.0 { *z / penalty } else { *z * penalty };
            }
        }
    }
    for run in generated.chunk_by(|a, b| a == b) {
        if let Some(z) = logits.get_mut(run[0] as usize) {
            *z -= run.len() as f32 * params.frequency_penalty + params.presence_penalty;
        }
    }
}

/// The first of the greatest, or `None` when all are minus infinity.
fn argmax(logits: &[f32]) -> Option<(u32, f32)> {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if best == f32::NEG_INFINITY {
        return None;
    }
    let id = logits.iter().position(|&z| z == best)?;
    Some((id as u32, best))
}

/// Draw number `step` of stream `seed`, uniform in `[0, 1)` with 53 bits: SplitMix64's output function over a counter
/// whose origin is the mixed seed. A pure function, so a seeded sequence repeats whatever else is in the batch.
pub fn uniform(seed: u64, step: u64) -> f64 {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let origin = mix(seed.wrapping_add(GOLDEN));
    let bits = mix(origin.wrapping_add(step.wrapping_add(1).wrapping_mul(GOLDEN)));
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}
