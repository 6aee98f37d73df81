use ctxserve_cuda::ops::rms_norm::{Call, RmsNorm};

use crate::common::{Random, assert_rows, device, from_bf16, panel};

#[test]
fn rms_norm_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (rows, cols, gather) in
        [(1, 64, false), (3, 2880, false), (130, 2880, true), (17, 4096, true), (9, 9216, false)]
    {
        let (sources, capacity) = (rows + 5, (rows + 7_usize).next_multiple_of(8));
        let scale = 10_f32.powf(random.unit() * 2.0);
        let x = random.units(sources * cols, scale);
        let weight = random.units(cols, 2.0);
        let mut index: Vec<i32> =
            (0..rows).map(|row| if gather { random.below(sources) } else { row } as i32).collect();
        if gather {
            (3..rows).step_by(5).for_each(|row| index[row] = -1);
        }
        let mut y = device.allocate::<u16>(capacity * cols).unwrap();
        y.fill(0xff).unwrap();
        let live = rows.max(2) - 1;
        let on_device = device.upload(&index).unwrap();
        let call = Call {
            x: &device.upload(&x).unwrap(),
            weight: &device.upload(&weight).unwrap(),
            y: &y,
            live: &device.upload(&[live as i32]).unwrap(),
            index: Some(&on_device).filter(|_| gather),
            rows,
            cols,
            capacity,
            eps: 1e-5,
        };
        RmsNorm::load(&device).unwrap().issue(&device, &call).unwrap();
        let bits = y.read(0, capacity * cols).unwrap();
        let read =
            |row: usize| -> Vec<u16> { (0..cols).map(|col| bits[panel(row, col, capacity)]).collect() };
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for row in 0..live {
            if index[row] < 0 {
                assert!(read(row).iter().all(|&v| v == 0), "row {row} has no source and is not zero");
                continue;
            }
            let source = &x[index[row] as usize * cols..][..cols];
            let mean = source.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / cols as f64;
            let inverse = 1.0 / (mean + 1e-5).sqrt();
            want.extend(source.iter().zip(&weight).map(|(&v, &w)| f64::from(v) * inverse * f64::from(w)));
            got.extend(from_bf16(&read(row)));
        }
        assert_rows(&format!("rms_norm {rows}x{cols}"), &got, &want, cols, 3e-3);
        assert!(
            (live..capacity).all(|row| read(row).iter().all(|&v| v == 0xffff)),
            "rows beyond the live ones were written"
        );
    }
}
