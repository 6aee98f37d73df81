use ctxserve_cuda::ops::embed::{Call, Embed};
use half::bf16;

use crate::common::{Random, device, panel, to_bf16};
use crate::gemv::poisoned;

#[test]
fn embed_copies_rows_of_the_table() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    for (rows, hidden, cols, fed, panels) in [
        (1, 64, 64, false, false),
        (1, 64, 64, false, true),
        (5, 2880, 2880, true, false),
        (5, 2880, 2880, true, true),
        (33, 2560, 2624, true, true),
        (16, 100, 128, true, false),
        (33, 2880, 2944, false, false),
        (3, 7, 8, true, false),
    ] {
        let vocab = 1000;
        let table = to_bf16(&random.units(vocab * hidden, 3.0));
        let capacity = panels.then_some(vocab + 8);
        let stored = match capacity {
            None => table.clone(),
            Some(capacity) => {
                let mut stored = vec![u16::MAX; capacity * hidden];
                for (at, &bits) in table.iter().enumerate() {
                    stored[panel(at / hidden, at % hidden, capacity)] = bits;
                }
                stored
            }
        };
        let mut tokens: Vec<i32> = (0..rows).map(|_| random.below(vocab) as i32).collect();
        let sampled: Vec<i32> = (0..rows).map(|_| random.below(vocab) as i32).collect();
        let feed: Vec<i32> = (0..rows).map(|_| random.below(rows + 3) as i32 - 3).collect();
        let live = rows.max(2) - 1;
        // Outside the table: a row of zeros.
        tokens[0] = if random.below(2) == 0 { -1 } else { vocab as i32 };
        let x = poisoned::<f32>(&device, rows * cols);
        let (feed_on, sampled_on) = (device.upload(&feed).unwrap(), device.upload(&sampled).unwrap());
        let call = Call {
            table: &device.upload(&stored).unwrap(),
            capacity,
            tokens: &device.upload(&tokens).unwrap(),
            feed: fed.then_some((&feed_on, &sampled_on)),
            live: &device.upload(&[live as i32]).unwrap(),
            x: &x,
            rows,
            vocab,
            hidden,
            cols,
        };
        Embed::load(&device).unwrap().issue(&device, &call).unwrap();
        let x = x.read(0, x.len()).unwrap();
        for row in 0..live {
            let token = if fed && feed[row] >= 0 { sampled[feed[row] as usize] } else { tokens[row] };
            let known = (0..vocab as i32).contains(&token);
            for col in 0..cols {
                let value = if known && col < hidden {
                    bf16::from_bits(table[token as usize * hidden + col]).to_f32()
                } else {
                    0.0
                };
                assert_eq!(
                    x[row * cols + col].to_bits(),
                    value.to_bits(),
                    "row {row}, column {col} of {hidden}"
                );
            }
        }
        assert!(x[live * cols..].iter().all(|v| v.to_bits() == u32::MAX), "rows beyond the live ones");
    }
}
