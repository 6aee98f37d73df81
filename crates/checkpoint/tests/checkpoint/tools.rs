//! Checkpoints written by the tools whose formats are read (`../data/make_formats.py`), against what those tools decode.

use std::path::Path;

use crate::support::{decoded, dir};
use ctxserve_checkpoint::{Checkpoint, Shape, Want};
use ctxserve_core::{Elements, Encoding};
use safetensors::SafeTensors;
use serde_json::{Value, json};

/// The reference's logical tensors: name, shape, values.
fn reference(bytes: &[u8]) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let tensors = SafeTensors::deserialize(bytes).unwrap();
    let mut found: Vec<_> = tensors
        .tensors()
        .into_iter()
        .filter(|(name, _)| !name.ends_with(".source"))
        .map(|(name, view)| {
            let values = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            (name, view.shape().to_vec(), values.collect())
        })
        .collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

fn wants(reference: &[(String, Vec<usize>, Vec<f32>)]) -> Vec<Want> {
    let of = |name: &str, shape: &[usize]| match *shape {
        [experts, rows] if name.ends_with("_bias") => Shape::Vector { len: experts * rows },
        [len] => Shape::Vector { len },
        [rows, cols] => Shape::Matrix { rows, cols },
        [experts, rows, cols] => Shape::Experts { experts, rows, cols },
        _ => panic!("{name}"),
    };
    reference.iter().map(|(name, shape, _)| Want { name: name.clone(), shape: of(name, shape) }).collect()
}

/// Tools multiply scales in another order.
const LAST_BIT: f32 = 1e-6;
/// compressed-tensors decodes in bfloat16.
const BF16: f32 = 1.0 / 128.0;

/// Equal but for `tolerance`, a share of the larger of the element and a thousandth of the tensor's largest.
fn close(found: &[f32], wanted: &[f32], tolerance: f32, name: &str) {
    assert_eq!(found.len(), wanted.len(), "{name}");
    let largest = wanted.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
    for (i, (found, wanted)) in found.iter().zip(wanted).enumerate() {
        let size = wanted.abs().max(largest / 1000.0);
        assert!((found - wanted).abs() <= size * tolerance, "{name}, element {i}: {found}, not {wanted}");
    }
}

fn compare(
    dir: &Path,
    format: &str,
    reference: &[(String, Vec<usize>, Vec<f32>)],
    tolerance: f32,
) -> Checkpoint {
    let checkpoint = Checkpoint::open(dir).unwrap();
    assert_eq!(checkpoint.format_name(), format);
    let wants = wants(reference);
    checkpoint.check(&wants).unwrap();
    assert!(checkpoint.stored_bytes(&wants).unwrap() <= checkpoint.total_bytes());
    for (want, (name, _, values)) in wants.iter().zip(reference) {
        let (units, whole) = match want.shape {
            Shape::Vector { len } => {
                close(&checkpoint.vector(name, len).unwrap(), values, tolerance, name);
                continue;
            }
            Shape::Matrix { rows, cols } => (rows, checkpoint.matrix(name, rows, cols).unwrap()),
            Shape::Experts { experts, rows, cols } => {
                (experts, checkpoint.experts(name, experts, rows, cols).unwrap())
            }
        };
        close(&decoded(&whole), values, tolerance, name);
        // One at a time gives the same.
        let pieces: Vec<f32> =
            (0..units).flat_map(|at| decoded(&checkpoint.rows(want, at..at + 1).unwrap())).collect();
        assert_eq!(pieces, decoded(&whole), "{name} in pieces");
        for range in [units..units + 1, 0..usize::MAX] {
            assert!(checkpoint.rows(want, range).is_err());
        }
    }
    checkpoint
}

fn nvfp4(checkpoint: &Checkpoint, input: f32) {
    let matrix = checkpoint.matrix("model.layers.0.self_attn.q_proj.weight", 6, 64).unwrap();
    let Elements::Nvfp4 { runs, .. } = matrix.elements() else { panic!("{:?}", matrix.encoding()) };
    assert_eq!((runs.len(), runs[0].rows, runs[0].input), (1, 6, Some(input)));
    let table = checkpoint.matrix("model.embed_tokens.weight", 5, 64).unwrap();
    assert_eq!(table.encoding(), Encoding::Bf16);
}

#[test]
fn modelopt_by_either_spelling_and_from_either_file() {
    const MODEL: (&str, &[u8]) = ("model.safetensors", include_bytes!("../data/modelopt.safetensors"));
    let reference = reference(include_bytes!("../data/modelopt.values.safetensors"));
    let separate = |extra: Value| {
        let mut file = json!({"producer": {"name": "modelopt"}, "quantization": {
            "quant_algo": "NVFP4", "kv_cache_quant_algo": null, "group_size": 16, "exclude_modules": ["lm_head"]}});
        file.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        file.to_string().into_bytes()
    };
    let section = json!({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"],
        "kv_cache_scheme": {"num_bits": 8, "type": "float"}, "config_groups": {"group_0": {
            "input_activations": {"dynamic": false, "num_bits": 4, "type": "float", "group_size": 16},
            "weights": {"dynamic": false, "num_bits": 4, "type": "float", "group_size": 16},
            "targets": ["Linear"]}}});
    let nested =
        json!({"quant_method": "modelopt_fp4", "quantization": {"quant_algo": "NVFP4", "group_size": 16}});
    let both = separate(json!({"quant_method": "modelopt_fp4"}));
    let cases: [(Value, Option<Vec<u8>>); 5] = [
        (json!({}), Some(separate(json!({})))),
        (json!({}), Some(both.clone())),
        (json!({"quantization_config": section}), None),
        (json!({"quantization_config": section}), Some(both)),
        (json!({"quantization_config": nested}), None),
    ];
    for (config, separate) in cases {
        let mut files = vec![MODEL];
        files.extend(separate.as_deref().map(|bytes| ("hf_quant_config.json", bytes)));
        let dir = dir(&config, &files);
        nvfp4(&compare(dir.path(), "nvfp4", &reference, LAST_BIT), 0.0125);
    }
}

#[test]
fn compressed_tensors_keeps_reciprocals() {
    let reference = reference(include_bytes!("../data/compressed.values.safetensors"));
    let config = json!({"quantization_config": {"quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized", "ignore": ["lm_head"], "transform_config": {}, "sparsity_config": {"format": "dense", "global_sparsity": 0.1},
        "kv_cache_scheme": null, "config_groups": {"group_0": {"format": "nvfp4-pack-quantized",
            "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
                "symmetric": true},
            "input_activations": null, "targets": ["Linear"]}}}});
    let dir = dir(&config, &[("model.safetensors", include_bytes!("../data/compressed.safetensors"))]);
    nvfp4(&compare(dir.path(), "nvfp4", &reference, BF16), 1.0 / 80.0);
}

#[test]
fn mlx_mixes_modes_and_splits_experts() {
    let reference = reference(include_bytes!("../data/mlx.values.safetensors"));
    let eight = json!({"group_size": 32, "bits": 8});
    let micro = json!({"group_size": 32, "bits": 4, "mode": "mxfp4"});
    let mut section = json!({"group_size": 64, "bits": 4, "model.layers.0.self_attn.o_proj": false,
        "model.layers.0.self_attn.q_proj": micro, "model.layers.0.mlp.router": eight,
        "model.layers.0.mlp.experts.down_proj": eight});
    for name in ["gate_proj", "up_proj", "down_proj"] {
        section[format!("model.layers.1.mlp.experts.{name}")] = micro.clone();
    }
    let config = json!({"quantization": section, "quantization_config": section});
    let files: &[(&str, &[u8])] = &[("model.safetensors", include_bytes!("../data/mlx.safetensors"))];
    let dir = dir(&config, files);
    let checkpoint = compare(dir.path(), "mlx", &reference, 1e-4);
    let encoding = |matrix: Result<ctxserve_core::Matrix, _>| matrix.unwrap().encoding();
    assert_eq!(encoding(checkpoint.matrix("model.embed_tokens.weight", 7, 64)), Encoding::Affine);
    assert_eq!(encoding(checkpoint.matrix("model.layers.0.self_attn.o_proj.weight", 64, 6)), Encoding::Bf16);
    for (layer, wanted) in [(0, Encoding::Affine), (1, Encoding::Mxfp4)] {
        let name = format!("model.layers.{layer}.mlp.experts.gate_up_proj");
        assert_eq!(encoding(checkpoint.experts(&name, 2, 32, 64)), wanted);
    }
}
