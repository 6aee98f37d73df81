use ctxserve_cuda::driver::{Buffer, Device};
use ctxserve_cuda::ops::moe_gate_up::{Call, MoeGateUp, Shape, Split};
use ctxserve_cuda::ops::pack_mxfp4::Rows;

use crate::common::{Random, assert_rows, device, from_f16, to_f16};
use crate::pack_mxfp4::Experts;
use crate::route::fragment;

const ALPHA: f32 = 1.702;
const LIMIT: f32 = 7.0;
const POISON: u16 = 0xa5a5;

/// Rows in fragment order.
pub fn to_fragments(values: &[u16], cols: usize) -> Vec<u16> {
    let mut ordered = vec![0; values.len()];
    for (at, &value) in values.iter().enumerate() {
        ordered[at - at % cols + fragment(at % cols)] = value;
    }
    ordered
}

/// Who chooses whom.
#[derive(Clone, Copy, Debug)]
pub enum Routing {
    /// Any experts, distinct within a row.
    Spread,
    /// Every row the same.
    Same,
}

pub fn choices(random: &mut Random, rows: usize, shape: &Shape, routing: Routing) -> Vec<i32> {
    let mut choice: Vec<i32> = Vec::new();
    for row in 0..rows {
        for slot in 0..shape.top_k {
            let picked = match routing {
                Routing::Same if row > 0 => choice[slot],
                _ => loop {
                    let expert = random.below(shape.experts) as i32;
                    if !choice[row * shape.top_k..].contains(&expert) {
                        break expert;
                    }
                },
            };
            choice.push(picked);
        }
    }
    choice
}

/// Routings, each with the pipe and with what is taken instead.
pub const WAYS: [(Routing, Split); 4] = [
    (Routing::Spread, Split::Pipe),
    (Routing::Same, Split::Pipe),
    (Routing::Spread, Split::Piece),
    (Routing::Same, Split::Piece),
];

struct Model {
    shape: Shape,
    experts: Experts,
    weights: Buffer<u8>,
    bias: Vec<f32>,
    split: Option<Split>,
}

impl Model {
    fn random(device: &Device, random: &mut Random, shape: Shape) -> Self {
        let size = (2 * shape.inner, shape.hidden);
        // Sums of about unit size.
        let middle = 125 - (shape.hidden as f32).log2() as u8 / 2;
        let experts = Experts::random(random, shape.experts, size, (middle - 2, 4));
        let weights = experts.pack(device, Rows::GateUp);
        let bias = random.units(shape.experts * 2 * shape.inner, 1.0);
        Self { shape, experts, weights, bias, split: None }
    }

    /// `a` for `live` of `rows` rows, in fragment order, with what follows it.
    fn run(&self, device: &Device, h: &[u16], choice: &[i32], rows: usize, live: usize) -> Vec<u16> {
        let length = rows * self.shape.top_k * self.shape.inner;
        let mut a = device.allocate::<u16>(length + 64).unwrap();
        a.fill(0xa5).unwrap();
        let call = Call {
            weights: &self.weights,
            bias: &device.upload(&self.bias).unwrap(),
            h: &device.upload(&to_fragments(h, self.shape.hidden)).unwrap(),
            choice: &device.upload(choice).unwrap(),
            live: &device.upload(&[live as i32]).unwrap(),
            a: &a,
            rows,
            shape: self.shape,
            alpha: ALPHA,
            limit: LIMIT,
        };
        MoeGateUp::load(device).unwrap().issue_as(device, &call, self.split).unwrap();
        let a = a.read(0, length + 64).unwrap();
        let done = live * self.shape.top_k * self.shape.inner;
        assert!(a[done..].iter().all(|&v| v == POISON), "written beyond the live rows");
        a
    }

    /// Element `at` of SwiGLU of expert `expert`.
    fn reference(&self, h: &[f64], expert: usize, at: usize) -> f64 {
        let bias = &self.bias[expert * 2 * self.shape.inner..];
        let [gate, up] =
            [2 * at, 2 * at + 1].map(|row| self.experts.dot(expert, row, h) + f64::from(bias[row]));
        let (alpha, limit) = (f64::from(ALPHA), f64::from(LIMIT));
        let (gate, up) = (gate.min(limit), up.clamp(-limit, limit));
        gate / (1.0 + (-alpha * gate).exp()) * (up + 1.0)
    }
}

/// KRN-02.
#[test]
fn moe_gate_up_equals_its_definition() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    let shape = |experts, top_k, hidden, inner| Shape { experts, top_k, hidden, inner };
    for (shape, batches) in [
        (shape(4, 2, 64, 64), vec![1, 2, 3, 5, 8, 9, 17, 33]),
        (shape(7, 3, 192, 128), vec![1, 4, 8, 15, 16, 64]),
        (shape(128, 8, 256, 64), vec![1, 7, 8, 9, 64, 128]),
        (shape(8, 4, 2880, 2880), vec![1, 4, 8, 16, 40]),
        (shape(2, 1, 8192, 64), vec![1, 8, 20]),
    ] {
        let mut model = Model::random(&device, &mut random, shape);
        for rows in batches {
            for (routing, split) in WAYS {
                model.split = Some(split);
                let live = if rows > 3 { rows - random.below(2) } else { rows };
                let h = to_f16(&random.units(rows * shape.hidden, 1.5));
                let choice = choices(&mut random, rows, &shape, routing);
                let a = from_f16(&model.run(&device, &h, &choice, rows, live));
                let h = from_f16(&h);
                // All columns of small shapes, some of large ones, the last one always.
                let some = if shape.inner * shape.hidden > 100_000 { 6 } else { shape.inner };
                let (mut got, mut want) = (Vec::new(), Vec::new());
                for pair in 0..live * shape.top_k {
                    let h = &h[pair / shape.top_k * shape.hidden..][..shape.hidden];
                    for i in 0..some {
                        let at = match i {
                            0 => shape.inner - 1,
                            _ if some == shape.inner => i - 1,
                            _ => random.below(shape.inner),
                        };
                        got.push(a[pair * shape.inner + fragment(at)]);
                        want.push(model.reference(h, choice[pair] as usize, at));
                    }
                }
                let what = format!("moe_gate_up {shape:?} {rows} rows {routing:?} {split:?}");
                assert_rows(&what, &got, &want, some, 1e-3);
                let scale = want.iter().fold(0.0_f64, |most, v| most.max(v.abs()));
                assert!(
                    got.iter().zip(&want).all(|(g, w)| (g - w).abs() <= 1e-3 * w.abs() + 1e-4 * scale),
                    "{what}"
                );
            }
        }
    }
}

#[test]
fn gate_up_of_a_row_does_not_depend_on_its_neighbours() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    let shape = Shape { experts: 8, top_k: 4, hidden: 2880, inner: 320 };
    let mut model = Model::random(&device, &mut random, shape);
    let h = to_f16(&random.units(37 * 2880, 1.5));
    let choice = choices(&mut random, 37, &shape, Routing::Spread);
    let length = 4 * shape.inner;
    let together = model.run(&device, &h, &choice, 37, 37);
    for split in [Split::Piece, Split::Pipe] {
        model.split = Some(split);
        assert_eq!(model.run(&device, &h, &choice, 37, 37), together, "{split:?}");
        let few = model.run(&device, &h[..5 * 2880], &choice[..5 * 4], 5, 5);
        assert_eq!(few[..5 * length], together[..5 * length], "{split:?}");
        for row in [0, 4, 36] {
            let alone = model.run(&device, &h[row * 2880..][..2880], &choice[row * 4..][..4], 1, 1);
            assert_eq!(alone[..length], together[row * length..][..length], "row {row}, {split:?}");
        }
    }
}

#[test]
fn padding_of_inner_becomes_zero() {
    let Some((device, _turn)) = device() else { return };
    let mut random = Random::new();
    // 48 gates and ups of the checkpoint are padded to 64.
    let experts = Experts::random(&mut random, 2, (96, 64), (120, 4));
    let shape = Shape { experts: 2, top_k: 1, hidden: 64, inner: 64 };
    let weights = experts.pack(&device, Rows::GateUp);
    let bias = vec![0.0; 2 * 128];
    let model = Model { shape, experts, weights, bias, split: None };
    let h = to_f16(&random.units(9 * 64, 1.0));
    for rows in [2, 9] {
        let choice = choices(&mut random, rows, &shape, Routing::Spread);
        let a = model.run(&device, &h[..rows * 64], &choice, rows, rows);
        let values = from_f16(&a);
        for (pair, &expert) in choice.iter().enumerate() {
            let row = &values[pair * 64..][..64];
            assert!((48..64).all(|at| row[fragment(at)] == 0.0), "padding was computed");
            let h = from_f16(&h[pair * 64..][..64]);
            let got: Vec<f64> = (0..48).map(|at| row[fragment(at)]).collect();
            let want: Vec<f64> = (0..48).map(|at| model.reference(&h, expert as usize, at)).collect();
            assert_rows("padded", &got, &want, 48, 1e-3);
        }
    }
}
