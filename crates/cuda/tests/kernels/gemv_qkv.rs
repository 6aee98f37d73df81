use ctxserve_cuda::driver::{Buffer, Device};
use ctxserve_cuda::ops::gemv_qkv::{Call, Dims, GemvQkv};

use crate::common::{Random, assert_rows, device, from_bf16};
use crate::gemv::{dot, in_panels, matrix, normed, padded, poison_dead, poisoned};

const EPS: f32 = 1e-5;
const MSCALE: f32 = 1.346_573_6;

struct Case {
    rows: usize,
    live: usize,
    real: usize,
    heads: usize,
    kv_heads: usize,
    pairs: usize,
}

#[test]
fn gemv_qkv_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (rows, live, real, heads, kv_heads, pairs) in [
        (1, 1, 64, 2, 1, 32),
        (1, 0, 64, 1, 1, 32),
        (2, 2, 200, 3, 2, 16),
        (3, 2, 576, 2, 2, 32),
        (4, 4, 2880, 2, 1, 32),
        (5, 5, 640, 1, 1, 8),
        (8, 7, 1088, 3, 1, 32),
        (9, 9, 130, 2, 1, 32),
        (15, 13, 320, 2, 1, 32),
        (16, 16, 2880, 2, 2, 32),
        (16, 3, 8192, 1, 1, 32),
    ] {
        check(&device, &mut random, &Case { rows, live, real, heads, kv_heads, pairs }, 1);
    }
}

#[test]
fn gemv_qkv_at_the_real_shape() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (rows, live) in [(1, 1), (4, 4), (16, 11)] {
        let case = Case { rows, live, real: 2880, heads: 64, kv_heads: 8, pairs: 32 };
        check(&device, &mut random, &case, 9);
    }
}

/// Compares every `step`th head.
fn check(device: &Device, random: &mut Random, case: &Case, step: usize) {
    let Case { rows, live, real, heads, kv_heads, pairs } = *case;
    let (cols, q_width, kv_width) = (real.next_multiple_of(64), heads * 64, kv_heads * 64);
    let outputs = q_width + 2 * kv_width;
    let weights = matrix(random, outputs, cols);
    let bias = random.units(outputs, 0.5);
    let mut norm = random.units(cols, 2.0);
    norm[real..].fill(0.0);
    let scale = 10_f32.powf(random.unit() * 2.0);
    let mut x = padded(random, rows, real, cols, scale);
    poison_dead(&mut x, live, cols);
    let positions: Vec<i32> =
        (0..rows).map(|row| if row == 0 { 131_071 } else { random.below(131_072) as i32 }).collect();
    let inv_freq: Vec<f32> = (0..pairs).map(|i| 150_000_f32.powf(-(i as f32) / 32.0)).collect();
    let inputs = Inputs {
        weights: device.upload(&in_panels(&weights, outputs, cols)).unwrap(),
        bias: device.upload(&bias).unwrap(),
        norm: device.upload(&norm).unwrap(),
        x: device.upload(&x).unwrap(),
        live: device.upload(&[live as i32]).unwrap(),
        positions: device.upload(&positions).unwrap(),
        inv_freq: device.upload(&inv_freq).unwrap(),
    };
    let mut want = [Vec::new(), Vec::new()];
    let compared: Vec<usize> = (0..heads + 2 * kv_heads).step_by(step).collect();
    for row in 0..live {
        let (operand, inverse) = normed(&x[row * cols..][..cols], &norm, real, f64::from(EPS));
        let output = |at: usize| dot(&operand, &weights[at * cols..][..cols]) * inverse + f64::from(bias[at]);
        for &head in &compared {
            let mut y: Vec<f64> = (head * 64..head * 64 + 64).map(output).collect();
            if head < heads + kv_heads {
                // Permuted: pairs side by side.
                let pair = |i: usize| {
                    let (low, high) = (y[2 * i], y[2 * i + 1]);
                    let angle = if i < pairs { positions[row] as f32 * inv_freq[i] } else { 0.0 };
                    let (sin, cos) = f64::from(angle).sin_cos();
                    let (sin, cos) = (sin * f64::from(MSCALE), cos * f64::from(MSCALE));
                    (low * cos - high * sin, high * cos + low * sin)
                };
                let (low, high): (Vec<_>, Vec<_>) = (0..32).map(pair).unzip();
                y = [low, high].concat();
            }
            want[usize::from(head >= heads)].extend(y);
        }
    }
    let dims = Dims { rows, cols, q_width, kv_width };
    for plan in GemvQkv::plans(device, dims).unwrap() {
        let kernel = GemvQkv::with_plan(device, dims, plan).unwrap();
        let what = format!("gemv_qkv {rows} rows ({live} live) of {real}: {plan}");
        let (q, kv) = inputs.run(device, &kernel, dims, real);
        let mut got = [Vec::new(), Vec::new()];
        for row in 0..live {
            for &head in &compared {
                if head < heads {
                    got[0].extend(from_bf16(&q[row * q_width + head * 64..][..64]));
                } else {
                    let at = row * 2 * kv_width + (head - heads) * 64;
                    got[1].extend(kv[at..at + 64].iter().map(|&v| f64::from(v)));
                }
            }
        }
        assert_rows(&format!("{what}, q"), &got[0], &want[0], 64, 4e-3);
        assert_rows(&format!("{what}, kv"), &got[1], &want[1], 64, 2e-4);
        assert!(
            q[live * q_width..].iter().all(|&v| v == 0xffff),
            "{what}: q beyond the live rows was written"
        );
        assert!(
            kv[live * 2 * kv_width..].iter().all(|v| v.to_bits() == u32::MAX),
            "{what}: kv beyond the live rows was written"
        );
    }
}

struct Inputs {
    weights: Buffer<u16>,
    bias: Buffer<f32>,
    norm: Buffer<f32>,
    x: Buffer<f32>,
    live: Buffer<i32>,
    positions: Buffer<i32>,
    inv_freq: Buffer<f32>,
}

impl Inputs {
    /// Returns `q` and `kv`, poisoned before.
    fn run(&self, device: &Device, kernel: &GemvQkv, dims: Dims, real: usize) -> (Vec<u16>, Vec<f32>) {
        let (q, kv) =
            (poisoned(device, dims.rows * dims.q_width), poisoned(device, dims.rows * 2 * dims.kv_width));
        let call = Call {
            weights: &self.weights,
            bias: &self.bias,
            norm: &self.norm,
            x: &self.x,
            live: &self.live,
            positions: &self.positions,
            inv_freq: &self.inv_freq,
            q: &q,
            kv: &kv,
            norm_cols: real,
            eps: EPS,
            mscale: MSCALE,
        };
        kernel.issue(device, &call).unwrap();
        (q.read(0, q.len()).unwrap(), kv.read(0, kv.len()).unwrap())
    }
}

/// A row's bits depend on the way that it is computed, but not on its neighbours.
#[test]
fn gemv_qkv_rows_do_not_depend_on_neighbours() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    let (cols, q_width, kv_width) = (2880, 1024, 128);
    let outputs = q_width + 2 * kv_width;
    let x = random.units(16 * cols, 2.0);
    let mut inputs = Inputs {
        weights: device.upload(&in_panels(&matrix(&mut random, outputs, cols), outputs, cols)).unwrap(),
        bias: device.upload(&random.units(outputs, 0.5)).unwrap(),
        norm: device.upload(&random.units(cols, 2.0)).unwrap(),
        x: device.upload(&x).unwrap(),
        live: device.upload(&[16]).unwrap(),
        positions: device.upload(&(0..16).map(|at| at * 999).collect::<Vec<i32>>()).unwrap(),
        inv_freq: device.upload(&random.units(32, 1.0)).unwrap(),
    };
    let run = |inputs: &Inputs, rows: usize| {
        let dims = Dims { rows, cols, q_width, kv_width };
        inputs.run(&device, &GemvQkv::load(&device, dims).unwrap(), dims, cols)
    };
    let (q, kv) = run(&inputs, 16);
    for rows in [1, 2, 7, 8, 9, 15] {
        inputs.live = device.upload(&[rows as i32]).unwrap();
        let (part_q, part_kv) = run(&inputs, rows);
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert!(part_q[..rows * q_width] == q[..rows * q_width], "q of {rows} rows");
        assert!(
            bits(&part_kv[..rows * 2 * kv_width]) == bits(&kv[..rows * 2 * kv_width]),
            "kv of {rows} rows"
        );
    }
}
