use ctxserve_cuda::driver::Device;
use ctxserve_cuda::ops::gemv_out::{Call, Dims, GemvOut};

use crate::common::{Random, assert_rows, device, from_bf16, to_bf16};
use crate::gemv::{CANARIES, dot, in_panels, matrix};

#[test]
fn gemv_out_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (rows, live, q_width, hidden) in [
        (1, 1, 64, 64),
        (1, 0, 128, 64),
        (2, 1, 192, 8),
        (3, 3, 4096, 72),
        (5, 5, 576, 104),
        (8, 6, 1088, 128),
        (9, 9, 64, 64),
        (15, 14, 2048, 64),
        (16, 16, 8192, 40),
        (3, 3, 9728, 40),
        (16, 15, 9728, 72),
    ] {
        check(&device, &mut random, (rows, live, q_width, hidden), 1);
    }
}

#[test]
fn gemv_out_at_the_real_shape() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (rows, live) in [(1, 1), (4, 3), (16, 16)] {
        check(&device, &mut random, (rows, live, 4096, 2880), 7);
    }
}

/// Compares every `step`th column.
fn check(
    device: &Device,
    random: &mut Random,
    (rows, live, q_width, hidden): (usize, usize, usize, usize),
    step: usize,
) {
    let weights = matrix(random, hidden, q_width);
    let bias = random.units(hidden, 0.5);
    let mut heads = to_bf16(&random.units(rows * q_width, 2.0));
    heads[live * q_width..].fill(0x7fff);
    let before = random.units(rows * hidden + CANARIES, 3.0);
    let columns: Vec<usize> = (0..hidden).step_by(step).collect();
    let mut want = Vec::new();
    for row in 0..live {
        let operand = from_bf16(&heads[row * q_width..][..q_width]);
        for &column in &columns {
            let product = dot(&operand, &weights[column * q_width..][..q_width]);
            want.push(f64::from(before[row * hidden + column]) + product + f64::from(bias[column]));
        }
    }
    let weights = device.upload(&in_panels(&weights, hidden, q_width)).unwrap();
    let (bias, heads) = (device.upload(&bias).unwrap(), device.upload(&heads).unwrap());
    let live_rows = device.upload(&[live as i32]).unwrap();
    let dims = Dims { rows, q_width, hidden };
    for plan in GemvOut::plans(device, dims).unwrap() {
        let x = device.upload(&before).unwrap();
        let kernel = GemvOut::with_plan(device, dims, plan).unwrap();
        let call = Call { weights: &weights, bias: &bias, heads: &heads, x: &x, live: &live_rows };
        kernel.issue(device, &call).unwrap();
        let after = x.read(0, x.len()).unwrap();
        let what = format!("gemv_out {rows} rows ({live} live) of {q_width} to {hidden}: {plan}");
        let at = (0..live).flat_map(|row| columns.iter().map(move |column| row * hidden + column));
        let got: Vec<f64> = at.map(|at| f64::from(after[at])).collect();
        assert_rows(&what, &got, &want, columns.len(), 1e-4);
        assert!(
            after[live * hidden..] == before[live * hidden..],
            "{what}: beyond the live rows x was written"
        );
    }
}
