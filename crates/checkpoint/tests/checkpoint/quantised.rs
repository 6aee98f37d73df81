//! NVFP4 and MLX checkpoints that contradict themselves: each message names the tensor and what is wrong with it.

use crate::support::{bf16s, decoded, f32s, tensor};
use ctxserve_checkpoint::{Checkpoint, Dtype, MemoryTensor, Shape, Want};
use serde_json::{Value, json};

const Q: &str = "model.layers.0.self_attn.q_proj";

type Change = fn(&mut Vec<MemoryTensor>, &mut Value);

/// A checkpoint changed a little, and what opening, checking or reading it says.
fn complaint(base: fn() -> (Vec<MemoryTensor>, Value), wants: &[Want], change: Change) -> Option<String> {
    let (mut tensors, mut config) = base();
    change(&mut tensors, &mut config);
    let read = || {
        let checkpoint = Checkpoint::in_memory(config, tensors)?;
        checkpoint.check(wants)?;
        for want in wants {
            match want.shape {
                Shape::Vector { len } => drop(checkpoint.vector(&want.name, len)?),
                Shape::Matrix { rows, .. } => drop(checkpoint.rows(want, 0..rows)?),
                Shape::Experts { experts, .. } => drop(checkpoint.rows(want, 0..experts)?),
            }
        }
        Ok::<_, ctxserve_checkpoint::CheckpointError>(())
    };
    read().err().map(|error| error.to_string())
}

fn each_is_refused(
    base: fn() -> (Vec<MemoryTensor>, Value),
    wants: &[Want],
    cases: &[(&str, Change, &[&str])],
) {
    assert_eq!(complaint(base, wants, |_, _| ()), None);
    for (case, change, wanted) in cases {
        let message = complaint(base, wants, *change).unwrap_or_else(|| panic!("{case}: accepted"));
        assert!(message.contains("<memory>"), "{case}: {message}");
        for part in *wanted {
            assert!(message.contains(part), "{case}: {message:?} lacks {part:?}");
        }
        assert!(message.len() < 1000, "{case}: {} bytes of message", message.len());
    }
}

fn find<'a>(tensors: &'a mut [MemoryTensor], name: &str) -> &'a mut MemoryTensor {
    tensors.iter_mut().find(|tensor| tensor.name.ends_with(name)).unwrap()
}

fn remove(tensors: &mut Vec<MemoryTensor>, name: &str) {
    let before = tensors.len();
    tensors.retain(|tensor| !tensor.name.ends_with(name));
    assert_eq!(tensors.len(), before - 1, "{name}");
}

fn matrix(name: &str, rows: usize, cols: usize) -> Want {
    Want { name: name.to_owned(), shape: Shape::Matrix { rows, cols } }
}

pub(crate) fn modelopt() -> (Vec<MemoryTensor>, Value) {
    let tensors = vec![
        tensor(&format!("{Q}.weight"), Dtype::U8, &[2, 16], vec![0x21; 32]),
        tensor(&format!("{Q}.weight_scale"), Dtype::F8_E4M3, &[2, 2], vec![0x38; 4]),
        tensor(&format!("{Q}.weight_scale_2"), Dtype::F32, &[], f32s([0.5])),
        tensor(&format!("{Q}.input_scale"), Dtype::F32, &[], f32s([0.25])),
        tensor("model.embed_tokens.weight", Dtype::BF16, &[2, 32], bf16s([1.0; 64])),
    ];
    let config = json!({"quantization_config":
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head"]}});
    (tensors, config)
}

pub(crate) fn compressed() -> (Vec<MemoryTensor>, Value) {
    let (mut tensors, _) = modelopt();
    for (from, to) in [
        (".weight_scale_2", ".weight_global_scale"),
        (".input_scale", ".input_global_scale"),
        ("q_proj.weight", ".weight_packed"),
    ] {
        find(&mut tensors, from).name = format!("{Q}{to}");
    }
    let config = json!({"quantization_config":
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": ["lm_head"]}});
    (tensors, config)
}

pub(crate) fn nvfp4_wants() -> Vec<Want> {
    vec![matrix(&format!("{Q}.weight"), 2, 32), matrix("model.embed_tokens.weight", 2, 32)]
}

#[test]
fn modelopt_that_contradicts_itself_is_refused() {
    let cases: &[(&str, Change, &[&str])] = &[
        (
            "no scales",
            |t, _| remove(t, ".weight_scale"),
            &["q_proj.weight_scale\" is missing", "[2, 2] of F8_E4M3"],
        ),
        (
            "no factor",
            |t, _| remove(t, ".weight_scale_2"),
            &["q_proj.weight_scale_2\" is missing", "[] or [1]"],
        ),
        ("no codes", |t, _| remove(t, "q_proj.weight"), &["q_proj.weight\" is missing", "[2, 16] of U8"]),
        (
            "NaN scale",
            |t, _| find(t, ".weight_scale").data[3] = 0x7f,
            &["q_proj.weight_scale\": scale [1, 1] is NaN"],
        ),
        (
            "negative scale",
            |t, _| find(t, ".weight_scale").data[2] = 0xb8,
            &["q_proj.weight_scale\": scale [1, 0] is -1 (byte 184)"],
        ),
        (
            "zero factor",
            |t, _| find(t, ".weight_scale_2").data = f32s([0.0]),
            &["q_proj.weight_scale_2\": is 0, and a factor must be positive"],
        ),
        (
            "negative factor",
            |t, _| find(t, ".weight_scale_2").data = f32s([-1.0]),
            &["weight_scale_2\": is -1"],
        ),
        (
            "infinite factor",
            |t, _| find(t, ".weight_scale_2").data = f32s([f32::INFINITY]),
            &["_2\": element [] is inf"],
        ),
        (
            "NaN input",
            |t, _| find(t, ".input_scale").data = f32s([f32::NAN]),
            &["input_scale\": element [] is NaN"],
        ),
        ("zero input", |t, _| find(t, ".input_scale").data = f32s([0.0]), &["input_scale\": is 0"]),
        (
            "wide scales",
            |t, _| {
                *find(t, ".weight_scale") =
                    tensor(&format!("{Q}.weight_scale"), Dtype::F8_E4M3, &[2, 4], vec![0x38; 8]);
            },
            &["q_proj.weight_scale\" has shape [2, 4], wanted [2, 2]"],
        ),
        (
            "two factors",
            |t, _| {
                *find(t, ".weight_scale_2") =
                    tensor(&format!("{Q}.weight_scale_2"), Dtype::F32, &[2], f32s([1.0; 2]));
            },
            &["weight_scale_2\" has shape [2], wanted [] or [1]"],
        ),
        (
            "bytes for scales",
            |t, _| find(t, ".weight_scale").dtype = Dtype::U8,
            &["dtype U8, wanted F8_E4M3"],
        ),
        (
            "signed codes",
            |t, _| find(t, "q_proj.weight").dtype = Dtype::I8,
            &["q_proj.weight\" has dtype I8, wanted U8"],
        ),
        (
            "excluded and quantised",
            |_, c| c["quantization_config"]["ignore"] = json!([Q]),
            &[
                "q_proj.weight_scale\": is there, but the configuration says that this module is not quantised",
            ],
        ),
        (
            "excluded by pattern",
            |_, c| c["quantization_config"]["ignore"] = json!(["model.layers.0.*"]),
            &["q_proj.weight_scale\": is there"],
        ),
        (
            "neither excluded nor quantised",
            |t, _| {
                t.push(tensor(
                    "model.layers.0.self_attn.k_proj.weight",
                    Dtype::BF16,
                    &[1, 32],
                    bf16s([0.0; 32]),
                ));
            },
            &["k_proj.weight\": has no weight_scale beside it, but the configuration does not exclude it"],
        ),
        (
            "nothing quantised",
            |t, _| t.retain(|t| !t.name.starts_with(Q)),
            &["declares modelopt NVFP4, but no tensor here is named *.weight_scale"],
        ),
        (
            "another group",
            |_, c| c["quantization_config"]["group_size"] = json!(32),
            &["config.json: group_size is 32, and NVFP4 has 16"],
        ),
        (
            "another group inside",
            |_, c| c["quantization_config"]["config_groups"] = json!({"g": {"weights": {"num_bits": 8}}}),
            &["config_groups.g.weights: num_bits is 8, and NVFP4 has 4"],
        ),
        (
            "integers",
            |_, c| c["quantization_config"]["config_groups"] = json!({"g": {"weights": {"type": "int"}}}),
            &["type is \"int\", and NVFP4 is float"],
        ),
        (
            "a list that is none",
            |_, c| c["quantization_config"]["ignore"] = json!("lm_head"),
            &["config.json: ignore is not a list of names"],
        ),
    ];
    each_is_refused(modelopt, &nvfp4_wants(), cases);
    let odd = [matrix(&format!("{Q}.weight"), 2, 40), matrix("model.embed_tokens.weight", 2, 32)];
    let message = complaint(modelopt, &odd, |_, _| ()).unwrap();
    assert!(message.contains("40 input features are not a multiple of 16"), "{message}");
}

#[test]
fn compressed_tensors_that_contradict_themselves_are_refused() {
    let cases: &[(&str, Change, &[&str])] = &[
        ("no factor", |t, _| remove(t, ".weight_global_scale"), &["weight_global_scale\" is missing"]),
        (
            "infinite reciprocal",
            |t, _| find(t, ".weight_global_scale").data = f32s([1e-44]),
            &["q_proj.weight_global_scale\": is 0.00000000000000000000000000000000000000000001"],
        ),
        ("zero", |t, _| find(t, ".weight_global_scale").data = f32s([0.0]), &["weight_global_scale\": is 0"]),
        (
            "negative",
            |t, _| find(t, ".input_global_scale").data = f32s([-2.0]),
            &["input_global_scale\": is -2"],
        ),
        (
            "rotated",
            |_, c| {
                c["quantization_config"]["transform_config"] =
                    json!({"config_groups": {"u": {"type": "hadamard"}}});
            },
            &["config.json: transform_config is not supported"],
        ),
        (
            "excluded and quantised",
            |_, c| c["quantization_config"]["ignore"] = json!([Q]),
            &["q_proj.weight_", "\": is there, but the configuration says"],
        ),
    ];
    each_is_refused(compressed, &nvfp4_wants(), cases);
}

#[test]
fn reciprocals_are_turned_and_inputs_may_be_left_out() {
    let (tensors, config) = compressed();
    let checkpoint = Checkpoint::in_memory(config, tensors).unwrap();
    let found = decoded(&checkpoint.matrix(&format!("{Q}.weight"), 2, 32).unwrap());
    // Codes 1 and 2 are 0.5 and 1, the block scale is 1, the factor 1 / 0.5.
    assert!(found.chunks(2).all(|pair| pair == [1.0, 2.0]), "{found:?}");
    assert_eq!(complaint(modelopt, &nvfp4_wants(), |t, _| remove(t, ".input_scale")), None);
    // What is said about keys and values is of no use here, and no mistake.
    let scales = |t: &mut Vec<MemoryTensor>, _: &mut Value| {
        t.push(tensor("model.layers.0.self_attn.k_proj.k_scale", Dtype::F32, &[], f32s([1.0])));
    };
    assert_eq!(complaint(modelopt, &nvfp4_wants(), scales), None);
    // Lists in a language that is not read say nothing against a module in floats.
    let by_regex = |t: &mut Vec<MemoryTensor>, c: &mut Value| {
        c["quantization_config"]["ignore"] = json!(["re:.*embed.*"]);
        remove(t, "embed_tokens.weight");
        t.push(tensor("model.embed_tokens.weight", Dtype::F32, &[2, 32], f32s([1.0; 64])));
    };
    assert_eq!(complaint(compressed, &nvfp4_wants(), by_regex), None);
}

const EXPERTS: &str = "model.layers.0.mlp.experts.";

/// A router in affine codes, experts in two halves, a matrix in MXFP4.
pub(crate) fn mlx() -> (Vec<MemoryTensor>, Value) {
    let mut tensors = vec![
        tensor("model.layers.0.mlp.router.weight", Dtype::U32, &[2, 8], vec![0x11; 64]),
        tensor("model.layers.0.mlp.router.scales", Dtype::BF16, &[2, 1], bf16s([-0.5; 2])),
        tensor("model.layers.0.mlp.router.biases", Dtype::BF16, &[2, 1], bf16s([1.0; 2])),
        tensor(&format!("{Q}.weight"), Dtype::U32, &[3, 4], vec![0x21; 48]),
        tensor(&format!("{Q}.scales"), Dtype::U8, &[3, 1], vec![127; 3]),
    ];
    for half in ["gate_proj", "up_proj"] {
        let name = |leaf: &str| format!("{EXPERTS}{half}.{leaf}");
        tensors.push(tensor(&name("weight"), Dtype::U32, &[2, 3, 8], vec![0x42; 192]));
        tensors.push(tensor(&name("scales"), Dtype::F16, &[2, 3, 1], crate::support::f16s([1.0; 6])));
        tensors.push(tensor(&name("biases"), Dtype::F32, &[2, 3, 1], f32s([0.0; 6])));
        tensors.push(tensor(&name("bias"), Dtype::BF16, &[2, 3], bf16s([3.0; 6])));
    }
    let config = json!({"quantization": {"group_size": 64, "bits": 4,
        Q: {"group_size": 32, "bits": 4, "mode": "mxfp4"}}});
    (tensors, config)
}

pub(crate) fn mlx_wants() -> Vec<Want> {
    vec![
        matrix("model.layers.0.mlp.router.weight", 2, 64),
        matrix(&format!("{Q}.weight"), 3, 32),
        Want {
            name: format!("{EXPERTS}gate_up_proj"),
            shape: Shape::Experts { experts: 2, rows: 6, cols: 64 },
        },
        Want { name: format!("{EXPERTS}gate_up_proj_bias"), shape: Shape::Vector { len: 12 } },
    ]
}

#[test]
fn mlx_that_contradicts_itself_is_refused() {
    let cases: &[(&str, Change, &[&str])] = &[
        (
            "no offsets",
            |t, _| remove(t, "router.biases"),
            &["router.biases\" is missing, wanted [2, 1] of BF16"],
        ),
        (
            "no codes",
            |t, _| remove(t, "router.weight"),
            &["router.weight\" is missing, wanted [2, 8] of U32"],
        ),
        (
            "half a stack",
            |t, _| remove(t, "up_proj.weight"),
            &["up_proj.weight\" is missing, wanted [2, 3, 8]"],
        ),
        (
            "half a bias",
            |t, _| remove(t, "up_proj.bias"),
            &["up_proj.bias\" is missing, wanted [2, 3] of BF16"],
        ),
        (
            "turned bias",
            |t, _| find(t, "gate_proj.bias").shape = vec![3, 2],
            &["gate_proj.bias\" has shape [3, 2], wanted [2, 3]"],
        ),
        (
            "bytes",
            |t, _| find(t, "router.weight").dtype = Dtype::F32,
            &["router.weight\" has dtype F32, wanted U32"],
        ),
        (
            "NaN scale",
            |t, _| find(t, "q_proj.scales").data[1] = 255,
            &["q_proj.scales\": scale [1, 0] is NaN"],
        ),
        (
            "infinite scale",
            |t, _| find(t, "router.scales").data = bf16s([1.0, f32::INFINITY]),
            &["router.scales\": element [1, 0] is inf"],
        ),
        (
            "NaN offset",
            |t, _| find(t, "router.biases").data = bf16s([f32::NAN, 0.0]),
            &["router.biases\": element [0, 0]"],
        ),
        (
            "another group",
            |_, c| c["quantization"]["group_size"] = json!(32),
            &["router.scales\" has shape [2, 1], wanted [2, 2]"],
        ),
        (
            "another width",
            |_, c| c["quantization"]["bits"] = json!(8),
            &["router.weight\" has shape [2, 8], wanted [2, 16]"],
        ),
        (
            "three bits",
            |_, c| c["quantization"]["bits"] = json!(3),
            &["config.json: quantization: 3 bits in groups of 64"],
        ),
        (
            "negative bits",
            |_, c| c["quantization"]["bits"] = json!(-4),
            &["config.json: quantization: bits is -4"],
        ),
        ("no group", |_, c| c["quantization"]["group_size"] = json!(0), &["4 bits in groups of 0 are not"]),
        (
            "six bits somewhere",
            |_, c| c["quantization"]["lm_head"] = json!({"group_size": 64, "bits": 6}),
            &["quantization of \"lm_head\": 6 bits"],
        ),
        (
            "another mode somewhere",
            |_, c| c["quantization"][Q] = json!({"mode": "mxfp8"}),
            &["q_proj\": mode \"mxfp8\" is not supported"],
        ),
        (
            "a section for nothing",
            |_, c| c["quantization"]["lm_head"] = json!({"group_size": 64, "bits": 4}),
            &["tensor \"lm_head.scales\": is missing, and config.json says how this module is quantised"],
        ),
        (
            "quantised against its section",
            |_, c| c["quantization"][Q] = json!(false),
            &["q_proj.scales\": is there, but config.json says that this module is not quantised"],
        ),
        (
            "a section replaces the one for all",
            |_, c| c["quantization"][Q] = json!({"group_size": 32, "bits": 4}),
            &["q_proj.scales\" has dtype U8, wanted BF16 or F16 or F32"],
        ),
        (
            "halves unlike each other",
            |_, c| c["quantization"][format!("{EXPERTS}up_proj")] = json!({"group_size": 64, "bits": 8}),
            &["gate_up_proj\" cannot be read: gate_proj and up_proj are quantised differently"],
        ),
        (
            "nothing quantised",
            |t, c| {
                t.retain(|t| t.name.ends_with(".bias"));
                c["quantization"].as_object_mut().unwrap().remove(Q);
            },
            &["declares a quantization by MLX, but no tensor here is named *.scales"],
        ),
    ];
    each_is_refused(mlx, &mlx_wants(), cases);
    let cases = [
        (matrix("model.layers.0.mlp.router.weight", 2, 65), "65 input features are not a multiple of 64"),
        (
            Want {
                name: format!("{EXPERTS}gate_up_proj"),
                shape: Shape::Experts { experts: 2, rows: 5, cols: 64 },
            },
            "5 rows of gate and up are odd",
        ),
        (
            Want { name: format!("{EXPERTS}gate_up_proj_bias"), shape: Shape::Vector { len: 5 } },
            "5 biases of gate and up are odd",
        ),
    ];
    for (want, wanted) in cases {
        let message = complaint(mlx, &[want], |_, _| ()).unwrap();
        assert!(message.contains(wanted), "{message}");
    }
}

#[test]
fn absurd_wants_are_mismatches_in_every_format() {
    for base in [modelopt, compressed, mlx] {
        let (tensors, config) = base();
        let checkpoint = Checkpoint::in_memory(config, tensors).unwrap();
        for size in [usize::MAX, usize::MAX / 64 * 64, 1 << 62] {
            for name in [format!("{Q}.weight"), "model.layers.0.mlp.router.weight".to_owned()] {
                assert!(checkpoint.matrix(&name, size, size).is_err());
                assert!(checkpoint.matrix(&name, 2, size).is_err());
            }
            assert!(checkpoint.experts(&format!("{EXPERTS}gate_up_proj"), size, size, size).is_err());
            assert!(checkpoint.vector(&format!("{EXPERTS}gate_up_proj_bias"), size).is_err());
        }
    }
}
