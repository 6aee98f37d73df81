//! One layer packed, and the same layer as Hugging Face transformers dequantises and lays it out
//! (`../data/make.py`): nibble order, scales and orientation of both formats against an outside authority.

use crate::support::{dir, mxfp4_config};
use ctxserve_checkpoint::{Checkpoint, Shape, Want, to_bf16};
use ctxserve_core::Encoding;
use serde_json::json;

#[test]
fn packed_and_dense_hold_the_same_weights() {
    let packed = dir(&mxfp4_config(), &[("model.safetensors", include_bytes!("../data/packed.safetensors"))]);
    let dense = dir(&json!({}), &[("model.safetensors", include_bytes!("../data/dense.safetensors"))]);
    let (packed, dense) = (Checkpoint::open(packed.path()).unwrap(), Checkpoint::open(dense.path()).unwrap());
    let stacks = [("gate_up_proj", 128, 64), ("down_proj", 64, 64)];
    let wants = stacks.map(|(name, rows, cols)| Want {
        name: format!("model.layers.0.mlp.experts.{name}"),
        shape: Shape::Experts { experts: 3, rows, cols },
    });
    packed.check(&wants).unwrap();
    dense.check(&wants).unwrap();
    for (want, (_, rows, cols)) in wants.iter().zip(stacks) {
        let ours = packed.experts(&want.name, 3, rows, cols).unwrap();
        let theirs = dense.experts(&want.name, 3, rows, cols).unwrap();
        assert_eq!((ours.encoding(), theirs.encoding()), (Encoding::Mxfp4, Encoding::Bf16));
        assert!(to_bf16(ours) == theirs, "{}", want.name);
    }
}
