use ctxserve_cuda::driver::{Buffer, Device};
use ctxserve_cuda::ops::gemv_nvfp4::{Call, Dims, GemvNvfp4, Input, Output, Plan};
use half::bf16;

use crate::common::{Random, assert_rows, device, from_bf16, to_bf16};
use crate::gemv::{CANARIES, normed, padded, poison_dead, poisoned};
use crate::pack_nvfp4::Matrix;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Stored,
    Added,
    SwiGlu,
}

#[derive(Clone, Copy, Debug)]
struct Case {
    rows: usize,
    live: usize,
    cols: usize,
    outputs: usize,
    normed: bool,
    kind: Kind,
}

const EPS: f32 = 1e-5;

#[test]
fn gemv_nvfp4_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (at, (rows, live, cols, outputs)) in [
        (1, 1, 64, 16),
        (1, 0, 128, 32),
        (2, 1, 192, 48),
        (3, 3, 1024, 208),
        (5, 5, 576, 64),
        (8, 6, 1088, 1040),
        (9, 9, 640, 80),
        (15, 14, 2560, 16),
        (16, 16, 832, 1280),
        (7, 7, 320, 5120),
        (16, 15, 320, 5008),
    ]
    .into_iter()
    .enumerate()
    {
        let kinds = [Kind::Stored, Kind::Added, Kind::SwiGlu];
        for normed in [true, false] {
            check(&device, &mut random, Case { rows, live, cols, outputs, normed, kind: kinds[at % 3] }, 1);
        }
    }
}

#[test]
fn gemv_nvfp4_at_the_real_shapes() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (cols, outputs, normed, kind) in [
        (2560, 6144, true, Kind::Stored),
        (4096, 2560, false, Kind::Added),
        (2560, 19_456, true, Kind::SwiGlu),
        (9728, 2560, false, Kind::Added),
    ] {
        for (rows, live) in [(1, 1), (4, 3), (16, 16)] {
            check(&device, &mut random, Case { rows, live, cols, outputs, normed, kind }, 97);
        }
    }
}

/// The bits of a row are the same whatever the rows beside it, with one plan.
#[test]
fn rows_of_gemv_nvfp4_do_not_depend_on_their_neighbours() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    let (cols, outputs) = (640, 2560);
    let source = Matrix::random(&mut random, (outputs, cols), (0x20, 0x20));
    let weights = source.pack(&device, None, outputs);
    let factors = device.upload(&random.units(outputs, 1.0)).unwrap();
    let x = device.upload(&random.units(16 * cols, 2.0)).unwrap();
    let weight = device.upload(&random.units(cols, 1.0)).unwrap();
    let run = |rows: usize, from: &Plan| {
        let dims = Dims { rows, cols, outputs, normed: true };
        let plan = Plan::new(&dims, device.facts(), (from.split, from.pieces), from.clusters, 0).unwrap();
        let y = poisoned::<f32>(&device, rows * outputs);
        let live = device.upload(&[rows as i32]).unwrap();
        let input = Input::Normed { x: &x, weight: &weight, norm_cols: cols, eps: EPS };
        let call = Call { weights: &weights, factors: &factors, live: &live, input, output: Output::F32(&y) };
        GemvNvfp4::with_plan(&device, dims, plan).unwrap().issue(&device, &call).unwrap();
        y.read(0, rows * outputs).unwrap().iter().map(|v| v.to_bits()).collect::<Vec<u32>>()
    };
    for plan in Plan::all(&Dims { rows: 16, cols, outputs, normed: true }, device.facts()).unwrap() {
        let all = run(16, &plan);
        for rows in [1, 2, 3, 7, 8, 9, 12] {
            assert!(run(rows, &plan) == all[..rows * outputs], "{rows} rows: {plan}");
        }
    }
}

/// Compares every `step`th output.
fn check(device: &Device, random: &mut Random, case: Case, step: usize) {
    let Case { rows, live, cols, outputs, normed: is_normed, kind } = case;
    let norm_cols = if is_normed { cols - cols / 40 } else { cols };
    let source = Matrix::random(random, (outputs, cols), (0x18, 0x20));
    let factors: Vec<f32> = random.units(outputs, 1.0 / (cols as f32).sqrt());
    let weights = source.pack(device, None, outputs.next_multiple_of(64));
    let mut x =
        if is_normed { padded(random, rows, norm_cols, cols, 2.0) } else { random.units(rows * cols, 2.0) };
    let norm_weight = padded(random, 1, norm_cols, cols, 1.5);
    let before = random.units(rows * outputs + CANARIES, 3.0);
    let width = if kind == Kind::SwiGlu { outputs / 2 } else { outputs };
    let columns: Vec<usize> = (0..width).step_by(step).collect();
    let mut want = Vec::new();
    for row in 0..live {
        let values = &x[row * cols..][..cols];
        let (operand, scale) = if is_normed {
            normed(values, &norm_weight, norm_cols, f64::from(EPS))
        } else {
            (values.iter().map(|&v| f64::from(bf16::from_f32(v))).collect(), 1.0)
        };
        let output = |at: usize| source.dot(at, &operand) * scale * f64::from(factors[at]);
        for &column in &columns {
            want.push(match kind {
                Kind::Stored => output(column),
                Kind::Added => f64::from(before[row * outputs + column]) + output(column),
                Kind::SwiGlu => {
                    let (gate, up) = (column / 8 * 16 + column % 8, column / 8 * 16 + column % 8 + 8);
                    let gate = output(gate);
                    gate / (1.0 + (-gate).exp()) * output(up)
                }
            });
        }
    }
    poison_dead(&mut x, live, cols);
    let plain = device.upload(&to_bf16(&x)).unwrap();
    let x = device.upload(&x).unwrap();
    let (norm_weight, factors) = (device.upload(&norm_weight).unwrap(), device.upload(&factors).unwrap());
    let live_rows = device.upload(&[live as i32]).unwrap();
    let dims = Dims { rows, cols, outputs, normed: is_normed };
    for plan in Plan::all(&dims, device.facts()).unwrap() {
        let kernel = GemvNvfp4::with_plan(device, dims, plan).unwrap();
        let what = format!("gemv_nvfp4 {case:?}: {plan}");
        let input = if is_normed {
            Input::Normed { x: &x, weight: &norm_weight, norm_cols, eps: EPS }
        } else {
            Input::Plain(&plain)
        };
        let issue = |output: Output<'_>| {
            let call = Call { weights: &weights, factors: &factors, live: &live_rows, input, output };
            kernel.issue(device, &call).unwrap();
        };
        let at = || (0..live).flat_map(|row| columns.iter().map(move |column| row * width + column));
        let (got, limit): (Vec<f64>, f64) = if kind == Kind::SwiGlu {
            let y: Buffer<u16> = poisoned(device, rows * width);
            issue(Output::SwiGlu(&y));
            let y = y.read(0, y.len()).unwrap();
            assert!(y[live * width..].iter().all(|&v| v == 0xffff), "{what}: written beyond the live rows");
            (at().map(|at| from_bf16(&y[at..=at])[0]).collect(), 4e-3)
        } else {
            let y = device.upload(&before).unwrap();
            issue(if kind == Kind::Added { Output::Add(&y) } else { Output::F32(&y) });
            let y = y.read(0, y.len()).unwrap();
            assert!(y[live * width..] == before[live * width..], "{what}: written beyond the live rows");
            (at().map(|at| f64::from(y[at])).collect(), 1e-4)
        };
        assert_rows(&what, &got, &want, columns.len(), limit);
    }
}
