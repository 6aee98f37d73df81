//! Logical tensors out of each storage format, and what is said when they are not there.

use crate::support::{bf16s, f16s, f32s, mxfp4_config, tensor};
use ctxserve_checkpoint::{Checkpoint, CheckpointError, Dtype, Flaw, MemoryTensor, Shape, Want, to_bf16};
use ctxserve_core::{Elements, Matrix};
use half::bf16;
use serde_json::json;

const GATE_UP: &str = "model.layers.0.mlp.experts.gate_up_proj";
const DOWN: &str = "model.layers.0.mlp.experts.down_proj";

fn want(name: &str, shape: Shape) -> Want {
    Want { name: name.to_owned(), shape }
}

fn experts(name: &str, experts: usize, rows: usize, cols: usize) -> Want {
    want(name, Shape::Experts { experts, rows, cols })
}

/// `0, 1, 2, ...`: exact in bfloat16 up to 256, and no two alike.
fn ramp(count: usize) -> impl Iterator<Item = f32> {
    (0..count).map(|i| i as f32)
}

fn values(matrix: Matrix) -> Vec<f32> {
    match matrix.into_elements() {
        Elements::F32(values) => values,
        Elements::Bf16(values) => values.into_iter().map(bf16::to_f32).collect(),
        Elements::Mxfp4 { .. } | Elements::Nvfp4 { .. } | Elements::Affine { .. } => panic!("packed"),
    }
}

#[test]
fn vectors_and_matrices_come_from_every_float_type() {
    let numbers = [1.0, -0.5, 3.25, 0.0, 1.5, -2.0];
    for (dtype, data) in
        [(Dtype::F32, f32s(numbers)), (Dtype::BF16, bf16s(numbers)), (Dtype::F16, f16s(numbers))]
    {
        let tensors = vec![
            tensor("v", dtype, &[6], data.clone()),
            tensor("b", dtype, &[2, 3], data.clone()),
            tensor("m", dtype, &[3, 2], data),
        ];
        let checkpoint = Checkpoint::in_memory(json!({}), tensors).unwrap();
        assert_eq!(checkpoint.format_name(), "dense");
        assert_eq!(checkpoint.vector("v", 6).unwrap(), numbers);
        assert_eq!(checkpoint.vector("b", 6).unwrap(), numbers, "rows one after another");
        let matrix = checkpoint.matrix("m", 3, 2).unwrap();
        assert_eq!((matrix.rows(), matrix.cols()), (3, 2));
        assert_eq!(values(matrix), numbers);
        for (rows, cols) in [(2, 3), (6, 1), (3, 3), (usize::MAX, 2)] {
            let message = checkpoint.matrix("m", rows, cols).unwrap_err().to_string();
            assert!(message.contains("tensor \"m\" has shape [3, 2]"), "{message}");
        }
        assert!(checkpoint.vector("v", 5).is_err());
        assert!(checkpoint.vector("absent", 6).unwrap_err().to_string().contains("\"absent\" is missing"));
    }
}

#[test]
fn half_precision_matrices_longer_than_a_piece_are_whole() {
    let count = (5 << 20) / 2;
    let number = |i: usize| (i % 2039) as f32 - 1000.0;
    let data = f16s((0..count).map(number));
    let checkpoint =
        Checkpoint::in_memory(json!({}), vec![tensor("m", Dtype::F16, &[5, count / 5], data)]).unwrap();
    let values = values(checkpoint.matrix("m", 5, count / 5).unwrap());
    assert!(values.into_iter().enumerate().all(|(i, value)| value == number(i)));
}

#[test]
fn numbers_that_are_not_finite_are_named_by_place() {
    for (dtype, bad) in [
        (Dtype::F32, f32s([1.0, 2.0, 3.0, 4.0, f32::NAN, 6.0])),
        (Dtype::BF16, bf16s([1.0, 2.0, 3.0, 4.0, f32::INFINITY, 6.0])),
        (Dtype::F16, f16s([1.0, 2.0, 3.0, 4.0, f32::NEG_INFINITY, 6.0])),
    ] {
        let tensors = vec![tensor("v", dtype, &[6], bad.clone()), tensor("m", dtype, &[2, 3], bad)];
        let checkpoint = Checkpoint::in_memory(json!({}), tensors).unwrap();
        let message = checkpoint.vector("v", 6).unwrap_err().to_string();
        assert!(message.contains("<memory>: tensor \"v\": element [4] is"), "{message}");
        let message = checkpoint.matrix("m", 2, 3).unwrap_err().to_string();
        assert!(message.contains("<memory>: tensor \"m\": element [1, 1] is"), "{message}");
    }
}

/// Hidden and intermediate width of a layer, and whether it is stored `[E, in, out]`.
fn dense_layer(e: usize, hidden: usize, inter: usize, in_out: bool, dtype: Dtype) -> Checkpoint {
    let shape = |out: usize, input: usize| if in_out { [e, input, out] } else { [e, out, input] };
    let bytes = |count: usize| match dtype {
        Dtype::BF16 => bf16s(ramp(count).map(|i| i % 251.0)),
        Dtype::F16 => f16s(ramp(count).map(|i| i % 251.0)),
        _ => f32s(ramp(count).map(|i| i % 251.0)),
    };
    let tensors = vec![
        tensor(GATE_UP, dtype, &shape(2 * inter, hidden), bytes(e * 2 * inter * hidden)),
        tensor(DOWN, dtype, &shape(hidden, inter), bytes(e * hidden * inter)),
    ];
    Checkpoint::in_memory(json!({"model_type": "gpt_oss"}), tensors).unwrap()
}

#[test]
fn expert_stacks_come_out_as_out_in_whatever_their_shape() {
    // Non-square; square down_proj (gpt-oss: hidden = intermediate); square gate_up_proj; more than a tile and
    // not a multiple of one; more than one strip of input features.
    for (e, hidden, inter) in [(2, 3, 5), (3, 4, 4), (2, 6, 3), (2, 45, 70), (1, 70, 70), (1, 1100, 1024)] {
        for dtype in [Dtype::BF16, Dtype::F32, Dtype::F16] {
            for in_out in [true, false] {
                let checkpoint = dense_layer(e, hidden, inter, in_out, dtype);
                let case = format!("E {e} hidden {hidden} inter {inter} {dtype} in_out {in_out}");
                for (name, rows, cols) in [(GATE_UP, 2 * inter, hidden), (DOWN, hidden, inter)] {
                    checkpoint
                        .check(&[experts(GATE_UP, e, 2 * inter, hidden), experts(DOWN, e, hidden, inter)])
                        .unwrap();
                    let matrix = checkpoint.experts(name, e, rows, cols).unwrap();
                    assert_eq!((matrix.rows(), matrix.cols()), (e * rows, cols), "{case}");
                    for (i, value) in values(matrix).into_iter().enumerate() {
                        let (expert, row, col) = (i / (rows * cols), i / cols % rows, i % cols);
                        let stored = if in_out { (expert * cols + col) * rows + row } else { i };
                        assert_eq!(value, (stored % 251) as f32, "{case}: {name} [{expert}, {row}, {col}]");
                    }
                }
            }
        }
    }
}

#[test]
fn a_square_stack_without_its_partner_is_not_guessed() {
    let lonely = vec![tensor(DOWN, Dtype::F32, &[1, 4, 4], f32s(ramp(16)))];
    let checkpoint = Checkpoint::in_memory(json!({}), lonely).unwrap();
    let message = checkpoint.experts(DOWN, 1, 4, 4).unwrap_err().to_string();
    assert!(message.contains("down_proj\": orientation unknown"), "{message}");
}

#[test]
fn stacks_that_contradict_each_other_are_refused() {
    // gate_up_proj [E, in, out], down_proj [E, out, in]: one was transposed, the other forgotten.
    let tensors = vec![
        tensor(GATE_UP, Dtype::F32, &[1, 4, 6], f32s(ramp(24))),
        tensor(DOWN, Dtype::F32, &[1, 4, 3], f32s(ramp(12))),
    ];
    let checkpoint = Checkpoint::in_memory(json!({}), tensors).unwrap();
    let wants = [experts(GATE_UP, 1, 6, 4), experts(DOWN, 1, 4, 3)];
    let message = checkpoint.check(&wants).unwrap_err().to_string();
    assert!(message.contains("down_proj\" has shape [1, 4, 3], wanted [1, 3, 4]"), "{message}");
}

pub(crate) fn mxfp4_layer(scale: u8) -> Vec<MemoryTensor> {
    let codes = |count: usize| (0..count).map(|i| (i * 37 % 256) as u8).collect::<Vec<u8>>();
    let mut scales: Vec<u8> = (0..12).map(|i| 120 + i).collect();
    scales[7] = scale;
    vec![
        tensor(&format!("{GATE_UP}_blocks"), Dtype::U8, &[2, 3, 2, 16], codes(192)),
        tensor(&format!("{GATE_UP}_scales"), Dtype::U8, &[2, 3, 2], scales),
        tensor(&format!("{GATE_UP}_bias"), Dtype::BF16, &[2, 3], bf16s(ramp(6))),
        tensor("model.norm.weight", Dtype::F32, &[4], f32s(ramp(4))),
    ]
}

pub(crate) fn mxfp4_wants() -> Vec<Want> {
    vec![
        experts(GATE_UP, 2, 3, 64),
        want(&format!("{GATE_UP}_bias"), Shape::Vector { len: 6 }),
        want("model.norm.weight", Shape::Vector { len: 4 }),
    ]
}

#[test]
fn mxfp4_stays_packed_and_decodes_by_its_definition() {
    let tensors = mxfp4_layer(0);
    let (codes, scales) = (tensors[0].data.clone(), tensors[1].data.clone());
    let checkpoint = Checkpoint::in_memory(mxfp4_config(), tensors).unwrap();
    assert_eq!(checkpoint.format_name(), "mxfp4");
    assert_eq!(checkpoint.total_bytes(), 192 + 12 + 12 + 16);
    checkpoint.check(&mxfp4_wants()).unwrap();
    assert_eq!(checkpoint.vector(&format!("{GATE_UP}_bias"), 6).unwrap(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);

    let matrix = checkpoint.experts(GATE_UP, 2, 3, 64).unwrap();
    assert_eq!((matrix.rows(), matrix.cols()), (6, 64));
    assert_eq!(matrix.elements(), &Elements::Mxfp4 { codes: codes.clone(), scales: scales.clone() });
    // facts: byte b of block g holds in = 32g + 2b in its low nibble, 32g + 2b + 1 in its high one.
    const MAGNITUDE: [f64; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    for (i, value) in values(to_bf16(matrix)).into_iter().enumerate() {
        let byte = codes[i / 2];
        let code = if i % 2 == 0 { byte & 15 } else { byte >> 4 };
        let sign = if code & 8 == 0 { 1.0 } else { -1.0 };
        let wanted = sign * MAGNITUDE[usize::from(code & 7)] * 2_f64.powi(i32::from(scales[i / 32]) - 127);
        assert_eq!(f64::from(value), wanted, "element {i}");
    }
}

#[test]
fn a_nan_scale_is_named_by_place() {
    let checkpoint = Checkpoint::in_memory(mxfp4_config(), mxfp4_layer(255)).unwrap();
    let message = checkpoint.experts(GATE_UP, 2, 3, 64).unwrap_err().to_string();
    assert!(message.contains("gate_up_proj_scales\": scale [1, 0, 1] is NaN"), "{message}");
}

#[test]
fn every_disagreement_is_reported_with_file_and_tensor() {
    type Change = fn(&mut Vec<MemoryTensor>);
    let cases: [(&str, Change, &str); 10] = [
        (
            "missing vector",
            |t| drop(t.pop()),
            "\"model.norm.weight\" is missing, wanted [4] of BF16 or F16 or F32",
        ),
        ("missing scales", |t| drop(t.remove(1)), "gate_up_proj_scales\" is missing, wanted [2, 3, 2] of U8"),
        ("missing bias", |t| drop(t.remove(2)), "gate_up_proj_bias\" is missing, wanted [2, 3]"),
        (
            "extra",
            |t| t.push(tensor("lm_head.weight", Dtype::F32, &[1], f32s([0.0]))),
            "\"lm_head.weight\" is not part",
        ),
        ("renamed", |t| t[3].name = "norm.weight".to_owned(), "\"norm.weight\" is not part of the model"),
        (
            "mis-shaped vector",
            |t| t[3].shape = vec![2, 2],
            "\"model.norm.weight\" has shape [2, 2], wanted [4]",
        ),
        ("turned bias", |t| t[2].shape = vec![3, 2], "gate_up_proj_bias\" has shape [3, 2], wanted [2, 3]"),
        ("flat blocks", |t| t[0].shape = vec![2, 3, 32], "has shape [2, 3, 32], wanted [2, 3, 2, 16]"),
        ("mis-typed", |t| t[0].dtype = Dtype::I8, "gate_up_proj_blocks\" has dtype I8, wanted U8"),
        (
            "mis-typed vector",
            |t| t[3].dtype = Dtype::I32,
            "\"model.norm.weight\" has dtype I32, wanted BF16 or",
        ),
    ];
    for (case, change, wanted) in cases {
        let mut tensors = mxfp4_layer(127);
        change(&mut tensors);
        // One more good stack, so that the format is recognised without the first.
        tensors.push(tensor("x_blocks", Dtype::U8, &[1, 1, 1, 16], vec![0; 16]));
        tensors.push(tensor("x_scales", Dtype::U8, &[1, 1, 1], vec![0]));
        let checkpoint = Checkpoint::in_memory(mxfp4_config(), tensors).unwrap();
        let mut wants = mxfp4_wants();
        wants.push(experts("x", 1, 1, 32));
        let message = checkpoint.check(&wants).unwrap_err().to_string();
        assert!(message.contains("<memory>: tensor ") && message.contains(wanted), "{case}: {message}");
    }
}

#[test]
fn a_width_that_blocks_cannot_hold_is_said_so() {
    let checkpoint = Checkpoint::in_memory(mxfp4_config(), mxfp4_layer(0)).unwrap();
    let message = checkpoint.experts(GATE_UP, 2, 3, 70).unwrap_err().to_string();
    assert!(message.contains("70 input features are not a multiple of 32"), "{message}");
}

#[test]
fn many_problems_are_counted_and_the_first_are_shown() {
    let tensors = vec![tensor("extra", Dtype::F32, &[1], f32s([0.0]))];
    let checkpoint = Checkpoint::in_memory(json!({}), tensors).unwrap();
    let wants: Vec<Want> =
        (0..1000).map(|i| want(&format!("w{i}"), Shape::Matrix { rows: 1, cols: 1 })).collect();
    let error = checkpoint.check(&wants).unwrap_err();
    let message = error.to_string();
    assert!(
        message.starts_with("1001 tensors do not fit the model:\n  <memory>: tensor \"w0\" is missing"),
        "{message}"
    );
    assert!(message.ends_with("and 995 more"), "{message}");
    let CheckpointError::Mismatch { problems, total } = error else { panic!("{error:?}") };
    assert_eq!((problems.len(), total), (64, 1001));
    assert_eq!(problems[0].flaw, Flaw::Missing("[1, 1] of BF16 or F16 or F32".to_owned()));
}

#[test]
fn absurd_wants_are_mismatches_not_allocations() {
    let checkpoint = dense_layer(1, 4, 4, true, Dtype::F32);
    assert!(checkpoint.experts(GATE_UP, usize::MAX, usize::MAX, usize::MAX).is_err());
    assert!(checkpoint.vector(GATE_UP, usize::MAX).is_err());
    let packed = Checkpoint::in_memory(mxfp4_config(), mxfp4_layer(0)).unwrap();
    assert!(packed.experts(GATE_UP, usize::MAX, usize::MAX, usize::MAX / 32 * 32).is_err());
}

#[test]
fn memory_tensors_obey_the_rules_of_files() {
    let short = vec![tensor("a", Dtype::F32, &[2], vec![0; 7])];
    let message = Checkpoint::in_memory(json!({}), short).unwrap_err().to_string();
    assert!(message.contains("tensor \"a\": shape [2] of F32 does not take 7 bytes"), "{message}");
    let twice = vec![tensor("a", Dtype::F32, &[1], vec![0; 4]); 2];
    let message = Checkpoint::in_memory(json!({}), twice).unwrap_err().to_string();
    assert!(message.contains("tensor \"a\": is stored in <memory> too"), "{message}");
    let huge = vec![tensor("a", Dtype::F32, &[usize::MAX, 2], vec![0; 8])];
    assert!(Checkpoint::in_memory(json!({}), huge).is_err());
}
