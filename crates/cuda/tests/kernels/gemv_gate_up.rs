use ctxserve_cuda::driver::Device;
use ctxserve_cuda::ops::gemv_gate_up::{Call, Dims, GemvGateUp};

use crate::common::{Random, assert_rows, device, from_bf16};
use crate::gemv::{dot, in_panels, matrix, normed, padded, poison_dead, poisoned};

const EPS: f32 = 1e-6;

#[test]
fn gemv_gate_up_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (rows, live, real, inner) in [
        (1, 1, 64, 8),
        (1, 0, 64, 16),
        (2, 2, 200, 72),
        (3, 2, 576, 64),
        (4, 4, 2560, 40),
        (5, 5, 640, 1104),
        (8, 7, 1088, 104),
        (9, 9, 130, 32),
        (15, 13, 320, 2120),
        (16, 16, 2560, 80),
        (16, 3, 8192, 24),
    ] {
        check(&device, &mut random, (rows, live, real, inner), 1);
    }
}

#[test]
fn gemv_gate_up_at_the_real_shape() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (rows, live) in [(1, 1), (16, 11)] {
        check(&device, &mut random, (rows, live, 2560, 9728), 37);
    }
}

/// Compares every `step`th output.
fn check(
    device: &Device,
    random: &mut Random,
    (rows, live, real, inner): (usize, usize, usize, usize),
    step: usize,
) {
    let cols = real.next_multiple_of(64);
    let weights = matrix(random, 2 * inner, cols);
    let mut norm = random.units(cols, 4.0);
    norm[real..].fill(0.0);
    let mut x = padded(random, rows, real, cols, 3.0);
    poison_dead(&mut x, live, cols);
    let on_device = (
        device.upload(&in_panels(&weights, 2 * inner, cols)).unwrap(),
        device.upload(&norm).unwrap(),
        device.upload(&x).unwrap(),
        device.upload(&[live as i32]).unwrap(),
    );
    let compared: Vec<usize> = (0..inner).step_by(step).collect();
    let mut want = Vec::new();
    for row in 0..live {
        let (operand, inverse) = normed(&x[row * cols..][..cols], &norm, real, f64::from(EPS));
        let output = |at: usize| dot(&operand, &weights[at * cols..][..cols]) * inverse;
        for &at in &compared {
            let gate = output(at / 8 * 16 + at % 8);
            want.push(gate / (1.0 + (-gate).exp()) * output(at / 8 * 16 + at % 8 + 8));
        }
    }
    let dims = Dims { rows, cols, inner };
    for plan in GemvGateUp::plans(device, dims).unwrap() {
        let what = format!("gemv_gate_up {rows} rows ({live} live) of {real} to {inner}: {plan}");
        let y = poisoned::<u16>(device, rows * inner);
        let call = Call {
            weights: &on_device.0,
            norm: &on_device.1,
            x: &on_device.2,
            live: &on_device.3,
            y: &y,
            norm_cols: real,
            eps: EPS,
        };
        GemvGateUp::with_plan(device, dims, plan).unwrap().issue(device, &call).unwrap();
        let got = y.read(0, y.len()).unwrap();
        let bits: Vec<u16> = (0..live)
            .flat_map(|row| compared.iter().map(move |at| row * inner + at))
            .map(|at| got[at])
            .collect();
        assert_rows(&what, &from_bf16(&bits), &want, compared.len(), 4e-3);
        assert!(
            got[live * inner..].iter().all(|&v| v == 0xffff),
            "{what}: beyond the live rows y was written"
        );
    }
}
