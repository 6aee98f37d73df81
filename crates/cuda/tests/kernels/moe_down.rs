use ctxserve_cuda::driver::{Buffer, Device};
use ctxserve_cuda::ops::moe_down::{Call, MoeDown};
use ctxserve_cuda::ops::moe_gate_up::{Shape, Split};
use ctxserve_cuda::ops::pack_mxfp4::Rows;

use crate::common::{Random, assert_rows, device, from_f16, to_f16};
use crate::moe_gate_up::{Routing, WAYS, choices, to_fragments};
use crate::pack_mxfp4::Experts;

struct Model {
    shape: Shape,
    experts: Experts,
    weights: Buffer<u8>,
    bias: Vec<f32>,
    split: Option<Split>,
}

struct Inputs {
    a: Vec<u16>,
    choice: Vec<i32>,
    weight: Vec<f32>,
    x: Vec<f32>,
}

impl Inputs {
    fn random(random: &mut Random, rows: usize, shape: &Shape, routing: Routing) -> Self {
        Self {
            a: to_f16(&random.units(rows * shape.top_k * shape.inner, 3.0)),
            choice: choices(random, rows, shape, routing),
            weight: (0..rows * shape.top_k).map(|_| random.unit().abs()).collect(),
            x: random.units(rows * shape.hidden, 1.0),
        }
    }

    fn row(&self, row: usize, shape: &Shape) -> Self {
        Self {
            a: self.a[row * shape.top_k * shape.inner..][..shape.top_k * shape.inner].to_vec(),
            choice: self.choice[row * shape.top_k..][..shape.top_k].to_vec(),
            weight: self.weight[row * shape.top_k..][..shape.top_k].to_vec(),
            x: self.x[row * shape.hidden..][..shape.hidden].to_vec(),
        }
    }
}

impl Model {
    fn random(device: &Device, random: &mut Random, shape: Shape) -> Self {
        let middle = 125 - (shape.inner as f32).log2() as u8 / 2;
        let experts = Experts::random(random, shape.experts, (shape.hidden, shape.inner), (middle - 2, 4));
        let weights = experts.pack(device, Rows::Down);
        let bias = random.units(shape.experts * shape.hidden, 1.0);
        Self { shape, experts, weights, bias, split: None }
    }

    /// `x` after the kernel; rows beyond `live` must be as they were.
    fn run(&self, device: &Device, inputs: &Inputs, rows: usize, live: usize) -> Vec<f32> {
        let Shape { top_k, hidden, inner, .. } = self.shape;
        let mut held = inputs.x.clone();
        held.extend([1.25; 64]);
        let x = device.upload(&held).unwrap();
        let mut products = device.allocate::<f32>(rows * top_k * hidden + 64).unwrap();
        products.fill(0xff).unwrap();
        let call = Call {
            weights: &self.weights,
            bias: &device.upload(&self.bias).unwrap(),
            a: &device.upload(&to_fragments(&inputs.a, inner)).unwrap(),
            choice: &device.upload(&inputs.choice).unwrap(),
            weight: &device.upload(&inputs.weight).unwrap(),
            live: &device.upload(&[live as i32]).unwrap(),
            x: &x,
            products: &products,
            rows,
            shape: self.shape,
        };
        // The kernel reads `choice` ahead of what is before it in the stream: that must have ended.
        device.synchronize().unwrap();
        MoeDown::load(device).unwrap().issue_as(device, &call, self.split).unwrap();
        let x = x.read(0, held.len()).unwrap();
        assert_eq!(x[live * hidden..], held[live * hidden..], "rows beyond the live ones");
        let after = products.read(live * top_k * hidden, (rows - live) * top_k * hidden + 64).unwrap();
        assert!(after.iter().all(|v| v.to_bits() == u32::MAX), "products beyond the live rows");
        x[..live * hidden].to_vec()
    }

    /// What is added to element `at` of `row`.
    fn reference(&self, inputs: &Inputs, row: usize, at: usize) -> f64 {
        let Shape { top_k, hidden, inner, .. } = self.shape;
        (row * top_k..(row + 1) * top_k)
            .map(|pair| {
                let expert = inputs.choice[pair] as usize;
                let a = from_f16(&inputs.a[pair * inner..][..inner]);
                let bias = f64::from(self.bias[expert * hidden + at]);
                f64::from(inputs.weight[pair]) * (self.experts.dot(expert, at, &a) + bias)
            })
            .sum()
    }
}

/// KRN-02.
#[test]
fn moe_down_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    let shape = |experts, top_k, hidden, inner| Shape { experts, top_k, hidden, inner };
    for (shape, batches) in [
        (shape(4, 2, 64, 64), vec![1, 2, 3, 5, 8, 9, 17, 33]),
        (shape(7, 3, 128, 192), vec![1, 4, 8, 15, 16, 64]),
        (shape(128, 8, 64, 256), vec![1, 7, 8, 9, 64, 128]),
        (shape(8, 4, 2880, 2880), vec![1, 4, 8, 16, 40]),
        (shape(2, 1, 64, 8192), vec![1, 8, 20]),
    ] {
        let mut model = Model::random(&device, &mut random, shape);
        for rows in batches {
            for (routing, split) in WAYS {
                model.split = Some(split);
                let live = if rows > 3 { rows - random.below(2) } else { rows };
                let inputs = Inputs::random(&mut random, rows, &shape, routing);
                let x = model.run(&device, &inputs, rows, live);
                let some = if shape.inner * shape.hidden > 100_000 { 8 } else { shape.hidden };
                let (mut got, mut want) = (Vec::new(), Vec::new());
                for (row, i) in (0..live).flat_map(|row| (0..some).map(move |i| (row, i))) {
                    let at = match i {
                        0 => shape.hidden - 1,
                        _ if some == shape.hidden => i - 1,
                        _ => random.below(shape.hidden),
                    };
                    got.push(f64::from(x[row * shape.hidden + at]));
                    want.push(
                        f64::from(inputs.x[row * shape.hidden + at]) + model.reference(&inputs, row, at),
                    );
                }
                let what = format!("moe_down {shape:?} {rows} rows {routing:?} {split:?}");
                assert_rows(&what, &got, &want, some, 2e-5);
            }
        }
    }
}

#[test]
fn down_of_a_row_does_not_depend_on_its_neighbours() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    let shape = Shape { experts: 8, top_k: 4, hidden: 320, inner: 2880 };
    let mut model = Model::random(&device, &mut random, shape);
    let inputs = Inputs::random(&mut random, 37, &shape, Routing::Spread);
    let together = model.run(&device, &inputs, 37, 37);
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    for split in [Split::Piece, Split::Pipe] {
        model.split = Some(split);
        assert_eq!(bits(&model.run(&device, &inputs, 37, 37)), bits(&together), "{split:?}");
        for row in [0, 4, 36] {
            let alone = model.run(&device, &inputs.row(row, &shape), 1, 1);
            assert_eq!(bits(&alone), bits(&together[row * 320..][..320]), "row {row}, {split:?}");
        }
    }
}

/// KRN-02: every scale.
#[test]
fn every_scale_byte_counts() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    // Row r of the one expert has scale byte r; the last has 254 too.
    let shape = Shape { experts: 1, top_k: 1, hidden: 256, inner: 64 };
    let mut experts = Experts::random(&mut random, 1, (256, 64), (0, 1));
    for (at, scale) in experts.scales.iter_mut().enumerate() {
        *scale = (at / 2).min(254) as u8;
    }
    let weights = experts.pack(&device, Rows::Down);
    let mut model = Model { shape, experts, weights, bias: vec![0.0; 256], split: None };
    for (rows, split) in [(1, Split::Piece), (1, Split::Pipe), (9, Split::Piece), (9, Split::Pipe)] {
        model.split = Some(split);
        let mut inputs = Inputs::random(&mut random, rows, &shape, Routing::Same);
        inputs.a = to_f16(&random.units(rows * 64, 0.001));
        inputs.weight.fill(1.0);
        inputs.x.fill(0.0);
        let x = model.run(&device, &inputs, rows, rows);
        for (at, &got) in x.iter().enumerate() {
            let want = model.reference(&inputs, at / 256, at % 256);
            // Terms of one row share a scale, so cancellation costs a fixed share of the largest term; below 2^-112 sums are
            // subnormal on the way.
            let term = 6.0 * 0.001 * 2_f64.powi((at % 256).min(254) as i32 - 127);
            let error = (f64::from(got) - want).abs();
            assert!(error <= 1e-5 * term + 2_f64.powi(-130), "scale {}: {got} for {want}", at % 256);
        }
    }
}
