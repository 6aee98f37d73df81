use ctxserve_cuda::ops::moe_scatter::{Call, MoeScatter, Sort};
use ctxserve_cuda::ops::moe_sort::Shape;

use crate::common::{Random, assert_rows, device, from_bf16, from_f16, panel};
use crate::moe_sort::sorted;

#[test]
fn moe_scatter_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    let (kernel, mut random) = (MoeScatter::load(&device).unwrap(), Random::new());
    let cases = [
        (1, 1, 64, 4),
        (2, 0, 128, 1),
        (9, 8, 2880, 4),
        (130, 129, 2880, 4),
        (5, 5, 8192, 8),
        (3, 2, 9216, 2),
    ];
    for ((rows, live, cols, slots), bf16) in cases.into_iter().flat_map(|case| [(case, false), (case, true)])
    {
        let capacity = (rows * slots + 21_usize).next_multiple_of(8);
        let scale = 10_f32.powf(random.unit() * 2.0);
        let (x, weight) = (random.units(rows * cols, scale), random.units(cols, 2.0));
        // Not near zero, where fp16 has few bits.
        let scales: Vec<f32> = (0..rows).map(|_| (0.25 + random.unit().abs()) / scale).collect();
        // Places in random order, none twice.
        let mut places: Vec<i32> = (0..capacity as i32).collect();
        (1..capacity).for_each(|at| places.swap(at, random.below(at + 1)));
        let position = &places[..rows * slots];
        let mut y = device.allocate::<u16>(capacity * cols).unwrap();
        y.fill(0xff).unwrap();
        let call = Call {
            x: &device.upload(&x).unwrap(),
            weight: &device.upload(&weight).unwrap(),
            scale: &device.upload(&scales).unwrap(),
            y: &y,
            bf16,
            position: &device.upload(position).unwrap(),
            live: &device.upload(&[live as i32]).unwrap(),
            rows,
            cols,
            capacity,
            slots,
            sort: None,
        };
        kernel.issue(&device, &call).unwrap();
        let bits = y.read(0, capacity * cols).unwrap();
        let read = |row: i32| -> Vec<u16> {
            (0..cols).map(|col| bits[panel(row as usize, col, capacity)]).collect()
        };
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for (at, &place) in position[..live * slots].iter().enumerate() {
            let source = &x[at / slots * cols..][..cols];
            let scale = f64::from(scales[at / slots]);
            want.extend(source.iter().zip(&weight).map(|(&v, &w)| f64::from(v) * scale * f64::from(w)));
            got.extend(if bf16 { from_bf16(&read(place)) } else { from_f16(&read(place)) });
        }
        let limit = if bf16 { 3e-3 } else { 4e-4 };
        assert_rows(&format!("moe_scatter {rows}x{cols}, bf16 {bf16}"), &got, &want, cols, limit);
        assert!(
            places[live * slots..].iter().all(|&place| read(place).iter().all(|&v| v == 0xffff)),
            "rows that nobody goes to were written"
        );
    }
}

#[test]
fn moe_scatter_sorts_few_rows() {
    const POISON: i32 = 0x5a5a_5a5a;
    let Some((device, _turn)) = device() else { return };
    let (kernel, mut random) = (MoeScatter::load(&device).unwrap(), Random::new());
    for (rows, live, cols, slots, experts, height, skewed) in [
        (1, 1, 64, 4, 32, 16, false),
        (1, 0, 64, 4, 32, 16, false),
        (33, 31, 2880, 4, 32, 16, true),
        (64, 64, 2880, 4, 128, 64, false),
        (288, 280, 128, 4, 32, 16, false),
        (256, 256, 4096, 4, 5, 256, true),
        (140, 139, 64, 8, 128, 8, true),
        (200, 200, 64, 1, 3, 64, false),
    ] {
        let shape = Shape { rows, slots, experts, height };
        let capacity = shape.sorted();
        let (x, weight) = (random.units(rows * cols, 3.0), random.units(cols, 2.0));
        let scales = random.units(rows, 1.0);
        let choice: Vec<i32> = (0..rows)
            .flat_map(|_| {
                let mut chosen = Vec::new();
                while chosen.len() < slots {
                    let mut expert = random.below(experts);
                    if skewed {
                        expert = expert.min(random.below(experts)).min(random.below(experts));
                    }
                    if !chosen.contains(&(expert as i32)) {
                        chosen.push(expert as i32);
                    }
                }
                chosen
            })
            .collect();
        let want = sorted(&choice[..live * slots], slots, experts, height);
        let poisoned = |len: usize| device.upload(&vec![POISON; len + 16]).unwrap();
        let (position, tiles, counts) = (poisoned(rows * slots), poisoned(4 * shape.tiles()), poisoned(2));
        let mut y = device.allocate::<u16>(capacity * cols).unwrap();
        y.fill(0xff).unwrap();
        let (choice, live_rows) = (device.upload(&choice).unwrap(), device.upload(&[live as i32]).unwrap());
        let call = Call {
            x: &device.upload(&x).unwrap(),
            weight: &device.upload(&weight).unwrap(),
            scale: &device.upload(&scales).unwrap(),
            y: &y,
            bf16: experts > 100,
            position: &position,
            live: &live_rows,
            rows,
            cols,
            capacity,
            slots,
            sort: Some(Sort { choice: &choice, tiles: &tiles, counts: &counts, shape }),
        };
        kernel.issue(&device, &call).unwrap();
        let whole = |buffer: &ctxserve_cuda::driver::Buffer<i32>| buffer.read(0, buffer.len()).unwrap();
        let same = |what: &str, got: &[i32], want: &[i32]| {
            assert_eq!(got[..want.len()], *want, "{shape:?}: {what}");
            assert!(got[want.len()..].iter().all(|&v| v == POISON), "{shape:?}: too many {what}");
        };
        let padded: i32 = want.tiles.iter().map(|tile| tile[2]).sum();
        same("counts", &whole(&counts), &[padded, want.tiles.len() as i32]);
        same("positions", &whole(&position), &want.position);
        same("tiles", &whole(&tiles), want.tiles.as_flattened());
        // The plain kernel writes the same rows, and so does this one nothing else.
        let mut plain = device.allocate::<u16>(capacity * cols).unwrap();
        plain.fill(0xff).unwrap();
        kernel.issue(&device, &Call { y: &plain, sort: None, ..call }).unwrap();
        assert!(y.read(0, y.len()).unwrap() == plain.read(0, plain.len()).unwrap(), "{shape:?}: rows");
    }
}
