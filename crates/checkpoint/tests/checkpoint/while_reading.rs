//! Experts that are quantised while they are read, against what a conversion writes.

use std::collections::BTreeMap;

use crate::support::{bf16s, dir, f32s, tensor};
use ctxserve_checkpoint::{Checkpoint, Conversion, Dtype, MemoryTensor, Shape, Target, Want, convert};
use ctxserve_core::Encoding;
use serde_json::json;

const DENSE: (&str, &[u8]) = ("model.safetensors", include_bytes!("../data/convert.safetensors"));
const EXPERTS: &str = "model.layers.0.mlp.experts.";

fn want(name: &str, experts: usize, rows: usize, cols: usize) -> Want {
    Want { name: format!("{EXPERTS}{name}"), shape: Shape::Experts { experts, rows, cols } }
}

fn experts(in_f32: bool, [experts, hidden, inner]: [usize; 3]) -> Vec<MemoryTensor> {
    let stack = |name: &str, rows: usize, cols: usize| {
        let values = (0..experts * rows * cols).map(|i| ((i * 7919) % 1009) as f32 / 300.0 - 1.5);
        let shape = [experts, cols, rows];
        let name = format!("{EXPERTS}{name}");
        if in_f32 {
            tensor(&name, Dtype::F32, &shape, f32s(values))
        } else {
            tensor(&name, Dtype::BF16, &shape, bf16s(values))
        }
    };
    vec![stack("gate_up_proj", 2 * inner, hidden), stack("down_proj", hidden, inner)]
}

/// Everything that a conversion of the same checkpoint holds.
fn check(source: impl Fn() -> Checkpoint, wants: &[Want]) {
    let root = tempfile::tempdir().unwrap();
    let to = root.path().join("out");
    let conversion = Conversion {
        source: &source(),
        wants,
        target: Target::Mxfp4,
        to: &to,
        shard_bytes: u64::MAX,
        inputs: &BTreeMap::new(),
    };
    convert(&conversion, &mut |_| ()).unwrap();
    let made = Checkpoint::open(&to).unwrap();
    let plain = source();
    let found = source().with_experts_in_mxfp4(wants).unwrap();
    found.check(wants).unwrap();
    assert_eq!(found.format_name(), plain.format_name());
    let in_bf16 =
        |checkpoint: &Checkpoint| checkpoint.rows(&wants[0], 0..1).unwrap().encoding() == Encoding::Bf16;
    if in_bf16(&plain) {
        assert_eq!(found.total_bytes(), made.total_bytes());
    }
    for want in wants {
        let one = std::slice::from_ref(want);
        match want.shape {
            Shape::Experts { experts, rows, cols } => {
                assert_eq!(found.stored_bytes(one).unwrap(), made.stored_bytes(one).unwrap(), "{want:?}");
                for range in [0..experts, 1..experts, 0..1, 1..1] {
                    let (is, wanted) = (found.rows(want, range.clone()), made.rows(want, range));
                    assert_eq!(is.unwrap(), wanted.unwrap(), "{want:?}");
                }
                let whole = found.experts(&want.name, experts, rows, cols).unwrap();
                assert_eq!(whole.encoding(), Encoding::Mxfp4);
                assert!(found.rows(want, 0..experts + 1).is_err());
            }
            Shape::Matrix { rows, .. } => {
                // What is no expert stays as it was.
                assert_eq!(found.rows(want, 0..rows).unwrap(), plain.rows(want, 0..rows).unwrap());
            }
            Shape::Vector { len } => {
                assert_eq!(found.vector(&want.name, len).unwrap(), plain.vector(&want.name, len).unwrap());
            }
        }
    }
}

#[test]
fn experts_are_quantised_to_the_bytes_of_a_conversion() {
    let from = dir(&json!({"model_type": "gpt_oss"}), &[DENSE]);
    let wants = [want("gate_up_proj", 2, 64, 64), want("down_proj", 2, 64, 32)];
    check(|| Checkpoint::open(from.path()).unwrap(), &wants);
    for in_f32 in [false, true] {
        let wants = [
            want("gate_up_proj", 5, 192, 64),
            want("down_proj", 5, 64, 96),
            Want { name: "lm_head.weight".to_owned(), shape: Shape::Matrix { rows: 3, cols: 33 } },
            Want { name: "model.norm.weight".to_owned(), shape: Shape::Vector { len: 3 } },
        ];
        let source = || {
            let mut tensors = experts(in_f32, [5, 64, 96]);
            tensors.push(tensor("lm_head.weight", Dtype::BF16, &[3, 33], bf16s((0..99).map(|i| i as f32))));
            tensors.push(tensor("model.norm.weight", Dtype::BF16, &[3], bf16s([1.0, 2.0, 0.5])));
            Checkpoint::in_memory(json!({}), tensors).unwrap()
        };
        check(source, &wants);
    }
}

#[test]
fn what_cannot_be_quantised_is_said() {
    let open = |sizes| Checkpoint::in_memory(json!({}), experts(false, sizes)).unwrap();
    let error = |checkpoint: Checkpoint, wants: &[Want]| {
        checkpoint.with_experts_in_mxfp4(wants).unwrap_err().to_string()
    };
    let wants = [want("gate_up_proj", 2, 80, 64), want("down_proj", 2, 64, 40)];
    assert!(error(open([2, 64, 40]), &wants).contains("40 inputs are not whole blocks of 32"));
    let vector = Want { name: "model.norm.weight".to_owned(), shape: Shape::Vector { len: 3 } };
    assert!(error(open([2, 64, 32]), &[vector]).contains("no expert stacks"));
    // What is not finite is found while it is read, in the file and tensor that have it.
    let mut tensors = experts(false, [2, 64, 32]);
    let end = tensors[0].data.len();
    tensors[0].data[end - 2..].copy_from_slice(&half::bf16::NAN.to_le_bytes());
    let wants = [want("gate_up_proj", 2, 64, 64), want("down_proj", 2, 64, 32)];
    let checkpoint =
        Checkpoint::in_memory(json!({}), tensors).unwrap().with_experts_in_mxfp4(&wants).unwrap();
    let text = checkpoint.rows(&wants[0], 0..2).unwrap_err().to_string();
    assert!(text.contains("gate_up_proj"), "{text}");
}
