use ctxserve_cuda::ops::narrow::{Call, Narrow};

use crate::common::{Random, device};

/// Some of `0..count`, ascending; all of them where `kept` is `count`.
fn some(random: &mut Random, kept: usize, count: usize) -> Vec<i32> {
    let mut left = kept;
    let chosen = (0..count).filter(|&at| {
        let takes = random.below(count - at) < left;
        left -= usize::from(takes);
        takes
    });
    chosen.map(|at| at as i32).collect()
}

#[test]
fn narrow_keeps_rows_in_place() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (rows, kept, sequences, hidden, q_width) in [
        (1, 1, 1, 64, 64),
        (40, 1, 1, 2880, 4096),
        (300, 19, 40, 2880, 4096),
        (64, 64, 64, 128, 64),
        (9, 8, 9, 320, 512),
    ] {
        let x: Vec<f32> = random.units(rows * hidden, 1.0);
        let q: Vec<u16> = (0..rows * q_width).map(|_| random.bits() as u16).collect();
        let mut ints = |count: usize| -> Vec<i32> { (0..count).map(|_| random.bits() as i32).collect() };
        let (position, at, first) = (ints(rows), ints(sequences), ints(sequences));
        let (row, sequence) = (some(&mut random, kept, rows), some(&mut random, kept, sequences));
        let on_device = |values: &[i32]| device.upload(values).unwrap();
        let (x_on, q_on) = (device.upload(&x).unwrap(), device.upload(&q).unwrap());
        let (position_on, at_on, first_on) = (on_device(&position), on_device(&at), on_device(&first));
        let (rows_on, decode_on) = (on_device(&[-1, 7]), on_device(&[-1, 7]));
        let call = Call {
            x: &x_on,
            q: &q_on,
            row: &on_device(&row),
            sequence: &on_device(&sequence),
            kept: &on_device(&[kept as i32]),
            position: &position_on,
            at: &at_on,
            first: &first_on,
            rows: &rows_on,
            decode: &decode_on,
            hidden,
            q_width,
        };
        Narrow::load(&device).unwrap().issue(&device, &call).unwrap();
        for l in 0..kept {
            let (from, sequence) = (row[l] as usize, sequence[l] as usize);
            assert_eq!(x_on.read(l * hidden, hidden).unwrap(), x[from * hidden..][..hidden], "row {l}");
            assert_eq!(q_on.read(l * q_width, q_width).unwrap(), q[from * q_width..][..q_width], "row {l}");
            assert_eq!(position_on.read(l, 1).unwrap(), position[from..=from]);
            assert_eq!(at_on.read(l, 1).unwrap(), at[sequence..=sequence]);
            assert_eq!(first_on.read(l, 1).unwrap(), first[sequence..=sequence]);
        }
        // What lies behind is left alone.
        assert_eq!(x_on.read(kept * hidden, (rows - kept) * hidden).unwrap(), x[kept * hidden..]);
        assert_eq!(q_on.read(kept * q_width, (rows - kept) * q_width).unwrap(), q[kept * q_width..]);
        for counter in [&rows_on, &decode_on] {
            assert_eq!(counter.read(0, 2).unwrap(), [kept as i32, 7]);
        }
    }
}
