//! Checkpoints that leave single projections of a product in floats.

use ctxserve_checkpoint::{Checkpoint, Dtype, MemoryTensor, to_bf16};
use ctxserve_core::Elements;
use ctxserve_models::{LoadOptions, inspect};
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::common::{Driver, Sequence, argmax, cases, golden_dir, open, relative_l2};
use crate::goldens::exact;

const GOLDEN: &str = "qwen3_nvfp4";

/// The golden with these modules in bfloat16, as ModelOpt writes what its list of exclusions names.
fn with_floats(modules: &[String]) -> Checkpoint {
    let dir = golden_dir(GOLDEN);
    let read = |file: &str| std::fs::read(dir.join(file)).unwrap();
    let mut config: Value = serde_json::from_slice(&read("config.json")).unwrap();
    let ignored = config["quantization_config"]["ignore"].as_array_mut().unwrap();
    ignored.extend(modules.iter().map(|module| json!(module)));
    let bytes = read("model.safetensors");
    let whole = open(GOLDEN);
    let mut tensors = Vec::new();
    for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
        let (module, leaf) = name.rsplit_once('.').unwrap();
        let dtype = match view.dtype() {
            safetensors::Dtype::BF16 => Dtype::BF16,
            safetensors::Dtype::U8 => Dtype::U8,
            safetensors::Dtype::F8_E4M3 => Dtype::F8_E4M3,
            safetensors::Dtype::F32 => Dtype::F32,
            other => panic!("{other:?}"),
        };
        let mut tensor = MemoryTensor {
            dtype,
            shape: view.shape().to_vec(),
            data: view.data().to_vec(),
            name: name.clone(),
        };
        if modules.iter().any(|it| it == module) {
            if leaf != "weight" {
                continue;
            }
            let (rows, cols) = (tensor.shape[0], tensor.shape[1] * 2);
            let Elements::Bf16(values) = to_bf16(whole.matrix(&name, rows, cols).unwrap()).into_elements()
            else {
                panic!("bf16")
            };
            tensor.data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            (tensor.dtype, tensor.shape) = (Dtype::BF16, vec![rows, cols]);
        }
        tensors.push(tensor);
    }
    Checkpoint::in_memory(config, tensors).unwrap()
}

fn of(layers: &[usize], names: &[&str]) -> Vec<String> {
    let all = layers.iter().flat_map(|layer| names.iter().map(move |name| (layer, name)));
    all.map(|(layer, name)| format!("model.layers.{layer}.{name}")).collect()
}

/// OPS-05: the budget counts what weights become on the device.
#[test]
fn what_mixed_encodings_become_is_counted() {
    let on_gpu = |modules: &[String]| {
        inspect(&with_floats(modules), &LoadOptions::default()).unwrap().weight_bytes_on_gpu
    };
    let (hidden, q, kv, inner) = (80, 192, 96, 112);
    // Of a matrix: codes and scales, two factors; bfloat16.
    let packed = |rows: u64, cols: u64| rows * (cols / 2 + cols / 16) + 8;
    let floats = |rows: u64, cols: u64| 2 * rows * cols;
    // Heads of 32 are padded to 64.
    let qkv = |bytes: fn(u64, u64) -> u64| 2 * (bytes(q, hidden) + 2 * bytes(kv, hidden));
    let gate_up = |bytes: fn(u64, u64) -> u64| 2 * bytes(inner, hidden);
    let even = on_gpu(&[]);
    let vectors = 4 * (hidden + 3 * (2 * hidden + 2 * 32));
    let layer = qkv(packed) + 2 * floats(hidden, q) + gate_up(packed) + packed(hidden, inner);
    assert_eq!(even, floats(512, hidden) + 3 * layer + vectors);
    // One projection in floats makes its whole product so.
    let mixed = on_gpu(&[of(&[0, 2], &["self_attn.k_proj"]), of(&[1], &["mlp.up_proj"])].concat());
    assert_eq!(mixed, even + 2 * (qkv(floats) - qkv(packed)) + gate_up(floats) - gate_up(packed));
    assert_eq!(on_gpu(&of(&[1], &["mlp.down_proj"])), even + floats(hidden, inner) - packed(hidden, inner));
}

#[test]
fn a_product_of_mixed_encodings_is_that_of_its_bfloat16() {
    let some = [of(&[0, 2], &["self_attn.k_proj"]), of(&[1], &["mlp.up_proj"])].concat();
    let all = [
        of(&[0, 2], &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        of(&[1], &["mlp.gate_proj", "mlp.up_proj"]),
    ];
    let case = &cases(GOLDEN)[0];
    let logits = |checkpoint: &Checkpoint| {
        let mut driver = Driver::new(checkpoint, exact(), 600);
        let mut sequence = Sequence::default();
        driver.step(&mut [(&mut sequence, &case.prompt, true)]).remove(0)
    };
    let (mixed, even) = (logits(&with_floats(&some)), logits(&with_floats(&all.concat())));
    assert_eq!(mixed, even);
    let expected = case.expected(case.prompt.len() - 1).unwrap();
    let distance = relative_l2(&mixed, expected);
    // Nothing but the rounding of weights to bfloat16 lies between them.
    assert!((1e-5..1e-2).contains(&distance), "{distance:e}");
    assert_eq!(argmax(&mixed), case.greedy[0]);
}
