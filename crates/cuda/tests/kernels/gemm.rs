use ctxserve_cuda::driver::Device;
use ctxserve_cuda::ops::gemm::{Call, Gemm, Output, Plan, Spread};

use crate::common::{Random, assert_rows, device, from_bf16, to_bf16, to_panels};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    F32,
    Bf16,
    Add,
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    /// Tokens to do, and most tokens.
    live: usize,
    tokens: usize,
    cols: usize,
    w_rows: usize,
    outs: usize,
    stride: usize,
    bias: bool,
    kind: Kind,
}

struct Inputs {
    w: Vec<u16>,
    x: Vec<u16>,
    bias: Vec<f32>,
    /// What y holds before, as many values as it has; 5 rows more than tokens.
    before: Vec<f32>,
}

fn random_inputs(random: &mut Random, s: Shape) -> Inputs {
    Inputs {
        w: to_bf16(&random.units(s.w_rows * s.cols, 1.0)),
        x: to_bf16(&random.units(s.tokens * s.cols, 1.0)),
        bias: random.units(s.outs, 4.0),
        before: random.units((s.tokens + 5) * s.stride, 8.0),
    }
}

/// The kernels, and the way to use them; as planned if absent.
struct Path {
    gemm: Gemm,
    plan: Option<Plan>,
}

impl Path {
    fn usual(device: &Device) -> Self {
        Self { gemm: Gemm::load(device).unwrap(), plan: None }
    }

    fn of(device: &Device, plan: Plan) -> Self {
        Self { plan: Some(plan), ..Self::usual(device) }
    }
}

/// Runs it and returns all of y, widened.
fn run(device: &Device, path: &Path, s: Shape, inputs: &Inputs) -> Vec<f64> {
    let capacity = (s.tokens + 9).next_multiple_of(8);
    let (w, x) = (
        device.upload(&to_panels(&inputs.w, s.cols, s.w_rows)).unwrap(),
        device.upload(&to_panels(&inputs.x, s.cols, capacity)).unwrap(),
    );
    let bias = device.upload(&inputs.bias).unwrap();
    let live = device.upload(&[s.live as i32]).unwrap();
    let y32 = device.upload(&inputs.before).unwrap();
    let y16 = device.upload(&to_bf16(&inputs.before)).unwrap();
    let y = match s.kind {
        Kind::F32 => Output::F32(&y32),
        Kind::Bf16 => Output::Bf16(&y16),
        Kind::Add => Output::Add(&y32),
    };
    let call = Call {
        w: &w,
        x: &x,
        bias: Some(&bias).filter(|_| s.bias),
        y,
        live: &live,
        tokens: s.tokens,
        cols: s.cols,
        w_rows: s.w_rows,
        outs: s.outs,
        capacity,
        stride: s.stride,
    };
    match path.plan {
        Some(plan) => path.gemm.issue_as(device, &call, plan).unwrap(),
        None => path.gemm.issue(device, &call).unwrap(),
    }
    match s.kind {
        Kind::Bf16 => from_bf16(&y16.read(0, y16.len()).unwrap()),
        _ => y32.read(0, y32.len()).unwrap().into_iter().map(f64::from).collect(),
    }
}

/// Element (token, out) by definition.
fn definition(s: Shape, inputs: &Inputs, token: usize, out: usize) -> f64 {
    let w = from_bf16(&inputs.w[out * s.cols..][..s.cols]);
    let x = from_bf16(&inputs.x[token * s.cols..][..s.cols]);
    let before = if s.kind == Kind::Add { f64::from(inputs.before[token * s.stride + out]) } else { 0.0 };
    let bias = if s.bias { f64::from(inputs.bias[out]) } else { 0.0 };
    before + bias + w.iter().zip(&x).map(|(w, x)| w * x).sum::<f64>()
}

/// What lies outside the live tokens' `outs` columns keeps its bits.
fn assert_surroundings(s: Shape, inputs: &Inputs, got: &[f64]) {
    let before = match s.kind {
        Kind::Bf16 => from_bf16(&to_bf16(&inputs.before)),
        _ => inputs.before.iter().map(|&v| f64::from(v)).collect(),
    };
    for (at, (got, before)) in got.iter().zip(&before).enumerate() {
        let (token, out) = (at / s.stride, at % s.stride);
        if token >= s.live || out >= s.outs {
            assert_eq!(got, before, "{s:?}: token {token}, column {out} was written");
        }
    }
}

fn limit(kind: Kind) -> f64 {
    if kind == Kind::Bf16 { 3e-3 } else { 1e-5 }
}

/// With weights that pick one element of x each, any mistake of layout shows as a value from elsewhere, by name.
fn check_puts_every_element_in_its_place(device: &Device, path: &Path) {
    for tokens in [32, 64, 128, 192, 256, 300] {
        let s = Shape {
            live: tokens,
            tokens,
            cols: 192,
            w_rows: 192,
            outs: 192,
            stride: 192,
            bias: false,
            kind: Kind::F32,
        };
        let one = to_bf16(&[1.0])[0];
        let mut w = vec![0; s.w_rows * s.cols];
        (0..s.outs).for_each(|out| w[out * s.cols + (out * 5 + 3) % s.cols] = one);
        // Small integers, exact in bf16: the low digit of the token and the column of x.
        let x: Vec<f32> =
            (0..tokens * s.cols).map(|at| ((at / s.cols * 7 + at % s.cols) % 251) as f32).collect();
        let inputs = Inputs {
            w,
            x: to_bf16(&x),
            bias: vec![0.0; s.outs],
            before: vec![-1.0; (tokens + 5) * s.stride],
        };
        let got = run(device, path, s, &inputs);
        let wrong: Vec<String> = (0..tokens * s.outs)
            .filter_map(|at| {
                let (token, out) = (at / s.outs, at % s.outs);
                let want = f64::from(x[token * s.cols + (out * 5 + 3) % s.cols]);
                let value = got[token * s.stride + out];
                (value != want).then(|| format!("(token {token}, out {out}): {value}, want {want}"))
            })
            .collect();
        assert!(
            wrong.is_empty(),
            "{tokens} tokens: {} wrong, {:#?}",
            wrong.len(),
            &wrong[..wrong.len().min(12)]
        );
        assert_surroundings(s, &inputs, &got);
    }
}

fn check_equals_its_definition(device: &Device, path: &Path) {
    let mut random = Random::new();
    for (case, (live, tokens)) in [
        (1, 1),
        (3, 17),
        (33, 33),
        (65, 100),
        (128, 128),
        (129, 130),
        (200, 256),
        (257, 300),
        (0, 20),
        (9, 600),
    ]
    .into_iter()
    .enumerate()
    {
        for kind in [Kind::F32, Kind::Bf16, Kind::Add] {
            let w_rows = [64, 136, 320][case % 3];
            let s = Shape {
                live,
                tokens,
                cols: [64, 128, 320, 448][case % 4],
                w_rows,
                outs: w_rows - [0, 2, 30][(case + kind as usize) % 3],
                stride: w_rows + [0, 6][case % 2],
                bias: case % 3 > 0,
                kind,
            };
            let inputs = random_inputs(&mut random, s);
            let got = run(device, path, s, &inputs);
            let all = || (0..live).flat_map(|token| (0..s.outs).map(move |out| (token, out)));
            let want: Vec<f64> = all().map(|(token, out)| definition(s, &inputs, token, out)).collect();
            let live_values: Vec<f64> = all().map(|(token, out)| got[token * s.stride + out]).collect();
            assert_rows(&format!("{s:?}"), &live_values, &want, s.outs, limit(kind));
            assert_surroundings(s, &inputs, &got);
        }
    }
}

/// The model's own shapes, checked at sampled elements; more tiles than multiprocessors.
fn check_of_real_shapes(device: &Device, path: &Path) {
    let mut random = Random::new();
    for (tokens, cols, outs, kind) in [
        (1000, 2880, 5120, Kind::F32),
        (2053, 4096, 2880, Kind::Add),
        (70, 2880, 5120, Kind::Bf16),
        (40, 2880, 25_000, Kind::F32),
    ] {
        let s = Shape { live: tokens, tokens, cols, w_rows: outs, outs, stride: outs, bias: true, kind };
        let inputs = random_inputs(&mut random, s);
        let got = run(device, path, s, &inputs);
        let places: Vec<(usize, usize)> = (0..4000)
            .map(|_| (random.below(tokens), random.below(outs)))
            .chain([(tokens - 1, outs - 1)])
            .collect();
        let want: Vec<f64> = places.iter().map(|&(token, out)| definition(s, &inputs, token, out)).collect();
        let sample: Vec<f64> = places.iter().map(|&(token, out)| got[token * s.stride + out]).collect();
        assert_rows(&format!("{s:?}"), &sample, &want, want.len(), limit(kind).max(2e-5));
        assert!(got.iter().all(|v| v.is_finite()));
        assert_surroundings(s, &inputs, &got);
    }
}

/// A token's bits do not depend on its neighbours in a tile, if the way is the same.
fn check_rows_do_not_depend_on_neighbours(device: &Device, path: &Path) {
    let mut random = Random::new();
    let base = Shape {
        live: 300,
        tokens: 300,
        cols: 2880,
        w_rows: 256,
        outs: 256,
        stride: 256,
        bias: true,
        kind: Kind::F32,
    };
    let inputs = random_inputs(&mut random, base);
    let all = run(device, path, base, &inputs);
    for tokens in [20, 90, 170, 299] {
        let s = Shape { live: tokens, tokens, ..base };
        let part = Inputs {
            w: inputs.w.clone(),
            x: inputs.x[..tokens * s.cols].to_vec(),
            bias: inputs.bias.clone(),
            before: inputs.before[..(tokens + 5) * s.stride].to_vec(),
        };
        let got = run(device, path, s, &part);
        assert!(got[..tokens * s.stride] == all[..tokens * s.stride], "{tokens} tokens differ from 300");
    }
}

#[test]
fn gemm_puts_every_element_in_its_place() {
    let Some((device, _turn)) = device() else { return };
    check_puts_every_element_in_its_place(&device, &Path::usual(&device));
}

#[test]
fn gemm_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    check_equals_its_definition(&device, &Path::usual(&device));
}

#[test]
fn gemm_of_real_shapes() {
    let Some((device, _turn)) = device() else { return };
    check_of_real_shapes(&device, &Path::usual(&device));
}

#[test]
fn gemm_portable_passes_the_same() {
    let Some((device, _turn)) = device() else { return };
    let gemm = Gemm::portable(&device).unwrap();
    let path = Path { gemm, plan: None };
    check_puts_every_element_in_its_place(&device, &path);
    check_equals_its_definition(&device, &path);
    check_of_real_shapes(&device, &path);
    check_rows_do_not_depend_on_neighbours(&device, &path);
}

/// Each way on shapes that it would not be planned for, too.
#[test]
fn gemm_passes_the_same_in_every_way() {
    let Some((device, _turn)) = device() else { return };
    if !device.facts().is_hopper() {
        println!("skipped: {} is not a Hopper device", device.facts().name);
        return;
    }
    for (spread, height, group) in [
        (Spread::Few64, 64, 8),
        (Spread::Few128, 128, 8),
        (Spread::Narrow, 128, 1),
        (Spread::Narrow, 64, 2),
        (Spread::Wide, 256, 3),
        (Spread::Wide, 208, 8),
        (Spread::Wide, 192, 8),
        (Spread::Wide, 176, 2),
        (Spread::Wide, 64, 2),
    ] {
        let plan = Plan { spread, height, group, launch: 2 };
        println!("{plan}");
        let path = Path::of(&device, plan);
        check_puts_every_element_in_its_place(&device, &path);
        check_equals_its_definition(&device, &path);
        check_rows_do_not_depend_on_neighbours(&device, &path);
        if matches!(spread, Spread::Few64 | Spread::Few128) {
            check_of_real_shapes(&device, &path);
        }
    }
}
