use ctxserve_cuda::ops::moe_down::{self, MoeDown};
use ctxserve_cuda::ops::moe_gate_up::{self, MoeGateUp, Shape};
use ctxserve_cuda::ops::moe_pair::{Call, MoePair, plan};
use ctxserve_cuda::ops::pack_mxfp4::Rows;

use crate::common::{Random, device, to_f16};
use crate::moe_gate_up::{Routing, choices, to_fragments};
use crate::pack_mxfp4::Experts;

#[test]
fn moe_pair_equals_the_two_products_in_turn() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    let shape = |experts, top_k, hidden, inner| Shape { experts, top_k, hidden, inner };
    if plan(1, &shape(4, 2, 64, 64), device.facts()).is_none() {
        println!("skipped: not a Hopper device");
        return;
    }
    let pair = MoePair::load(&device).unwrap();
    let (first, second) = (MoeGateUp::load(&device).unwrap(), MoeDown::load(&device).unwrap());
    for (shape, batches) in [
        (shape(4, 2, 64, 128), vec![1, 2, 3, 9, 17, 33]),
        (shape(7, 3, 384, 320), vec![1, 5, 8, 16, 64]),
        (shape(128, 8, 256, 256), vec![1, 7, 8, 9, 64, 128]),
        (shape(8, 4, 2880, 2880), vec![1, 4, 8, 16, 40, 96]),
    ] {
        let Shape { experts, top_k, hidden, inner } = shape;
        let scale = |cols: usize| 123 - (cols as f32).log2() as u8 / 2;
        let gate_up = Experts::random(&mut random, experts, (2 * inner, hidden), (scale(hidden), 4));
        let gate_up = gate_up.pack(&device, Rows::GateUp);
        let down = Experts::random(&mut random, experts, (hidden, inner), (scale(inner), 4));
        let down = down.pack(&device, Rows::Down);
        let gate_up_bias = device.upload(&random.units(experts * 2 * inner, 1.0)).unwrap();
        let down_bias = device.upload(&random.units(experts * hidden, 1.0)).unwrap();
        for rows in batches {
            for routing in [Routing::Spread, Routing::Same] {
                let live = if rows > 3 { rows - random.below(2) } else { rows };
                let pairs = rows * top_k;
                let h = to_fragments(&to_f16(&random.units(rows * hidden, 1.5)), hidden);
                let h = device.upload(&h).unwrap();
                let choice = device.upload(&choices(&mut random, rows, &shape, routing)).unwrap();
                let weight = device.upload(&random.units(pairs, 1.0)).unwrap();
                let count = device.upload(&[live as i32]).unwrap();
                let before = random.units(rows * hidden, 1.0);
                let run = |together: bool| {
                    let x = device.upload(&before).unwrap();
                    let mut a = device.allocate::<u16>(pairs * inner + 64).unwrap();
                    a.fill(0xff).unwrap();
                    let mut products = device.allocate::<f32>(pairs * hidden + 64).unwrap();
                    products.fill(0xff).unwrap();
                    let one = moe_gate_up::Call {
                        weights: &gate_up,
                        bias: &gate_up_bias,
                        h: &h,
                        choice: &choice,
                        live: &count,
                        a: &a,
                        rows,
                        shape,
                        alpha: 1.702,
                        limit: 7.0,
                    };
                    let two = moe_down::Call {
                        weights: &down,
                        bias: &down_bias,
                        a: &a,
                        choice: &choice,
                        weight: &weight,
                        live: &count,
                        x: &x,
                        products: &products,
                        rows,
                        shape,
                    };
                    if together {
                        pair.issue(&device, &Call { gate_up: &one, down: &two }).unwrap();
                    } else {
                        first.issue(&device, &one).unwrap();
                        second.issue(&device, &two).unwrap();
                    }
                    let a = a.read(0, pairs * inner + 64).unwrap();
                    let after = products.read(live * top_k * hidden, (rows - live) * top_k * hidden + 64);
                    assert!(after.unwrap().iter().all(|v| v.to_bits() == u32::MAX), "beyond the live rows");
                    let x = x.read(0, rows * hidden).unwrap();
                    (a, x.iter().map(|v| v.to_bits()).collect::<Vec<_>>())
                };
                let want = run(false);
                // Several times: blocks meet at a word that each launch leaves for the next.
                for turn in 0..3 {
                    let got = run(true);
                    assert!(got.0 == want.0, "a of {shape:?}, {rows} rows, {routing:?}, turn {turn}");
                    assert!(got.1 == want.1, "x of {shape:?}, {rows} rows, {routing:?}, turn {turn}");
                }
                println!("moe_pair {shape:?} {rows} rows {routing:?}: same");
            }
        }
    }
}
