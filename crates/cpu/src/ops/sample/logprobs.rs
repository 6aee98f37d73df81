//! Log-probabilities for the client.

use std::cmp::Ordering;

use ctxserve_core::{TokenId, TokenLogprob, TokenLogprobs};

/// Of the picked token and of the `top` best, ties by lowest id; `best` is the greatest logit.
pub(super) fn read(logits: &[f32], best: f32, id: TokenId, top: usize) -> TokenLogprobs {
    let total: f64 = logits.iter().map(|&z| f64::from((z - best).exp())).sum();
    let norm = f64::from(best) + total.ln();
    let of = |id: TokenId| {
        let logprob = (f64::from(logits[id as usize]) - norm) as f32;
        TokenLogprob { id, logprob: logprob.max(f32::MIN) }
    };
    TokenLogprobs { sampled: of(id), top: greatest(logits, top).into_iter().map(of).collect() }
}

/// Ids of the `count` greatest, best first.
pub(super) fn greatest(logits: &[f32], count: usize) -> Vec<TokenId> {
    let order = |&a: &TokenId, &b: &TokenId| descending((logits[a as usize], a), (logits[b as usize], b));
    let mut ids: Vec<TokenId> = (0..logits.len() as TokenId).collect();
    if count < ids.len() {
        if count > 0 {
            ids.select_nth_unstable_by(count - 1, order);
        }
        ids.truncate(count);
    }
    ids.sort_unstable_by(order);
    ids
}

/// Greater values first, then lower ids.
pub(super) fn descending(a: (f32, TokenId), b: (f32, TokenId)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}
