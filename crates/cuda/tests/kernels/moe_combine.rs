use ctxserve_cuda::ops::moe_combine::{Call, MoeCombine, Norm, Outputs};
use ctxserve_cuda::ops::rms_norm::{self, RmsNorm};

use crate::common::{Random, assert_rows, device, from_bf16, panel, to_bf16};

#[test]
fn moe_combine_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    let (kernel, mut random) = (MoeCombine::load(&device).unwrap(), Random::new());
    for (rows, live, cols, stride, slots, narrow, with_norm) in [
        (1, 1, 64, 64, 4, false, true),
        (9, 8, 2880, 2880, 4, false, true),
        (17, 17, 2880, 2944, 4, true, false),
        (20, 18, 2880, 2880, 4, false, true),
        (33, 32, 2880, 2880, 4, true, true),
        (5, 3, 4096, 4096, 7, true, false),
        (3, 2, 8192, 8192, 8, false, true),
    ] {
        // Some cases take the outputs as they come.
        let in_order = rows == 20;
        let sorted = rows * slots + if in_order { 0 } else { 11 };
        let (x, y) = (random.units(rows * cols, 3.0), random.units(sorted * stride, 2.0));
        let weight = random.units(rows * slots, 1.0);
        let position: Vec<i32> =
            (0..rows * slots).map(|at| if in_order { at } else { random.below(sorted) } as i32).collect();
        let on_device = device.upload(&x).unwrap();
        let (wide_y, narrow_y) = (device.upload(&y).unwrap(), device.upload(&to_bf16(&y)).unwrap());
        let capacity = (rows + 7_usize).next_multiple_of(8);
        let mut normed = device.allocate::<u16>(capacity * cols).unwrap();
        normed.fill(0xff).unwrap();
        let of_norm = random.units(cols, 2.0);
        let weight_of_norm = device.upload(&of_norm).unwrap();
        let norm = Norm { weight: &weight_of_norm, eps: 1e-5, y: &normed, capacity };
        let on_device_position = device.upload(&position).unwrap();
        let call = Call {
            x: &on_device,
            y: if narrow { Outputs::Bf16(&narrow_y) } else { Outputs::F32(&wide_y) },
            position: Some(&on_device_position).filter(|_| !in_order),
            weight: &device.upload(&weight).unwrap(),
            live: &device.upload(&[live as i32]).unwrap(),
            rows,
            sorted,
            cols,
            stride,
            slots,
            norm: with_norm.then_some(norm),
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
        let bits = normed.read(0, capacity * cols).unwrap();
        let read = |row: usize| (0..cols).map(|col| bits[panel(row, col, capacity)]).collect::<Vec<_>>();
        let written = if with_norm { live } else { 0 };
        assert!(
            (written..capacity).all(|row| read(row).iter().all(|&v| v == 0xffff)),
            "normed beyond the live rows"
        );
        let want: Vec<f64> = want[..written * cols]
            .chunks(cols)
            .flat_map(|row| {
                let mean = row.iter().map(|v| v * v).sum::<f64>() / cols as f64;
                let scale = 1.0 / (mean + 1e-5).sqrt();
                row.iter().zip(&of_norm).map(move |(v, &w)| v * scale * f64::from(w)).collect::<Vec<_>>()
            })
            .collect();
        if with_norm {
            // The norm alone gives the same bits.
            let mut alone = device.allocate::<u16>(capacity * cols).unwrap();
            alone.fill(0xff).unwrap();
            let call = rms_norm::Call {
                x: &on_device,
                weight: norm.weight,
                y: &alone,
                live: &device.upload(&[live as i32]).unwrap(),
                index: None,
                rows,
                cols,
                capacity,
                eps: norm.eps,
            };
            RmsNorm::load(&device).unwrap().issue(&device, &call).unwrap();
            assert!(alone.read(0, capacity * cols).unwrap() == bits, "rms_norm of {rows}x{cols} differs");
        }
        let got: Vec<f64> = (0..written).flat_map(|row| from_bf16(&read(row))).collect();
        assert_rows(&format!("the norm of {rows}x{cols}"), &got, &want, cols, 3e-3);
    }
}
