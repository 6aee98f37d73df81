//! The sampler against a naive definition in f64, by counting draws and by enumerating what can be drawn.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ctxserve_backend::{SampleError, SampleRow};
use ctxserve_core::{SamplingParams, TokenId, TokenMask};
use ctxserve_cpu::{sample_row, uniform};

fn row(params: SamplingParams) -> SampleRow {
    SampleRow { seed: 42, ..SampleRow::new(Arc::new(params)) }
}

/// The picked id, or one that no vocabulary has.
fn pick(logits: &[f32], row: &SampleRow) -> TokenId {
    sample_row(logits, row).map_or(TokenId::MAX, |sampled| sampled.id)
}

/// Logits without order or ties, of a spread like a model's.
fn logits(count: usize) -> Vec<f32> {
    (0..count).map(|i| (uniform(9, i as u64) * 12.0 - 6.0) as f32).collect()
}

/// The distribution as documented: temperature, top-k, top-p, min-p, renormalised; straight from the words, in f64.
fn naive(logits: &[f32], params: &SamplingParams) -> BTreeMap<TokenId, f64> {
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let power = |z: f32| (f64::from(z - best) / f64::from(params.temperature)).exp();
    let mut all: Vec<(f64, TokenId)> = logits.iter().map(|&z| power(z)).zip(0..).collect();
    all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    if params.top_k > 0 {
        all.truncate(params.top_k as usize);
    }
    let total: f64 = all.iter().map(|c| c.0).sum();
    let mut mass = 0.0;
    let before = all.iter().map(|c| {
        mass += c.0 / total;
        mass - c.0 / total
    });
    let keep = before.filter(|&before| before < f64::from(params.top_p)).count();
    all.truncate(keep);
    let top = all[0].0;
    all.retain(|c| c.0 >= f64::from(params.min_p) * top);
    let total: f64 = all.iter().map(|c| c.0).sum();
    all.into_iter().map(|(power, id)| (id, power / total)).collect()
}

/// Draws `count` times and compares the counts with `expected` by a chi-square whose bound is seven deviations.
fn check_frequencies(logits: &[f32], params: SamplingParams, count: u64) {
    let expected = naive(logits, &params);
    let mut row = row(params.clone());
    let mut seen = BTreeMap::new();
    for step in 0..count {
        row.step = step;
        *seen.entry(pick(logits, &row)).or_insert(0_u64) += 1;
    }
    for id in seen.keys() {
        assert!(expected.contains_key(id), "{id} is filtered out by {params:?}");
    }
    // Rare candidates are pooled, as the test demands.
    let (mut chi, mut cells, mut rare) = (0.0, 0_u32, (0.0, 0.0));
    for (id, p) in &expected {
        let (want, got) = (p * count as f64, *seen.get(id).unwrap_or(&0) as f64);
        if want < 10.0 {
            rare = (rare.0 + want, rare.1 + got);
        } else {
            chi += (got - want).powi(2) / want;
            cells += 1;
        }
    }
    if rare.0 > 10.0 {
        chi += (rare.1 - rare.0).powi(2) / rare.0;
        cells += 1;
    }
    let freedom = f64::from(cells.saturating_sub(1));
    assert!(
        chi <= freedom + 7.0 * (2.0 * freedom).sqrt() + 1e-9,
        "chi-square {chi} of {freedom}: {params:?}"
    );
}

#[test]
fn draws_follow_the_documented_distribution() {
    let base = SamplingParams::default;
    let cases = [
        base(),
        SamplingParams { temperature: 0.5, ..base() },
        SamplingParams { temperature: 2.0, ..base() },
        SamplingParams { top_k: 5, ..base() },
        SamplingParams { top_k: 1, ..base() },
        SamplingParams { top_p: 0.8, ..base() },
        SamplingParams { top_p: 1e-6, ..base() },
        SamplingParams { min_p: 0.25, ..base() },
        SamplingParams { min_p: 1.0, ..base() },
        SamplingParams { temperature: 1.3, top_k: 20, top_p: 0.9, min_p: 0.05, ..base() },
    ];
    for params in cases {
        check_frequencies(&logits(60), params, 20_000);
    }
}

#[test]
fn a_nucleus_beyond_the_first_guess_is_still_exact() {
    // Nearly flat: 0.9 of the mass needs most of 3,000 candidates, far more than the first guess sorts.
    let flat: Vec<f32> = (0..3000).map(|i| (uniform(5, i) * 0.01) as f32).collect();
    let params = SamplingParams { top_p: 0.9, ..SamplingParams::default() };
    let expected: BTreeSet<TokenId> = naive(&flat, &params).into_keys().collect();
    let mut row = row(params);
    let mut seen = BTreeSet::new();
    for step in 0..40_000 {
        row.step = step;
        seen.insert(pick(&flat, &row));
    }
    // One candidate more or less: the boundary is decided in the last bit of a sum.
    let strangers = seen.difference(&expected).count();
    assert!(strangers <= 1, "{strangers} picks from beyond the nucleus");
    assert!(seen.len() + 5 >= expected.len(), "{} of {} were picked", seen.len(), expected.len());
}

#[test]
fn greedy_takes_the_first_of_the_greatest() {
    let row = row(SamplingParams::greedy());
    assert_eq!(pick(&[1.0, 3.0, 3.0, f32::NEG_INFINITY], &row), 1);
    assert_eq!(pick(&[-0.0, 0.0], &row), 0);
}

#[test]
fn top_k_ties_go_to_the_lowest_ids() {
    let mut row = row(SamplingParams { top_k: 2, ..SamplingParams::default() });
    for step in 0..200 {
        row.step = step;
        assert!(pick(&[1.0, 2.0, 2.0, 2.0, 0.0], &row) < 3);
    }
}

#[test]
fn the_same_seed_and_step_repeat_and_others_differ() {
    let flat = vec![0.0; 1000];
    let mut a = row(SamplingParams::default());
    let picks = |row: &mut SampleRow| -> Vec<TokenId> {
        (0..50)
            .map(|step| {
                row.step = step;
                pick(&flat, row)
            })
            .collect()
    };
    let first = picks(&mut a);
    assert_eq!(first, picks(&mut a));
    a.seed = 43;
    assert_ne!(first, picks(&mut a));
    assert!(first.iter().collect::<BTreeSet<_>>().len() > 40, "steps repeat: {first:?}");
}

#[test]
fn uniforms_are_flat_over_steps_and_over_seeds() {
    for of in [|i| uniform(1, i), |i| uniform(i, 0), |i| uniform(i, u64::MAX)] {
        let mut cells = [0_u32; 64];
        for i in 0..64_000 {
            let u = of(i);
            assert!((0.0..1.0).contains(&u));
            cells[(u * 64.0) as usize] += 1;
        }
        let chi: f64 = cells.iter().map(|&n| (f64::from(n) - 1000.0).powi(2) / 1000.0).sum();
        assert!(chi < 63.0 + 6.0 * 126.0_f64.sqrt(), "chi-square {chi} of 63");
    }
}

#[test]
fn penalties_count_output_once_per_token_or_once_at_all() {
    let base = SamplingParams { logprobs: Some(3), ..SamplingParams::greedy() };
    let adjusted = |params: SamplingParams, prompt: &[TokenId], generated: &[TokenId]| -> Vec<f64> {
        let mut row = row(params);
        row.prompt = Arc::from(prompt);
        row.generated = Arc::new(generated.to_vec());
        let read = *sample_row(&[2.0, 1.0, -1.0], &row).unwrap().logprobs.unwrap();
        let of = |id| f64::from(read.top.iter().find(|c| c.id == id).unwrap().logprob);
        // Differences of log-probabilities are differences of logits.
        vec![of(0) - of(1), of(2) - of(1)]
    };
    let close = |got: Vec<f64>, want: [f64; 2]| {
        assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-5), "{got:?}, not {want:?}");
    };
    close(adjusted(base.clone(), &[0], &[0]), [1.0, -2.0]);
    let presence = SamplingParams { presence_penalty: 0.5, ..base.clone() };
    close(adjusted(presence, &[2], &[0, 0]), [0.5, -2.0]);
    let frequency = SamplingParams { frequency_penalty: 0.5, ..base.clone() };
    close(adjusted(frequency, &[2], &[0, 0]), [0.0, -2.0]);
    // 2 / 2 and -1 * 2: both sides are pushed down, the prompt counts, and only once.
    let repetition = SamplingParams { repetition_penalty: 2.0, ..base.clone() };
    close(adjusted(repetition, &[2, 2], &[0, 0]), [0.0, -3.0]);
    let bias = SamplingParams { logit_bias: vec![(2, 4.0), (99, 1.0)], ..base };
    close(adjusted(bias, &[], &[]), [1.0, 2.0]);
}

/// OAI-17: never NaN.
#[test]
fn log_probabilities_are_stable_sorted_and_finite() {
    let mut row = row(SamplingParams { logprobs: Some(4), ..SamplingParams::greedy() });
    row.banned = Arc::from([4]);
    let logits = [1e4, 1e4, 9.999e3, -1e4, 2e4];
    let read = sample_row(&logits, &row).unwrap();
    let logprobs = read.logprobs.unwrap();
    assert_eq!((read.id, logprobs.sampled.id), (0, 0));
    let ids: Vec<TokenId> = logprobs.top.iter().map(|c| c.id).collect();
    assert_eq!(ids, [0, 1, 2, 3]);
    let want = -(2.0 + (-1.0_f64).exp()).ln();
    for (got, want) in logprobs.top.iter().zip([want, want, want - 1.0]) {
        assert!((f64::from(got.logprob) - want).abs() < 1e-6, "{got:?}, not {want}");
    }
    assert!(logprobs.top.iter().all(|c| c.logprob.is_finite()));
    let all = SamplingParams { logprobs: Some(20), ..SamplingParams::greedy() };
    row.params = Arc::new(all);
    let top = sample_row(&logits, &row).unwrap().logprobs.unwrap().top;
    assert_eq!((top.len(), top[4].id, top[4].logprob), (5, 4, f32::MIN));
    row.params = Arc::new(SamplingParams { logprobs: Some(0), ..SamplingParams::greedy() });
    assert!(sample_row(&logits, &row).unwrap().logprobs.unwrap().top.is_empty());
}

#[test]
fn log_probabilities_are_read_before_temperature_and_filters() {
    let params =
        SamplingParams { temperature: 0.1, top_k: 1, logprobs: Some(2), ..SamplingParams::default() };
    let read = sample_row(&[0.0, 3.0_f32.ln()], &row(params)).unwrap().logprobs.unwrap();
    assert!((read.top[0].logprob.exp() - 0.75).abs() < 1e-6);
    assert!((read.top[1].logprob.exp() - 0.25).abs() < 1e-6);
}

/// KRN-03: NaN is found where the token is drawn.
#[test]
fn garbage_and_bans_are_errors_of_the_row() {
    let mut row = row(SamplingParams::default());
    for bad in [[0.0, f32::NAN], [0.0, f32::INFINITY], [f32::NEG_INFINITY; 2]] {
        assert_eq!(sample_row(&bad, &row), Err(SampleError::NonFinite));
    }
    assert_eq!(sample_row(&[], &row), Err(SampleError::NonFinite));
    row.banned = Arc::from([1, 7]);
    for step in 0..50 {
        row.step = step;
        assert_eq!(pick(&[0.0, 50.0], &row), 0);
    }
    row.params = Arc::new(SamplingParams { logit_bias: vec![(1, 100.0)], ..SamplingParams::greedy() });
    assert_eq!(pick(&[0.0, 50.0], &row), 0);
    row.banned = Arc::from([0, 1]);
    assert_eq!(sample_row(&[0.0, 50.0], &row), Err(SampleError::NothingLeft));
}

#[test]
fn tiny_temperatures_do_not_overflow() {
    let row = row(SamplingParams { temperature: f32::MIN_POSITIVE, ..SamplingParams::default() });
    assert_eq!(pick(&[1.0, 30.0, 29.0], &row), 1);
}

/// A mask takes tokens out as bans do: greedy and drawn tokens, log-probabilities and all.
#[test]
fn nothing_outside_a_mask_is_picked() {
    let logits = logits(70);
    let allowed: Vec<TokenId> = vec![3, 31, 32, 64, 69];
    let mut mask = TokenMask::none(70);
    allowed.iter().for_each(|&id| mask.allow(id));
    let banned: Arc<[TokenId]> = (0..70).filter(|id| !allowed.contains(id)).collect();
    for temperature in [0.0, 1.0, 2.0] {
        for step in 0..200 {
            let params = SamplingParams { temperature, logprobs: Some(7), ..SamplingParams::default() };
            let plain = SampleRow { step, ..row(params) };
            let masked = SampleRow { mask: Some(Arc::new(mask.clone())), ..plain.clone() };
            let got = sample_row(&logits, &masked).unwrap();
            assert!(allowed.contains(&got.id));
            assert_eq!(
                got,
                sample_row(&logits, &SampleRow { banned: Arc::clone(&banned), ..plain }).unwrap()
            );
        }
    }
    // Narrower than the logits: nothing beyond it. Empty: nothing at all.
    let mut narrow = TokenMask::none(8);
    narrow.allow(2);
    let narrow = SampleRow { mask: Some(Arc::new(narrow)), ..row(SamplingParams::default()) };
    assert_eq!(pick(&logits, &narrow), 2);
    let empty = SampleRow { mask: Some(Arc::default()), ..row(SamplingParams::default()) };
    assert_eq!(sample_row(&logits, &empty), Err(SampleError::NothingLeft));
}
