//! The sampler against the CPU's, over random logits and parameters.

use std::sync::Arc;

use ctxserve_backend::{Batch, SampleError, SampleRow, Sampled, SequenceSlice};
use ctxserve_core::{SamplingParams, TokenId, TokenMask};
use ctxserve_cpu::{sample_row, uniform};
use ctxserve_cuda::driver::Device;
use ctxserve_cuda::sampler::Sampler;

use crate::common::{Random, device};

const REAL: usize = 201_088;

fn batch(rows: &[SampleRow]) -> Batch {
    let slice = |(at, row): (usize, &SampleRow)| SequenceSlice {
        key: at as u64,
        rows: at..at + 1,
        start: 0,
        feed: None,
        tables: Arc::default(),
        sample: Some(row.clone()),
    };
    Batch { tokens: vec![0; rows.len()], sequences: rows.iter().enumerate().map(slice).collect() }
}

/// Rows of logits as they lie on the device: columns beyond the vocabulary and rows beyond the live ones are NaN.
fn padded(logits: &[Vec<f32>], stride: usize, capacity: usize) -> Vec<f32> {
    let mut all = vec![f32::NAN; stride * capacity];
    for (to, from) in all.chunks_mut(stride).zip(logits) {
        to[..from.len()].copy_from_slice(from);
    }
    all
}

fn sample(device: &Device, rows: &[SampleRow], logits: &[Vec<f32>]) -> Vec<Result<Sampled, SampleError>> {
    let vocab = logits[0].len();
    let (stride, capacity) = (vocab.next_multiple_of(8) + 8, rows.len() + 3);
    let mut sampler = Sampler::new(device, capacity, vocab, stride).unwrap();
    let on_device = device.upload(&padded(logits, stride, capacity)).unwrap();
    sampler.upload(&batch(rows)).unwrap();
    sampler.issue(&on_device, capacity).unwrap();
    let outcomes = sampler.download().unwrap().wait().unwrap();
    let ids = sampler.ids().read(0, capacity).unwrap();
    for (at, id) in ids.iter().enumerate() {
        let want = outcomes.get(at).and_then(|outcome| outcome.as_ref().ok()).map_or(0, |sampled| sampled.id);
        assert_eq!(*id as u32, want, "row {at} of the ids on the device");
    }
    outcomes
}

fn params(set: impl FnOnce(&mut SamplingParams)) -> SamplingParams {
    let mut params = SamplingParams::default();
    set(&mut params);
    params
}

fn row(random: &mut Random, params: SamplingParams) -> SampleRow {
    SampleRow { seed: random.bits(), step: random.bits() % 1000, ..SampleRow::new(Arc::new(params)) }
}

/// Roughly normal.
fn normals(random: &mut Random, count: usize, scale: f32) -> Vec<f32> {
    (0..count).map(|_| (random.unit() + random.unit() + random.unit() + random.unit()) * scale).collect()
}

fn some_logits(random: &mut Random, vocab: usize, kind: usize) -> Vec<f32> {
    let mut logits = normals(random, vocab, [3.0, 1.0, 0.004, 8.0][kind % 4]);
    match kind % 11 {
        4 | 5 => logits.iter_mut().for_each(|z| *z = (*z * 2.0).round() / 2.0 + 0.25),
        6 => (0..vocab).for_each(|at| {
            if at % 10 > 2 {
                logits[at] = f32::NEG_INFINITY;
            }
        }),
        7 => (0..vocab).for_each(|at| {
            if at != vocab / 2 && at != vocab - 1 {
                logits[at] = f32::NEG_INFINITY;
            }
        }),
        8 => logits.fill(1.5),
        9 => logits[random.below(vocab)] = 30.0,
        10 => {
            let bad = [f32::NAN, f32::INFINITY][random.below(2)];
            logits[random.below(vocab)] = bad;
        }
        _ => {}
    }
    logits
}

fn some_row(random: &mut Random, vocab: usize) -> SampleRow {
    let unit = |random: &mut Random| (random.unit() + 1.0) / 2.0;
    let mut p = params(|p| p.temperature = [0.0, 1.0, 1.0, 0.3, 2.0, 1e-6][random.below(6)]);
    if random.below(3) == 0 {
        p.top_k = [1, 2, 20, 50, 300, 5000, 300_000][random.below(7)];
    }
    if random.below(2) == 0 {
        p.top_p = [1e-6, 0.5, 0.9, 0.95, 0.999][random.below(5)];
    }
    if random.below(4) == 0 {
        p.min_p = [0.01, 0.2, 1.0][random.below(3)];
    }
    if random.below(2) == 0 {
        p.logprobs = Some([0, 1, 5, 20][random.below(4)]);
    }
    if random.below(4) == 0 {
        p.presence_penalty = random.unit() * 2.0;
        p.frequency_penalty = random.unit() * 2.0;
        p.repetition_penalty = [1.0, 1.3, 0.7][random.below(3)];
    }
    if random.below(4) == 0 {
        for _ in 0..random.below(40) {
            let id = random.below(vocab + 1) as u32;
            if p.logit_bias.iter().all(|entry| entry.0 != id) {
                p.logit_bias.push((id, unit(random) * 4.0 - 2.0));
            }
        }
    }
    let history = p.has_penalties();
    let mut row = row(random, p);
    if history {
        row.prompt = (0..random.below(600)).map(|_| random.below(vocab) as u32).collect();
        row.generated = Arc::new((0..random.below(600)).map(|_| random.below(vocab) as u32).collect());
    }
    if random.below(4) == 0 {
        row.banned = (0..1 + random.below(5)).map(|_| random.below(vocab) as u32).collect();
    }
    if random.below(3) == 0 {
        row.mask = Some(Arc::new(some_mask(random, vocab)));
    }
    row
}

/// From nothing at all to everything but one, and of other widths than the vocabulary.
fn some_mask(random: &mut Random, vocab: usize) -> TokenMask {
    let width = [vocab, vocab.saturating_sub(5).max(1), vocab + 70][random.below(3)];
    let mut mask = TokenMask::none(width);
    let few = [0, 1, 2, 30][random.below(4)];
    match random.below(4) {
        0 => (0..few).for_each(|_| mask.allow(random.below(vocab) as u32)),
        1 => (0..width as u32).filter(|id| id % 7 == 3).for_each(|id| mask.allow(id)),
        2 => (0..width as u32).filter(|id| id / 1024 == 1 || *id == 5).for_each(|id| mask.allow(id)),
        _ => {
            let none = random.below(vocab) as u32;
            (0..width as u32).filter(|id| *id != none).for_each(|id| mask.allow(id));
        }
    }
    mask
}

/// The logits that are drawn from, as the CPU adjusts them.
fn adjusted(logits: &[f32], row: &SampleRow) -> Vec<f32> {
    let (mut logits, p) = (logits.to_vec(), &row.params);
    let vocab = logits.len();
    for &(id, bias) in p.logit_bias.iter().filter(|entry| (entry.0 as usize) < vocab) {
        logits[id as usize] += bias;
    }
    for (id, z) in logits.iter_mut().enumerate() {
        let id = id as u32;
        let count = row.generated.iter().filter(|&&other| other == id).count();
        if p.repetition_penalty != 1.0 && (count > 0 || row.prompt.contains(&id)) {
            *z = if *z > 0.0 { *z / p.repetition_penalty } else { *z * p.repetition_penalty };
        }
        if count > 0 {
            *z -= count as f32 * p.frequency_penalty + p.presence_penalty;
        }
    }
    row.banned.iter().for_each(|&id| logits[id as usize] = f32::NEG_INFINITY);
    if let Some(mask) = &row.mask {
        (0..).zip(&mut logits).filter(|(id, _)| !mask.allows(*id)).for_each(|(_, z)| *z = f32::NEG_INFINITY);
    }
    logits
}

/// How far the draw lies from the interval of `id`, in probability, by the definition in float64.
fn distance(logits: &[f32], row: &SampleRow, id: TokenId) -> f64 {
    let p = &row.params;
    let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weigh = |z: f32| (f64::from(z - best) / f64::from(p.temperature)).exp();
    let mut all: Vec<(f32, f64, u32)> =
        logits.iter().zip(0..).map(|(&z, id)| (z, weigh(z), id)).filter(|c| c.1 > 1e-46).collect();
    if p.top_k > 0 || p.top_p < 1.0 {
        all.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap().then(a.2.cmp(&b.2)));
    }
    if p.top_k > 0 {
        all.truncate(p.top_k as usize);
    }
    if p.top_p < 1.0 {
        let wanted = f64::from(p.top_p) * all.iter().map(|c| c.1).sum::<f64>();
        let mut mass = 0.0;
        let kept = all.iter().position(|c| {
            mass += c.1;
            mass >= wanted
        });
        all.truncate(kept.map_or(all.len(), |at| at + 1));
    }
    // Rounding may decide about the last candidate; the first is always kept.
    all.retain(|c| c.1 >= f64::from(p.min_p) * (1.0 - 1e-6));
    let total: f64 = all.iter().map(|c| c.1).sum();
    let target = uniform(row.seed, row.step);
    let mut mass = 0.0;
    for c in &all {
        let (low, high) = (mass / total, (mass + c.1) / total);
        if c.2 == id {
            return (low - target).max(target - high).max(0.0);
        }
        mass += c.1;
    }
    f64::INFINITY
}

/// Checks outcomes against the CPU's. Returns how many picked another token than the CPU, all of them next to a boundary.
fn check(rows: &[SampleRow], logits: &[Vec<f32>], got: &[Result<Sampled, SampleError>]) -> usize {
    assert_eq!(got.len(), rows.len());
    let mut others = 0;
    for (at, ((row, logits), got)) in rows.iter().zip(logits).zip(got).enumerate() {
        let want = sample_row(logits, row);
        let what = format!("row {at} of {}: {:?}", logits.len(), row.params);
        let (got, want) = match (got, &want) {
            (Ok(got), Ok(want)) => (got, want),
            _ => {
                assert_eq!(got.as_ref().err(), want.as_ref().err(), "{what}");
                continue;
            }
        };
        if got.id != want.id {
            assert!(!row.params.is_greedy(), "{what}: {} and not {}", got.id, want.id);
            let off = distance(&adjusted(logits, row), row, got.id);
            assert!(off < 1e-6, "{what}: {} and not {}, off by {off:e}", got.id, want.id);
            others += 1;
        }
        let (Some(a), Some(b)) = (&got.logprobs, &want.logprobs) else {
            assert_eq!(got.logprobs.is_some(), want.logprobs.is_some(), "{what}");
            continue;
        };
        let close = |a: f32, b: f32| a == b || (a - b).abs() < 1e-4;
        assert_eq!(a.sampled.id, got.id, "{what}");
        if got.id == want.id {
            assert!(close(a.sampled.logprob, b.sampled.logprob), "{what}: {a:?}\n{b:?}");
        }
        assert_eq!(a.top.len(), b.top.len(), "{what}");
        for (a, b) in a.top.iter().zip(&b.top) {
            assert!(a.id == b.id && close(a.logprob, b.logprob), "{what}: {a:?} and not {b:?}");
        }
    }
    others
}

fn check_on(device: &Device, rows: &[SampleRow], logits: &[Vec<f32>]) -> usize {
    check(rows, logits, &sample(device, rows, logits))
}

#[test]
fn sampler_agrees_with_the_cpu() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    let (mut all, mut others) = (0, 0);
    for (vocab, count, rounds) in
        [(1, 4, 1), (8, 40, 4), (100, 67, 6), (1023, 33, 2), (3072, 70, 6), (5001, 40, 4), (REAL, 44, 2)]
    {
        for _ in 0..rounds {
            let rows: Vec<SampleRow> = (0..count).map(|_| some_row(&mut random, vocab)).collect();
            let logits: Vec<Vec<f32>> = (0..count)
                .map(|_| {
                    let kind = random.below(11);
                    some_logits(&mut random, vocab, kind)
                })
                .collect();
            others += check_on(&device, &rows, &logits);
            all += count;
        }
    }
    println!("{others} of {all} rows picked the other side of a boundary");

    assert!(others * 50 < all, "{others} of {all} rows differ from the CPU");
}

#[test]
fn sampler_finds_large_sets_of_candidates() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    let cases: Vec<SamplingParams> = vec![
        params(|p| (p.temperature, p.top_p) = (2.0, 0.999)),
        params(|p| (p.temperature, p.top_p) = (2.0, 0.5)),
        params(|p| (p.temperature, p.top_k) = (2.0, 150_000)),
        params(|p| (p.temperature, p.top_k, p.top_p) = (1.5, 60_000, 0.9)),
        params(|p| (p.temperature, p.top_p, p.min_p) = (2.0, 0.9999, 0.02)),
        params(|p| (p.temperature, p.top_p, p.min_p) = (2.0, 0.7, 0.001)),
        params(|p| p.top_k = 1000),
        params(|p| p.top_k = 197),
        params(|p| p.min_p = 0.1),
        params(|p| p.top_p = 1.0 - f32::EPSILON),
    ];
    for kind in [0, 1, 3, 4, 8] {
        let rows: Vec<SampleRow> =
            cases.iter().chain(&cases).map(|params| row(&mut random, params.clone())).collect();
        let logits: Vec<Vec<f32>> = rows.iter().map(|_| some_logits(&mut random, REAL, kind)).collect();
        let others = check_on(&device, &rows, &logits);
        println!("kind {kind}: {others} of {} rows picked the other side of a boundary", rows.len());
    }
}

#[test]
fn sampler_does_not_look_at_neighbours() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    let count = 33;
    let rows: Vec<SampleRow> = (0..count).map(|_| some_row(&mut random, REAL)).collect();
    let logits: Vec<Vec<f32>> = (0..count).map(|at| some_logits(&mut random, REAL, at % 10)).collect();
    let together = sample(&device, &rows, &logits);
    for at in [0, 1, 7, 31, 32] {
        let alone = sample(&device, &rows[at..=at], &logits[at..=at]);
        assert_eq!(alone[0], together[at], "row {at}");
    }
}

#[test]
fn sampler_replays_with_what_was_uploaded_last() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    let (vocab, stride, capacity) = (5000, 5000, 20);
    let mut sampler = Sampler::new(&device, capacity, vocab, stride).unwrap();
    let mut on_device = device.zeros::<f32>(capacity * stride).unwrap();
    let graph = device.capture(|| sampler.issue(&on_device, capacity)).unwrap();
    let mut under_way = Vec::new();
    for step in 0..12 {
        let count = [1, 20, 0, 7][step % 4];
        let rows: Vec<SampleRow> = (0..count).map(|_| some_row(&mut random, vocab)).collect();
        let logits: Vec<Vec<f32>> = (0..count).map(|at| some_logits(&mut random, vocab, at)).collect();
        on_device.write(0, &padded(&logits, stride, capacity)).unwrap();
        sampler.upload(&batch(&rows)).unwrap();
        graph.launch().unwrap();
        let pending = sampler.download().unwrap();
        // One outcome is thrown away, two are under way at a time.
        if step != 5 {
            under_way.push((rows, logits, pending));
        }
        if under_way.len() > 1 {
            let (rows, logits, pending) = under_way.remove(0);
            check(&rows, &logits, &pending.wait().unwrap());
        }
    }
    let many: Vec<SampleRow> = (0..capacity + 1).map(|_| some_row(&mut random, vocab)).collect();
    assert!(sampler.upload(&batch(&many)).is_err(), "more rows than there is room for");
    assert!(sampler.issue(&on_device, capacity + 1).is_err());
    assert!(Sampler::new(&device, 1, 0, 0).is_err());
}

/// As constrained decoding has it: many rows, each with a mask of its own, some with one token left.
#[test]
fn sampler_picks_within_masks() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for count in [1, 17, 64] {
        let rows: Vec<SampleRow> = (0..count)
            .map(|at| {
                let mut row = row(&mut random, params(|p| p.temperature = [0.0, 1.0][at % 2]));
                let mut mask = TokenMask::none(REAL);
                (0..=at % 3 * 500).for_each(|_| mask.allow(random.below(REAL) as u32));
                row.mask = Some(Arc::new(mask));
                row
            })
            .collect();
        let logits: Vec<Vec<f32>> = rows.iter().map(|_| some_logits(&mut random, REAL, 0)).collect();
        let got = sample(&device, &rows, &logits);
        check(&rows, &logits, &got);
        for (row, got) in rows.iter().zip(&got) {
            let id = got.as_ref().unwrap().id;
            assert!(row.mask.as_ref().is_some_and(|mask| mask.allows(id)), "{id} is masked");
        }
    }
}

#[test]
fn sampler_takes_long_histories() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    let make = |random: &mut Random| {
        let mut row =
            row(random, params(|p| (p.temperature, p.repetition_penalty, p.logprobs) = (0.0, 1.2, Some(3))));
        row.prompt = (0..REAL as u32).step_by(3).collect();
        row
    };
    let rows = vec![make(&mut random), make(&mut random)];
    let logits: Vec<Vec<f32>> = rows.iter().map(|_| some_logits(&mut random, REAL, 0)).collect();
    assert_eq!(check_on(&device, &rows, &logits), 0);
}

#[test]
fn probe_measures_the_memory() {
    let Some((device, _turn)) = device() else { return };
    let rate = ctxserve_cuda::probe::read_bandwidth(&device).unwrap();
    println!("{:.0} GB/s", rate * 1e-9);
    assert!((5e10..2e13).contains(&rate), "{rate} bytes a second");
}
