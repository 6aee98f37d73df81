use ctxserve_cuda::ops::moe_sort::{Call, MoeSort, Shape};

use crate::common::{Random, device};

/// What a sort gives.
#[derive(Debug, Default, PartialEq)]
pub struct Sorted {
    /// Sorted row of each (row, slot).
    pub position: Vec<i32>,
    /// Row of each sorted row, -1 of padding.
    pub source: Vec<i32>,
    /// Expert, first sorted row, sorted rows, 0.
    pub tiles: Vec<[i32; 4]>,
}

/// The definition.
pub fn sorted(choice: &[i32], slots: usize, experts: usize, height: usize) -> Sorted {
    let mut sorted = Sorted { position: vec![-1; choice.len()], ..Sorted::default() };
    for expert in 0..experts {
        let first = sorted.source.len();
        for (at, _) in choice.iter().enumerate().filter(|&(_, &chosen)| chosen == expert as i32) {
            sorted.position[at] = sorted.source.len() as i32;
            sorted.source.push((at / slots) as i32);
        }
        sorted.source.resize(sorted.source.len().next_multiple_of(8), -1);
        // Whole tiles, but the last two are even.
        let (mut from, end) = (first, sorted.source.len());
        while from < end {
            let rows = match end - from {
                left if left <= height => left,
                left if left <= 2 * height => left.div_ceil(16) * 8,
                _ => height,
            };
            sorted.tiles.push([expert as i32, from as i32, rows as i32, 0]);
            from += rows;
        }
    }
    sorted
}

#[test]
fn moe_sort_orders_by_expert_then_row() {
    const POISON: i32 = 0x5a5a_5a5a;
    let Some((device, _turn)) = device() else { return };
    let (kernel, mut random) = (MoeSort::load(&device).unwrap(), Random::new());
    for (rows, live, slots, experts, height, skew) in [
        (1, 1, 4, 32, 16, 0),
        (2, 0, 4, 32, 16, 0),
        (17, 17, 4, 32, 16, 0),
        (33, 31, 4, 32, 32, 1),
        (64, 64, 4, 128, 16, 0),
        (300, 255, 1, 3, 64, 0),
        (1000, 1000, 4, 32, 256, 2),
        (2053, 2049, 8, 128, 64, 1),
        (16_384, 16_384, 4, 32, 256, 0),
        (16_384, 16_383, 4, 128, 256, 1),
    ] {
        let shape = Shape { rows, slots, experts, height };
        // Distinct experts of a row; skewed towards the first ones, or all rows alike.
        let choice: Vec<i32> = (0..rows)
            .flat_map(|_| {
                let mut chosen = Vec::new();
                while chosen.len() < slots {
                    let expert = match skew {
                        0 => random.below(experts),
                        1 => random.below(experts).min(random.below(experts)).min(random.below(experts)),
                        _ => chosen.len(),
                    } as i32;
                    if !chosen.contains(&expert) || experts < slots {
                        chosen.push(expert);
                    }
                }
                chosen
            })
            .collect();
        let want = sorted(&choice[..live * slots], slots, experts, height);
        let poisoned = |len: usize| device.upload(&vec![POISON; len + 16]).unwrap();
        let (position, source) = (poisoned(rows * slots), poisoned(shape.sorted()));
        let (tiles, counts) = (poisoned(4 * shape.tiles()), poisoned(2));
        let call = Call {
            choice: &device.upload(&choice).unwrap(),
            live: &device.upload(&[live as i32]).unwrap(),
            position: &position,
            source: &source,
            tiles: &tiles,
            counts: &counts,
            shape,
        };
        kernel.issue(&device, &call).unwrap();
        let counts = counts.read(0, 18).unwrap();
        assert_eq!(counts[..2], [want.source.len() as i32, want.tiles.len() as i32], "{shape:?}");
        let whole = |buffer: &ctxserve_cuda::driver::Buffer<i32>| buffer.read(0, buffer.len()).unwrap();
        let same = |what: &str, got: &[i32], want: &[i32]| {
            let wrong = got.iter().zip(want).position(|(got, want)| got != want);
            assert!(
                wrong.is_none(),
                "{shape:?}: {what} {wrong:?}: {:?}",
                wrong.map(|at| (got[at], want[at]))
            );
            assert!(
                got[want.len()..].iter().all(|&v| v == POISON),
                "{shape:?}: {what} has more than it should"
            );
        };
        same("position", &whole(&position), &want.position);
        same("source", &whole(&source), &want.source);
        same("tiles", &whole(&tiles), want.tiles.as_flattened());
        assert!(counts[2..].iter().all(|&v| v == POISON));
    }
}
