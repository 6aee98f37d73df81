use ctxserve_cuda::ops::moe_scatter::{Call, MoeScatter};

use crate::common::{Random, assert_rows, device, from_f16, panel};

#[test]
fn moe_scatter_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    let (kernel, mut random) = (MoeScatter::load(&device).unwrap(), Random::new());
    for (rows, live, cols, slots) in [
        (1, 1, 64, 4),
        (2, 0, 128, 1),
        (9, 8, 2880, 4),
        (130, 129, 2880, 4),
        (5, 5, 8192, 8),
        (3, 2, 9216, 2),
    ] {
        let capacity = (rows * slots + 21_usize).next_multiple_of(8);
        let scale = 10_f32.powf(random.unit() * 2.0);
        let (x, weight) = (random.units(rows * cols, scale), random.units(cols, 2.0));
        // Places in random order, none twice.
        let mut places: Vec<i32> = (0..capacity as i32).collect();
        (1..capacity).for_each(|at| places.swap(at, random.below(at + 1)));
        let position = &places[..rows * slots];
        let mut y = device.allocate::<u16>(capacity * cols).unwrap();
        y.fill(0xff).unwrap();
        let call = Call {
            x: &device.upload(&x).unwrap(),
            weight: &device.upload(&weight).unwrap(),
            y: &y,
            position: &device.upload(position).unwrap(),
            live: &device.upload(&[live as i32]).unwrap(),
            rows,
            cols,
            capacity,
            slots,
            eps: 1e-5,
        };
        kernel.issue(&device, &call).unwrap();
        let bits = y.read(0, capacity * cols).unwrap();
        let read = |row: i32| -> Vec<u16> {
            (0..cols).map(|col| bits[panel(row as usize, col, capacity)]).collect()
        };
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for (at, &place) in position[..live * slots].iter().enumerate() {
            let source = &x[at / slots * cols..][..cols];
            let mean = source.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / cols as f64;
            let inverse = 1.0 / (mean + 1e-5).sqrt();
            want.extend(source.iter().zip(&weight).map(|(&v, &w)| f64::from(v) * inverse * f64::from(w)));
            got.extend(from_f16(&read(place)));
        }
        assert_rows(&format!("moe_scatter {rows}x{cols}"), &got, &want, cols, 4e-4);
        assert!(
            places[live * slots..].iter().all(|&place| read(place).iter().all(|&v| v == 0xffff)),
            "rows that nobody goes to were written"
        );
    }
}
