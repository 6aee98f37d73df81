//! Checkpoints of every format, changed at random: no panic, no allocation by a claimed size, and what is read has the shape
//! that was asked for.

use crate::support::{bf16s, decoded, f32s, mxfp4_config, tensor};
use crate::{formats, quantised};
use ctxserve_checkpoint::{Checkpoint, CheckpointError, Dtype, MemoryTensor, Shape, Want, to_bf16};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::{Value, json};

/// Sizes that no machine could allocate, beside small ones.
fn size() -> impl Strategy<Value = usize> {
    prop_oneof![
        6 => 0_usize..70,
        1 => select(vec![1 << 60, usize::MAX, usize::MAX / 64 * 64, (1 << 32) + 1]),
    ]
}

fn shape() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(size(), 0..5)
}

fn leaf() -> impl Strategy<Value = Value> {
    let text = select(vec![
        "",
        "NVFP4",
        "modelopt",
        "modelopt_fp4",
        "compressed-tensors",
        "nvfp4-pack-quantized",
        "mxfp4",
        "affine",
        "dense",
        "float",
        "int",
        "re:.*",
        "*",
        "lm_head",
        "model.layers.0.*",
        "\u{0}",
    ]);
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0_u64..130).prop_map(Value::from),
        select(vec![1.5, -0.0, 1e300]).prop_map(Value::from),
        text.prop_map(Value::from),
        Just(json!([])),
        Just(json!({})),
        Just(json!(["lm_head", 7])),
        Just(json!({"group_size": 64, "bits": 4})),
        Just(json!({"quant_method": "modelopt", "quant_algo": "NVFP4"})),
    ]
}

#[derive(Clone, Debug)]
enum Change {
    Remove(Index),
    Rename(Index, Index, &'static str),
    Dtype(Index, Dtype),
    Shape(Index, Vec<usize>),
    Byte(Index, Index, u8),
    Fill(Index, u8),
    /// A value of the configuration, by its place in a walk through it.
    Config(Index, Value),
    /// A key beside one of the configuration's own.
    Key(Index, &'static str, Value),
    Want(Index, Shape),
}

fn change() -> impl Strategy<Value = Change> {
    let dtype = select(vec![
        Dtype::U8,
        Dtype::I8,
        Dtype::U32,
        Dtype::F8_E4M3,
        Dtype::F8_E8M0,
        Dtype::BF16,
        Dtype::F16,
        Dtype::F32,
        Dtype::F4,
        Dtype::F64,
    ]);
    let ending = select(vec![
        ".weight",
        ".weight_scale",
        ".weight_scale_2",
        ".weight_packed",
        ".weight_global_scale",
        ".input_scale",
        ".scales",
        ".biases",
        ".bias",
        "_blocks",
        "_scales",
        "_bias",
        "",
    ]);
    let key = select(vec![
        "quantization",
        "quantization_config",
        "ignore",
        "exclude_modules",
        "config_groups",
        "group_size",
        "bits",
        "mode",
        "quant_algo",
        "quant_method",
        "format",
        "transform_config",
        "model.layers.0.self_attn.q_proj",
    ]);
    let want = prop_oneof![
        size().prop_map(|len| Shape::Vector { len }),
        (size(), size()).prop_map(|(rows, cols)| Shape::Matrix { rows, cols }),
        (size(), size(), size()).prop_map(|(experts, rows, cols)| Shape::Experts { experts, rows, cols }),
    ];
    let index = any::<Index>;
    prop_oneof![
        index().prop_map(Change::Remove),
        (index(), index(), ending).prop_map(|(at, from, end)| Change::Rename(at, from, end)),
        (index(), dtype).prop_map(|(at, dtype)| Change::Dtype(at, dtype)),
        (index(), shape()).prop_map(|(at, shape)| Change::Shape(at, shape)),
        (index(), index(), any::<u8>()).prop_map(|(at, byte, value)| Change::Byte(at, byte, value)),
        (index(), any::<u8>()).prop_map(|(at, value)| Change::Fill(at, value)),
        (index(), leaf()).prop_map(|(at, value)| Change::Config(at, value)),
        (index(), key, leaf()).prop_map(|(at, key, value)| Change::Key(at, key, value)),
        (index(), want).prop_map(|(at, shape)| Change::Want(at, shape)),
    ]
}

struct Case {
    tensors: Vec<MemoryTensor>,
    config: Value,
    wants: Vec<Want>,
}

fn bases() -> Vec<Case> {
    let case = |(tensors, config): (Vec<MemoryTensor>, Value), wants| Case { tensors, config, wants };
    let stack = |name: &str, rows, cols| Want {
        name: format!("model.layers.0.mlp.experts.{name}"),
        shape: Shape::Experts { experts: 2, rows, cols },
    };
    let dense = vec![
        tensor("model.layers.0.mlp.experts.gate_up_proj", Dtype::BF16, &[2, 3, 10], bf16s([1.0; 60])),
        tensor("model.layers.0.mlp.experts.down_proj", Dtype::BF16, &[2, 5, 3], bf16s([1.0; 30])),
        tensor("model.norm.weight", Dtype::F32, &[3], f32s([1.0; 3])),
    ];
    let norm = Want { name: "model.norm.weight".to_owned(), shape: Shape::Vector { len: 3 } };
    vec![
        case((dense, json!({})), vec![stack("gate_up_proj", 10, 3), stack("down_proj", 3, 5), norm]),
        case((formats::mxfp4_layer(127), mxfp4_config()), formats::mxfp4_wants()),
        case(quantised::modelopt(), quantised::nvfp4_wants()),
        case(quantised::compressed(), quantised::nvfp4_wants()),
        case(quantised::mlx(), quantised::mlx_wants()),
    ]
}

/// Counts the values in a tree, and replaces the one whose number `at` counts down to.
fn replace(tree: &mut Value, at: &mut usize, with: &Value) {
    if *at == 0 {
        *tree = with.clone();
    }
    *at = at.wrapping_sub(1);
    match tree {
        Value::Object(fields) => fields.values_mut().for_each(|value| replace(value, at, with)),
        Value::Array(list) => list.iter_mut().for_each(|value| replace(value, at, with)),
        _ => (),
    }
}

fn nodes(tree: &Value) -> usize {
    1 + match tree {
        Value::Object(fields) => fields.values().map(nodes).sum(),
        Value::Array(list) => list.iter().map(nodes).sum(),
        _ => 0,
    }
}

/// The objects of a tree.
fn objects(tree: &mut Value) -> usize {
    match tree {
        Value::Object(fields) => 1 + fields.values_mut().map(objects).sum::<usize>(),
        _ => 0,
    }
}

fn insert(tree: &mut Value, at: &mut usize, key: &str, value: &Value) {
    if let Value::Object(fields) = tree {
        if *at == 0 {
            fields.insert(key.to_owned(), value.clone());
        }
        *at = at.wrapping_sub(1);
        fields.values_mut().for_each(|field| insert(field, at, key, value));
    }
}

/// `fitting` gives tensors as many bytes as their shapes say, where those are few.
fn apply(case: &mut Case, change: Change, fitting: bool) {
    let Case { tensors, config, wants } = case;
    if tensors.is_empty() || wants.is_empty() {
        return;
    }
    let count = tensors.len();
    match change {
        Change::Remove(at) => drop(tensors.remove(at.index(count))),
        Change::Rename(at, from, ending) => {
            let name = tensors[from.index(count)].name.clone();
            let stem = name.rfind(['.', '_']).map_or(name.as_str(), |end| &name[..end]);
            tensors[at.index(count)].name = format!("{stem}{ending}");
        }
        Change::Dtype(at, dtype) => tensors[at.index(count)].dtype = dtype,
        Change::Shape(at, shape) => tensors[at.index(count)].shape = shape,
        Change::Byte(at, byte, value) => {
            let data = &mut tensors[at.index(count)].data;
            if !data.is_empty() {
                let byte = byte.index(data.len());
                data[byte] = value;
            }
        }
        Change::Fill(at, value) => tensors[at.index(count)].data.fill(value),
        Change::Config(at, value) => {
            let mut at = at.index(nodes(config));
            replace(config, &mut at, &value);
        }
        Change::Key(at, key, value) => {
            let objects = objects(config);
            if objects > 0 {
                insert(config, &mut at.index(objects), key, &value);
            }
        }
        Change::Want(at, shape) => {
            let at = at.index(wants.len());
            wants[at].shape = shape;
        }
    }
    for tensor in tensors.iter_mut().filter(|_| fitting) {
        let dims: Vec<u64> = tensor.shape.iter().map(|&dim| dim as u64).collect();
        if let Some(bytes) = tensor.dtype.bytes(&dims).filter(|&bytes| bytes < 1 << 16) {
            tensor.data.resize(bytes as usize, 0x38);
        }
    }
}

/// An error that names something, and is no failed allocation.
fn said(error: &CheckpointError) {
    let text = error.to_string();
    assert!(!matches!(error, CheckpointError::OutOfMemory { .. }), "{text}");
    assert!(text.contains("<memory>") || text.contains("<checkpoint>"), "{text}");
    assert!(text.len() < 8000, "{} bytes of message", text.len());
}

fn read_all(case: Case) -> bool {
    let checkpoint = match Checkpoint::in_memory(case.config, case.tensors) {
        Ok(checkpoint) => checkpoint,
        Err(error) => {
            said(&error);
            return false;
        }
    };
    let checked = checkpoint.check(&case.wants);
    let _ = checked.as_ref().map_err(said);
    let mut all = checked.is_ok();
    for want in &case.wants {
        let (units, shape) = match want.shape {
            Shape::Vector { len } => {
                match checkpoint.vector(&want.name, len) {
                    Ok(values) => {
                        assert!(values.len() == len && values.iter().all(|value| value.is_finite()));
                    }
                    Err(error) => {
                        said(&error);
                        all = false;
                    }
                }
                continue;
            }
            Shape::Matrix { rows, cols } => (rows, (rows, cols)),
            Shape::Experts { experts, rows, cols } => (experts, (experts.saturating_mul(rows), cols)),
        };
        match checkpoint.rows(want, 0..units) {
            Ok(matrix) => {
                assert_eq!((matrix.rows(), matrix.cols()), shape);
                assert!(decoded(&matrix).iter().all(|value| !value.is_nan()), "{}", want.name);
                assert_eq!(to_bf16(matrix).rows(), shape.0);
            }
            Err(error) => {
                said(&error);
                all = false;
            }
        }
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_changes(
        base in any::<Index>(),
        changes in prop::collection::vec(change(), 0..4),
        fitting in any::<bool>(),
    ) {
        let mut bases = bases();
        let at = base.index(bases.len());
        let mut case = bases.swap_remove(at);
        let unchanged = changes.is_empty();
        changes.into_iter().for_each(|change| apply(&mut case, change, fitting));
        prop_assert!(read_all(case) || !unchanged);
    }
}

#[test]
fn the_bases_are_read() {
    assert!(bases().into_iter().all(read_all));
}
