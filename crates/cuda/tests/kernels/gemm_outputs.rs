//! What the dense products store for the model: SwiGLU, and heads that are rotated on their way out.

use ctxserve_cuda::driver::{Buffer, Device};
use ctxserve_cuda::ops::gemm::{Call, Gemm, Heads, Output, Plan, Spread};
use ctxserve_cuda::ops::kv_append::{self, KvAppend};
use ctxserve_cuda::ops::rope_table::{self, RopeTable};
use half::bf16;

use crate::attention::{Paged, Shape};
use crate::common::{Random, assert_rows, device, from_bf16, panel, to_bf16, to_panels};
use crate::gemv::{CANARIES, poisoned};

const MSCALE: f32 = 1.346_573_6;

/// Every way to do it: as planned, portable, and what there is on Hopper.
fn ways(device: &Device) -> Vec<(Gemm, Option<Plan>)> {
    let mut ways = vec![(Gemm::load(device).unwrap(), None), (Gemm::portable(device).unwrap(), None)];
    if device.facts().is_hopper() {
        for (spread, height) in [
            (Spread::Few64, 64),
            (Spread::Few128, 128),
            (Spread::Narrow, 128),
            (Spread::Narrow, 64),
            (Spread::Wide, 256),
            (Spread::Wide, 208),
            (Spread::Wide, 176),
        ] {
            let plan = Plan { spread, height, group: 3, launch: 2 };
            ways.push((Gemm::load(device).unwrap(), Some(plan)));
        }
    }
    ways
}

fn issue(device: &Device, (gemm, plan): &(Gemm, Option<Plan>), call: &Call<'_>) {
    match plan {
        Some(plan) => gemm.issue_as(device, call, *plan).unwrap(),
        None => gemm.issue(device, call).unwrap(),
    }
}

/// Weights, tokens and biases on the device, and on the host.
struct Inputs {
    w: Vec<f64>,
    x: Vec<f64>,
    bias: Vec<f32>,
    w_panels: Buffer<u16>,
    x_panels: Buffer<u16>,
    on_device: Buffer<f32>,
    live: Buffer<i32>,
    tokens: usize,
    cols: usize,
    outs: usize,
    capacity: usize,
}

impl Inputs {
    fn new(
        device: &Device,
        random: &mut Random,
        (live, tokens): (usize, usize),
        cols: usize,
        outs: usize,
    ) -> Self {
        let capacity = (tokens + 9).next_multiple_of(8);
        let w = to_bf16(&random.units(outs * cols, 4.0 / (cols as f32).sqrt()));
        let x = to_bf16(&random.units(tokens * cols, 1.0));
        let bias = random.units(outs, 2.0);
        Self {
            w_panels: device.upload(&to_panels(&w, cols, outs)).unwrap(),
            x_panels: device.upload(&to_panels(&x, cols, capacity)).unwrap(),
            on_device: device.upload(&bias).unwrap(),
            live: device.upload(&[live as i32]).unwrap(),
            w: from_bf16(&w),
            x: from_bf16(&x),
            bias,
            tokens,
            cols,
            outs,
            capacity,
        }
    }

    fn call<'a>(&'a self, y: Output<'a>) -> Call<'a> {
        let Self { tokens, cols, outs, capacity, .. } = *self;
        let (w, x, bias, live) = (&self.w_panels, &self.x_panels, Some(&self.on_device), &self.live);
        Call { w, x, bias, y, live, tokens, cols, w_rows: outs, outs, capacity, stride: outs }
    }

    fn sum(&self, token: usize, out: usize) -> f64 {
        let (w, x) = (&self.w[out * self.cols..][..self.cols], &self.x[token * self.cols..][..self.cols]);
        f64::from(self.bias[out]) + w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>()
    }

    /// Gate and up of output `inner` lie eight rows apart.
    fn swiglu(&self, token: usize, inner: usize) -> f64 {
        let row = inner / 8 * 16 + inner % 8;
        let (gate, up) = (self.sum(token, row), self.sum(token, row + 8));
        gate / (1.0 + (-gate).exp()) * up
    }
}

/// Compares every way at `places`.
fn check_swiglu(device: &Device, inputs: &Inputs, live: usize, places: &[(usize, usize)]) {
    let want: Vec<f64> = places.iter().map(|&(token, out)| inputs.swiglu(token, out)).collect();
    for way in ways(device) {
        check_swiglu_of(device, &way, inputs, live, places, &want);
    }
}

fn check_swiglu_of(
    device: &Device,
    way: &(Gemm, Option<Plan>),
    inputs: &Inputs,
    live: usize,
    places: &[(usize, usize)],
    want: &[f64],
) {
    let inner = inputs.outs / 2;
    let y = poisoned::<u16>(device, inputs.capacity * inner);
    issue(device, way, &inputs.call(Output::SwiGlu(&y)));
    let got = y.read(0, y.len()).unwrap();
    let what = format!("{live} of {} tokens, {} x {}, {:?}", inputs.tokens, inputs.outs, inputs.cols, way.1);
    let bits: Vec<u16> = places.iter().map(|&(token, out)| got[panel(token, out, inputs.capacity)]).collect();
    assert_rows(&what, &from_bf16(&bits), want, want.len().max(1), 3e-3);
    let mut written = vec![false; got.len()];
    for token in 0..live {
        (0..inner).for_each(|out| written[panel(token, out, inputs.capacity)] = true);
    }
    let wrong = got.iter().zip(&written).filter(|&(&bits, &written)| !written && bits != 0xffff).count();
    assert_eq!(wrong, 0, "{what}: values outside the live tokens were written");
    assert!(got.len() == inputs.capacity * inner + CANARIES);
}

#[test]
fn gemm_swiglu_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (case, (live, tokens)) in
        [(1, 1), (3, 17), (33, 33), (63, 65), (128, 128), (129, 130), (257, 300), (0, 20), (9, 600)]
            .into_iter()
            .enumerate()
    {
        let (cols, outs) = ([64, 128, 320, 448][case % 4], [128, 256, 384][case % 3]);
        let inputs = Inputs::new(&device, &mut random, (live, tokens), cols, outs);
        let all: Vec<_> = (0..live).flat_map(|token| (0..outs / 2).map(move |out| (token, out))).collect();
        check_swiglu(&device, &inputs, live, &all);
    }
}

#[test]
fn gemm_swiglu_at_the_real_width() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for tokens in [40, 100, 1001] {
        let inputs = Inputs::new(&device, &mut random, (tokens, tokens), 2560, 2432);
        let places: Vec<_> = (0..800).map(|_| (random.below(tokens), random.below(1216))).collect();
        check_swiglu(&device, &inputs, tokens, &places);
    }
}

/// Gates that a float32 exponential overflows for give zeros.
#[test]
fn gemm_swiglu_of_large_gates_is_finite() {
    let Some((device, _turn)) = device() else { return };
    let one = to_bf16(&[1.0])[0];
    let (tokens, cols, outs) = (70, 64, 128);
    for way in ways(&device) {
        for (gate, want) in [(-89.5, 0.0), (-1e4, 0.0), (-1e30, 0.0), (1e4, 1e4), (0.0, 0.0)] {
            let capacity = 72;
            let x = device.upload(&to_panels(&vec![one; tokens * cols], cols, capacity)).unwrap();
            let w = device.upload(&vec![0_u16; outs * cols]).unwrap();
            let bias: Vec<f32> = (0..outs).map(|row| if row % 16 < 8 { gate } else { 1.0 }).collect();
            let bias = device.upload(&bias).unwrap();
            let live = device.upload(&[tokens as i32]).unwrap();
            let y = device.zeros::<u16>(capacity * outs / 2).unwrap();
            let call = Call {
                w: &w,
                x: &x,
                bias: Some(&bias),
                y: Output::SwiGlu(&y),
                live: &live,
                tokens,
                cols,
                w_rows: outs,
                outs,
                capacity,
                stride: 0,
            };
            issue(&device, &way, &call);
            let got = from_bf16(&y.read(0, y.len()).unwrap());
            for token in 0..tokens {
                let value = got[panel(token, token % (outs / 2), capacity)];
                assert!((value - want).abs() <= 4e-3 * want.abs(), "gate {gate}: {value}, {:?}", way.1);
            }
        }
    }
}

/// The table of `rows` rows, on the device.
fn table(
    device: &Device,
    position: &Buffer<i32>,
    inv_freq: &Buffer<f32>,
    rows: usize,
    live: usize,
) -> Buffer<f32> {
    let pairs = inv_freq.len();
    let turns = poisoned::<f32>(device, rows * pairs * 2);
    let live = device.upload(&[live as i32]).unwrap();
    let call =
        rope_table::Call { position, live: &live, inv_freq, turns: &turns, mscale: MSCALE, rows, pairs };
    RopeTable::load(device).unwrap().issue(device, &call).unwrap();
    turns
}

/// Place of a pair in a row of the table.
fn place(pair: usize) -> usize {
    pair / 8 * 8 + pair % 4 * 2 + pair / 4 % 2
}

fn frequencies(dim: usize) -> Vec<f32> {
    (0..dim / 2).map(|i| 150_000_f64.powf(-2.0 * i as f64 / dim as f64) as f32).collect()
}

fn positions(random: &mut Random, rows: usize) -> Vec<i32> {
    (0..rows).map(|row| if row == 0 { 131_071 } else { random.below(131_072) as i32 }).collect()
}

#[test]
fn rope_table_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (rows, live, dim) in [(1, 1, 64), (5, 3, 64), (300, 300, 128), (17, 0, 128), (9, 9, 96)] {
        let (position, inv_freq) = (positions(&mut random, rows), frequencies(dim));
        let on_device = (device.upload(&position).unwrap(), device.upload(&inv_freq).unwrap());
        let turns = table(&device, &on_device.0, &on_device.1, rows, live);
        let got = turns.read(0, turns.len()).unwrap();
        for row in 0..live {
            for (pair, frequency) in inv_freq.iter().enumerate() {
                let (sin, cos) = f64::from(position[row] as f32 * frequency).sin_cos();
                for (at, want) in [cos, sin].into_iter().enumerate() {
                    let value = f64::from(got[(row * dim / 2 + place(pair)) * 2 + at]);
                    let error = (value - want * f64::from(MSCALE)).abs();
                    assert!(error < 5e-7, "row {row}, pair {pair}: off by {error:e}");
                }
            }
        }
        assert!(got[live * dim..].iter().all(|v| v.to_bits() == u32::MAX), "rows beyond {live} were written");
    }
}

/// Bit for bit what the float32 product, rotated, gives; queries also what `kv_append` makes of it.
fn check_qkv(
    device: &Device,
    random: &mut Random,
    way: &(Gemm, Option<Plan>),
    (live, tokens): (usize, usize),
    (heads, kv_heads, dim, cols): (usize, usize, usize, usize),
) {
    let (q_width, kv_width) = (heads * dim, kv_heads * dim);
    let outs = q_width + 2 * kv_width;
    let inputs = Inputs::new(device, random, (live, tokens), cols, outs);
    let position = device.upload(&positions(random, tokens)).unwrap();
    let inv_freq = device.upload(&frequencies(dim)).unwrap();
    let turns = table(device, &position, &inv_freq, tokens, live);
    let plain = device.zeros::<f32>(tokens * outs).unwrap();
    issue(device, way, &inputs.call(Output::F32(&plain)));
    let (q, kv) = (poisoned::<u16>(device, tokens * q_width), poisoned::<f32>(device, tokens * 2 * kv_width));
    let out = Heads { q: &q, kv: &kv, turns: &turns, q_width, kv_width, head_dim: dim };
    issue(device, way, &inputs.call(Output::Qkv(out)));

    let what =
        format!("{live} of {tokens} tokens, {heads} over {kv_heads} of {dim}, {cols} columns, {:?}", way.1);
    let (sums, turns) = (plain.read(0, plain.len()).unwrap(), turns.read(0, turns.len()).unwrap());
    let (got_q, got_kv) = (q.read(0, q.len()).unwrap(), kv.read(0, kv.len()).unwrap());
    for token in 0..live {
        for head in 0..heads + 2 * kv_heads {
            let y = &sums[token * outs + head * dim..][..dim];
            let mut want = y.to_vec();
            if head < heads + kv_heads {
                for pair in 0..dim / 2 {
                    let turn = &turns[token * dim + 2 * place(pair)..][..2];
                    let (a, b) = (y[2 * pair], y[2 * pair + 1]);
                    want[pair] = a.mul_add(turn[0], -(b * turn[1]));
                    want[pair + dim / 2] = b.mul_add(turn[0], a * turn[1]);
                }
            }
            if head < heads {
                let want: Vec<u16> = want.iter().map(|&v| bf16::from_f32(v).to_bits()).collect();
                assert!(
                    got_q[token * q_width + head * dim..][..dim] == want,
                    "{what}: token {token}, query head {head}"
                );
            } else {
                let got = &got_kv[token * 2 * kv_width + (head - heads) * dim..][..dim];
                assert!(got == want, "{what}: token {token}, head {head}");
            }
        }
    }
    assert!(got_q[live * q_width..].iter().all(|&v| v == 0xffff), "{what}: q of rows that are not live");
    assert!(
        got_kv[live * 2 * kv_width..].iter().all(|v| v.to_bits() == u32::MAX),
        "{what}: kv of rows that are not live"
    );
    if dim == 64 || dim == 128 {
        let shape = Shape { page_size: 16, kv_heads, fp8: false, window: None, dim };
        let paged = Paged::new(random, shape, &[(0, 1)]).upload(device);
        let appended = poisoned::<u16>(device, tokens * q_width);
        let call = kv_append::Call {
            qkv: &plain,
            q: &appended,
            cache: paged.cache,
            position: &position,
            slot: &device.upload(&vec![-1; tokens]).unwrap(),
            live: &inputs.live,
            inv_freq: &inv_freq,
            norms: None,
            mscale: MSCALE,
            rows: tokens,
            heads,
        };
        KvAppend::load_for(device, dim).unwrap().issue(device, &call).unwrap();
        let same = appended.read(0, appended.len()).unwrap() == got_q;
        assert!(same, "{what}: queries are not those of kv_append");
    }
}

#[test]
fn gemm_qkv_turns_queries_and_keys() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for way in ways(&device) {
        for (case, tokens) in
            [(1, 1), (3, 17), (33, 33), (63, 65), (128, 128), (129, 130), (257, 300), (0, 20), (9, 600)]
                .into_iter()
                .enumerate()
        {
            let heads = [(3, 1, 64, 128), (4, 2, 128, 64), (8, 2, 64, 320), (2, 1, 32, 192)][case % 4];
            check_qkv(&device, &mut random, &way, tokens, heads);
        }
    }
}

#[test]
fn gemm_qkv_at_the_real_shape() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    let way = (Gemm::load(&device).unwrap(), None);
    for tokens in [40, 100, 513] {
        check_qkv(&device, &mut random, &way, (tokens, tokens), (64, 8, 64, 2880));
    }
}
