use ctxserve_cuda::ops::moe_combine::{Call, MoeCombine, Outputs};

use crate::common::{Random, assert_rows, device, from_bf16, to_bf16};

#[test]
fn moe_combine_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    let (kernel, mut random) = (MoeCombine::load(&device).unwrap(), Random::new());
    for (rows, live, cols, stride, slots, narrow) in [
        (1, 1, 64, 64, 4, false),
        (9, 8, 2880, 2880, 4, false),
        (17, 17, 2880, 2944, 4, true),
        (5, 3, 4096, 4096, 7, true),
    ] {
        let sorted = rows * slots + 11;
        let (x, y) = (random.units(rows * cols, 3.0), random.units(sorted * stride, 2.0));
        let weight = random.units(rows * slots, 1.0);
        let position: Vec<i32> = (0..rows * slots).map(|_| random.below(sorted) as i32).collect();
        let on_device = device.upload(&x).unwrap();
        let (wide_y, narrow_y) = (device.upload(&y).unwrap(), device.upload(&to_bf16(&y)).unwrap());
        let call = Call {
            x: &on_device,
            y: if narrow { Outputs::Bf16(&narrow_y) } else { Outputs::F32(&wide_y) },
            position: &device.upload(&position).unwrap(),
            weight: &device.upload(&weight).unwrap(),
            live: &device.upload(&[live as i32]).unwrap(),
            rows,
            sorted,
            cols,
            stride,
            slots,
        };
        kernel.issue(&device, &call).unwrap();
        let y: Vec<f64> =
            if narrow { from_bf16(&to_bf16(&y)) } else { y.iter().map(|&v| f64::from(v)).collect() };
        let want: Vec<f64> = (0..live * cols)
            .map(|at| {
                let (row, col) = (at / cols, at % cols);
                let of_slot = |slot: usize| {
                    let from = position[row * slots + slot] as usize;
                    f64::from(weight[row * slots + slot]) * y[from * stride + col]
                };
                f64::from(x[at]) + (0..slots).map(of_slot).sum::<f64>()
            })
            .collect();
        let bits = on_device.read(0, rows * cols).unwrap();
        let got: Vec<f64> = bits[..live * cols].iter().map(|&v| f64::from(v)).collect();
        assert_rows(&format!("moe_combine {rows}x{cols}"), &got, &want, cols, 1e-6);
        assert_eq!(bits[live * cols..], x[live * cols..], "rows beyond the live ones were written");
    }
}
