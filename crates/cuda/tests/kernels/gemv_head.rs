use ctxserve_cuda::driver::Device;
use ctxserve_cuda::ops::gemv_head::{Call, Dims, GemvHead};

use crate::common::{Random, assert_rows, device};
use crate::gemv::{dot, in_panels, matrix, normed, padded, poison_dead, poisoned};

const EPS: f32 = 1e-5;

#[test]
fn gemv_head_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (rows, live, real, vocab, gather) in [
        (1, 1, 64, 1, false),
        (1, 0, 64, 40, false),
        (1, 1, 2880, 1001, true),
        (2, 2, 100, 7000, true),
        (3, 2, 640, 333, false),
        (5, 5, 576, 5281, true),
        (8, 8, 2880, 640, true),
        (9, 8, 64, 12_345, true),
        (16, 16, 2880, 700, true),
        (16, 15, 320, 6666, false),
    ] {
        check(&device, &mut random, (rows, live, real, vocab, gather), 1);
    }
}

#[test]
fn gemv_head_at_the_real_shape() {
    let Some((device, _turn)) = device() else { return };
    // Only a part of the vocabulary's width: the host would take minutes for all of it.
    check(&device, &mut Random::new(), (2, 2, 2880, 20_108, true), 41);
}

/// Compares every `step`th logit.
fn check(
    device: &Device,
    random: &mut Random,
    (rows, live, real, vocab, gather): (usize, usize, usize, usize, bool),
    step: usize,
) {
    let (cols, padded_vocab, stride) =
        (real.next_multiple_of(64), vocab.next_multiple_of(8), vocab.next_multiple_of(2) + 6);
    let sources = if gather { rows + 7 } else { rows };
    let weights = matrix(random, padded_vocab, cols);
    let mut norm = random.units(cols, 2.0);
    norm[real..].fill(0.0);
    let mut x = padded(random, sources, real, cols, 20.0);
    if !gather {
        poison_dead(&mut x, live, cols);
    }
    // Entries of dead rows name no row at all.
    let index: Vec<i32> =
        (0..rows).map(|row| if row < live { random.below(sources) as i32 } else { i32::MAX }).collect();
    let logits = poisoned::<f32>(device, rows * stride);
    let on_device = device.upload(&index).unwrap();
    let call = Call {
        weights: &device.upload(&in_panels(&weights, padded_vocab, cols)).unwrap(),
        norm: &device.upload(&norm).unwrap(),
        x: &device.upload(&x).unwrap(),
        index: Some(&on_device).filter(|_| gather),
        live: &device.upload(&[live as i32]).unwrap(),
        logits: &logits,
        norm_cols: real,
        eps: EPS,
    };
    let kernel = GemvHead::load(device, Dims { rows, cols, vocab, stride }).unwrap();
    kernel.issue(device, &call).unwrap();
    let logits = logits.read(0, logits.len()).unwrap();

    let what = format!("gemv_head {rows} rows ({live} live) of {real} to {vocab}: {}", kernel.plan());
    let (mut got, mut want) = (Vec::new(), Vec::new());
    let columns: Vec<usize> = (0..vocab).step_by(step).collect();
    for row in 0..live {
        let source = if gather { index[row] as usize } else { row };
        let (operand, inverse) = normed(&x[source * cols..][..cols], &norm, real, f64::from(EPS));
        for &column in &columns {
            want.push(dot(&operand, &weights[column * cols..][..cols]) * inverse);
            got.push(f64::from(logits[row * stride + column]));
        }
    }
    assert_rows(&what, &got, &want, columns.len(), 1e-4);
    let untouched = |at: usize| at / stride >= live || at % stride >= vocab;
    assert!(
        logits.iter().enumerate().all(|(at, v)| !untouched(at) || v.to_bits() == u32::MAX),
        "{what}: more than the live rows' logits was written"
    );
}
