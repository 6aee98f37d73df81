//! Temperature, filters, draw.

use ctxserve_core::{SamplingParams, TokenId};

use super::logprobs::descending;

/// A candidate: its weight `e^((z - best) / temperature)`, at most 1, and its id.
type Candidate = (f32, TokenId);

/// First guess at how many candidates a nucleus has; each further guess is eight times as many.
const NUCLEUS: usize = 256;

/// Draws an id; `uniform` is in `[0, 1)`.
pub(super) fn draw(logits: &[f32], best: f32, params: &SamplingParams, uniform: f64) -> TokenId {
    let inverse = 1.0 / f64::from(params.temperature);
    let weight = |z: f32| ((f64::from(z - best) * inverse) as f32).exp();
    let mut candidates: Vec<Candidate> =
        logits.iter().map(|&z| weight(z)).zip(0..).filter(|candidate| candidate.0 > 0.0).collect();
    keep_top_k(&mut candidates, params.top_k as usize);
    keep_top_p(&mut candidates, f64::from(params.top_p));
    // The best weight is 1 and always kept, so this is relative to the best probability.
    candidates.retain(|candidate| candidate.0 >= params.min_p);

    let total: f64 = candidates.iter().map(|candidate| f64::from(candidate.0)).sum();
    let mut left = uniform * total;
    for &(weight, id) in &candidates {
        left -= f64::from(weight);
        if left < 0.0 {
            return id;
        }
    }
    // Rounding may leave a sliver beyond the last one.
    candidates.last().map_or(0, |candidate| candidate.1)
}

fn order(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    descending(*a, *b)
}

/// The `k` most likely, ties by lowest id; 0 keeps all.
fn keep_top_k(candidates: &mut Vec<Candidate>, k: usize) {
    if k > 0 && k < candidates.len() {
        candidates.select_nth_unstable_by(k - 1, order);
        candidates.truncate(k);
    }
    if k > 0 {
        candidates.sort_unstable_by(order);
    }
}

/// The fewest most likely whose mass reaches `p` of what is left; 1 keeps all. Sorts a growing head of the
/// candidates only: nuclei are small, vocabularies are not.
fn keep_top_p(candidates: &mut Vec<Candidate>, p: f64) {
    if p >= 1.0 {
        return;
    }
    let wanted = p * candidates.iter().map(|candidate| f64::from(candidate.0)).sum::<f64>();
    let (mut sorted, mut mass) = (0, 0.0);
    let mut guess = NUCLEUS;
    while sorted < candidates.len() {
        let head = guess.min(candidates.len());
        if head < candidates.len() {
            candidates[sorted..].select_nth_unstable_by(head - sorted, order);
        }
        candidates[sorted..head].sort_unstable_by(order);
        for at in sorted..head {
            mass += f64::from(candidates[at].0);
            if mass >= wanted {
                candidates.truncate(at + 1);
                return;
            }
        }
        (sorted, guess) = (head, guess.saturating_mul(8));
    }
}
