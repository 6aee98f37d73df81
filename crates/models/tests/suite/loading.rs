//! From checkpoint to backend: what arrives there, and what is refused before it does.

use crate::common::{golden_dir, open};
use crate::ledger::{Ledger, prompt};
use ctxserve_backend::{Batch, KvDtype};
use ctxserve_checkpoint::{Checkpoint, CheckpointError, Dtype, MemoryTensor, Shape, Want};
use ctxserve_core::Encoding;
use ctxserve_models::{LoadError, LoadOptions, architectures, inspect, load, wants};
use safetensors::SafeTensors;
use serde_json::{Value, json};

const OPTIONS: LoadOptions = LoadOptions { page_size: 16, kv_dtype: KvDtype::F32 };
const PACKED: [Encoding; 2] = [Encoding::Bf16, Encoding::Mxfp4];

/// Configuration and tensors of a golden, to be spoilt.
fn parts(name: &str) -> (Value, Vec<MemoryTensor>) {
    let dir = golden_dir(name);
    let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        let dtype = match view.dtype() {
            safetensors::Dtype::BF16 => Dtype::BF16,
            safetensors::Dtype::U8 => Dtype::U8,
            other => panic!("{other:?}"),
        };
        MemoryTensor { name, dtype, shape: view.shape().to_vec(), data: view.data().to_vec() }
    };
    let config = std::fs::read(dir.join("config.json")).unwrap();
    (serde_json::from_slice(&config).unwrap(), tensors.tensors().into_iter().map(tensor).collect())
}

fn refuse(config: Value, tensors: Vec<MemoryTensor>) -> String {
    let mut ledger = Ledger::new(&PACKED);
    let error = match Checkpoint::in_memory(config, tensors) {
        Ok(checkpoint) => match load(&checkpoint, &mut ledger, &OPTIONS, &mut |_| ()) {
            Ok(_) => panic!("it loaded"),
            Err(error) => error.to_string(),
        },
        Err(error) => error.to_string(),
    };
    assert_eq!(ledger.loads, [""; 0], "weights were loaded before the check");
    error
}

#[test]
fn what_a_model_wants_is_all_that_is_stored() {
    for name in ["long", "dense", "mlx", "qwen3", "qwen3_untied", "qwen3_nvfp4"] {
        let checkpoint = open(name);
        let wants = wants(&checkpoint).unwrap();
        assert_eq!(checkpoint.stored_bytes(&wants).unwrap(), checkpoint.total_bytes(), "{name}");
        // Heads of 64 and 128 are not padded, and in these nothing is packed but experts in MXFP4.
        let bytes = |want: &Want| match want.shape {
            Shape::Vector { len } => 4 * len,
            Shape::Matrix { rows, cols } => 2 * rows * cols,
            Shape::Experts { experts, rows, cols } if name == "long" => experts * rows * cols * 17 / 32,
            Shape::Experts { experts, rows, cols } => 2 * experts * rows * cols,
        };
        if ["long", "dense", "mlx", "qwen3"].contains(&name) {
            let on_gpu = inspect(&checkpoint, &OPTIONS).unwrap().weight_bytes_on_gpu;
            assert_eq!(on_gpu, wants.iter().map(bytes).sum::<usize>() as u64, "{name}");
        }
    }
    let (config, mut tensors) = parts("long");
    tensors.pop();
    assert!(wants(&Checkpoint::in_memory(config, tensors).unwrap()).is_err());
}

#[test]
fn weights_arrive_in_the_order_of_the_model() {
    let mut ledger = Ledger::new(&PACKED);
    let mut seen = Vec::new();
    let model = load(&open("long"), &mut ledger, &OPTIONS, &mut |p| seen.push((p.done, p.total))).unwrap();
    assert_eq!(seen, [(1, 4), (2, 4), (3, 4), (4, 4)]);
    let block = [
        "Mxfp4 [512, 64] Mxfp4 [512, 32] biases (512, 512) top 4",
        "[64]",
        "Bf16 [256, 64] bias Some(256)",
        "Bf16 [64, 128] bias Some(64)",
        "[2]",
        "[64]",
        "Bf16 [8, 64] bias Some(8)",
    ];
    let expected = [&["Bf16 [512, 64] bias None"][..], &block, &block, &["[64]", "Bf16 [512, 64] bias None"]];
    assert_eq!(ledger.loads, expected.concat());

    model.forward(&mut ledger, &mut (), &prompt(1, true)).unwrap();
    let expected = [
        "begin 512",
        "embed Bf16 [512, 64] bias None",
        "input 0 Some(128) 32",
        "attention 0 sinks Some(2)",
        "output Bf16 [64, 128] bias Some(64)",
        "experts",
        "input 1 None 32",
        "attention 1 sinks Some(2)",
        "output Bf16 [64, 128] bias Some(64)",
        "experts",
        "logits [64] Bf16 [512, 64] bias None",
    ];
    assert_eq!(ledger.ops, expected);

    // Inside a prompt the last layer has nothing to do beyond its keys and values.
    ledger.ops.clear();
    model.forward(&mut ledger, &mut (), &prompt(1, false)).unwrap();
    assert_eq!(ledger.ops, [&expected[..7], &expected[10..]].concat());

    // At its end the last row alone has something to do.
    ledger.ops.clear();
    model.forward(&mut ledger, &mut (), &prompt(2, true)).unwrap();
    assert_eq!(ledger.ops, [&expected[..7], &["narrow 1"], &expected[7..]].concat());
}

#[test]
fn encodings_that_a_backend_refuses_are_decoded() {
    let mut ledger = Ledger::new(&[Encoding::Bf16]);
    load(&open("long"), &mut ledger, &OPTIONS, &mut |_| ()).unwrap();
    assert_eq!(ledger.loads[1], "Bf16 [512, 64] Bf16 [512, 32] biases (512, 512) top 4");
}

#[test]
fn tied_and_unbiased_models_load_without_head_and_biases() {
    let mut ledger = Ledger::new(&PACKED);
    let model = load(&open("unusual"), &mut ledger, &OPTIONS, &mut |_| ()).unwrap();
    assert!(ledger.loads.contains(&"Bf16 [288, 96] bias None".to_owned()), "{:?}", ledger.loads);
    assert!(ledger.loads.contains(&"Bf16 [96, 96] bias None".to_owned()), "{:?}", ledger.loads);
    assert_eq!(ledger.loads.iter().filter(|entry| entry.starts_with("Bf16 [512, 96]")).count(), 1);
    model.forward(&mut ledger, &mut (), &Batch::default()).unwrap();
    assert_eq!(ledger.ops.last().unwrap(), "logits [96] Bf16 [512, 96] bias None");
}

#[test]
fn the_facts_are_those_of_the_files() {
    let info = inspect(&open("served"), &OPTIONS).unwrap();
    assert_eq!((info.family, info.vocab_size, info.max_context, info.layers), ("gpt_oss", 3072, 131_072, 2));
    assert_eq!(info.eos, [3057, 3058, 3064]);
    assert_eq!((info.kv.page_size, info.kv.kv_heads, info.kv.head_dim), (16, 2, 64));
    assert!(info.weight_bytes > 1_000_000 && info.weight_bytes < 1_500_000, "{}", info.weight_bytes);
    assert!(info.description.contains("8 experts top-4"), "{}", info.description);
    let loaded = load(&open("served"), &mut Ledger::new(&PACKED), &OPTIONS, &mut |_| ()).unwrap();
    assert_eq!(loaded.info(), &info);
    // 200,000 and more would be its family's ids; a vocabulary of 512 has none of them.
    let (config, tensors) = parts("long");
    let config = with(config, "eos_token_id", json!([200_002, 3]));
    assert_eq!(inspect(&Checkpoint::in_memory(config, tensors).unwrap(), &OPTIONS).unwrap().eos, [3]);
}

fn with(mut config: Value, name: &str, value: Value) -> Value {
    config[name] = value;
    config
}

#[test]
fn unknown_architectures_are_named_with_the_known_ones() {
    let (config, tensors) = parts("long");
    assert_eq!(architectures().collect::<Vec<_>>(), ["GptOssForCausalLM", "Qwen3ForCausalLM"]);
    for (name, value, found) in [
        ("architectures", json!(["LlamaForCausalLM"]), "LlamaForCausalLM"),
        ("architectures", json!([7]), "(none named)"),
    ] {
        let error = refuse(with(config.clone(), name, value), tensors.clone());
        let expected =
            format!("architecture {found} is not supported; known are GptOssForCausalLM, Qwen3ForCausalLM");
        assert!(error.contains(&expected), "{error}");
    }
    let unnamed = with(with(config.clone(), "architectures", json!(null)), "model_type", json!("mamba"));
    assert!(refuse(unnamed, tensors.clone()).contains("architecture mamba is not supported"));
    let long = with(config, "architectures", json!(["x".repeat(10_000)]));
    assert!(refuse(long, tensors.clone()).len() < 400);
    // `model_type` alone is enough.
    let (config, _) = parts("long");
    let checkpoint = Checkpoint::in_memory(with(config, "architectures", json!(null)), tensors).unwrap();
    assert_eq!(inspect(&checkpoint, &OPTIONS).unwrap().family, "gpt_oss");
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let missing = |name: &str| {
        let (config, mut tensors) = parts("long");
        tensors.retain(|tensor| tensor.name != name);
        (config, tensors)
    };
    for name in [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.layers.1.self_attn.sinks",
        "model.layers.0.self_attn.k_proj.bias",
        "model.layers.1.mlp.experts.down_proj_scales",
    ] {
        let (config, tensors) = missing(name);
        let error = refuse(config, tensors);
        assert!(error.contains(name.trim_end_matches("_scales")), "{name}: {error}");
    }

    let (config, mut tensors) = parts("long");
    let extra = "model.layers.0.self_attn.q_norm.weight".to_owned();
    tensors.push(MemoryTensor {
        name: extra.clone(),
        dtype: Dtype::BF16,
        shape: vec![64],
        data: vec![0; 128],
    });
    assert!(refuse(config, tensors).contains(&extra));

    // Shapes that the configuration contradicts.
    for (field, value, named) in [
        ("hidden_size", json!(96), "model.embed_tokens.weight"),
        ("num_attention_heads", json!(4), "self_attn"),
        ("num_hidden_layers", json!(3), "model.layers.2."),
        ("num_hidden_layers", json!(1), "model.layers.1."),
        ("vocab_size", json!(511), "model.embed_tokens.weight"),
        ("attention_bias", json!(false), "bias"),
        ("tie_word_embeddings", json!(true), "lm_head.weight"),
    ] {
        let (config, tensors) = parts("long");
        let error = refuse(with(config, field, value.clone()), tensors);
        assert!(error.contains(named), "{field} {value}: {error}");
    }
}

#[test]
fn a_device_without_memory_says_so() {
    for fails_at in [0, 1, 5, 16] {
        let mut ledger = Ledger { fails_at: Some(fails_at), ..Ledger::new(&PACKED) };
        let error = load(&open("long"), &mut ledger, &OPTIONS, &mut |_| ()).err().unwrap();
        assert!(matches!(error, LoadError::Device(_)), "{error}");
    }
}

#[test]
fn page_sizes_are_checked() {
    for page_size in [0, 1 << 30] {
        let options = LoadOptions { page_size, ..OPTIONS };
        let error = inspect(&open("long"), &options).unwrap_err();
        assert!(error.to_string().contains("page_size"), "{error}");
    }
}

#[test]
fn a_checkpoint_error_stays_one() {
    let (config, tensors) = parts("long");
    let checkpoint = Checkpoint::in_memory(with(config, "vocab_size", json!(100)), tensors).unwrap();
    let error = inspect(&checkpoint, &OPTIONS).unwrap_err();
    assert!(matches!(error, LoadError::Checkpoint(CheckpointError::Mismatch { .. })), "{error:?}");
}
