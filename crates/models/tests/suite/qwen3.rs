//! Qwen3's configuration, and what reaches a backend of it.

use crate::common::open;
use crate::ledger::{Ledger, prompt};
use ctxserve_backend::{KvDtype, KvGroup};
use ctxserve_core::Encoding;
use ctxserve_models::qwen3::Config;
use ctxserve_models::{LoadOptions, Yarn, inspect, load};
use serde_json::{Value, json};

const OPTIONS: LoadOptions = LoadOptions { page_size: 16, kv_dtype: KvDtype::F32 };

/// Qwen3-4B-Instruct-2507 as transformers 4 spells it.
fn four() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02, "intermediate_size": 9728,
        "max_position_embeddings": 262144, "max_window_layers": 36, "num_attention_heads": 32,
        "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_scaling": null,
        "rope_theta": 5000000, "sliding_window": null, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "use_cache": true, "use_sliding_window": false, "vocab_size": 151936,
    })
}

fn with(mut config: Value, more: Value) -> Value {
    let Value::Object(more) = more else { panic!("not an object") };
    config.as_object_mut().unwrap().extend(more);
    config
}

fn without(mut config: Value, names: &[&str]) -> Value {
    let map = config.as_object_mut().unwrap();
    names.iter().for_each(|name| drop(map.shift_remove(*name)));
    config
}

fn read(config: &Value) -> Config {
    Config::read(config).unwrap()
}

#[test]
fn the_four_billion_reads_as_published() {
    let config = read(&four());
    assert_eq!((config.hidden, config.inner, config.vocab, config.layers), (2560, 9728, 151_936, 36));
    assert_eq!((config.heads, config.kv_heads, config.head_dim), (32, 8, 128));
    assert_eq!((config.norm_eps, config.attention_bias, config.tied), (1e-6, false, true));
    assert_eq!((config.max_context, config.rope.theta, config.rope.yarn), (262_144, 5e6, None));
    let spec = config.attention();
    assert_eq!((spec.scale, spec.window, spec.norm_eps), (1.0 / 128_f32.sqrt(), None, 1e-6));
    for dtype in [KvDtype::F32, KvDtype::Fp8E4m3] {
        let kv = config.kv_spec(&LoadOptions { kv_dtype: dtype, ..OPTIONS });
        assert_eq!(kv.groups, [KvGroup { window: None, layers: (0..36).collect(), dtype }]);
        assert_eq!((kv.page_size, kv.kv_heads, kv.head_dim), (16, 8, 128));
    }
}

#[test]
fn every_spelling_reads_alike() {
    let five = with(
        without(four(), &["rope_theta", "rope_scaling", "torch_dtype"]),
        json!({
            "rope_parameters": { "rope_type": "default", "rope_theta": 5e6 }, "dtype": "bfloat16",
            "layer_types": vec!["full_attention"; 36],
        }),
    );
    let spellings = [
        ("transformers 5", five.clone()),
        ("both", with(five, json!({ "rope_theta": 5000000 }))),
        ("scaling of no kind", with(four(), json!({ "rope_scaling": { "rope_type": "default" } }))),
        (
            "nothing optional",
            without(
                four(),
                &[
                    "head_dim",
                    "rms_norm_eps",
                    "attention_bias",
                    "hidden_act",
                    "use_sliding_window",
                    "rope_scaling",
                ],
            ),
        ),
        // The files keep it where it is not used.
        ("a window that is off", with(four(), json!({ "sliding_window": 4096 }))),
    ];
    for (name, config) in spellings {
        assert_eq!(read(&config), read(&four()), "{name}");
    }
    assert!(!read(&without(four(), &["tie_word_embeddings"])).tied);
}

#[test]
fn yarn_extends_the_context() {
    let scaling = json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768 });
    let config = read(&with(four(), json!({ "rope_scaling": scaling, "max_position_embeddings": 40960 })));
    let expected = Yarn {
        factor: 4.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original_positions: 32_768.0,
        truncate: true,
        attention_factor: 0.1 * 4.0_f64.ln() + 1.0,
    };
    assert_eq!((config.rope.yarn, config.max_context), (Some(expected), 131_072));
}

#[test]
fn bad_values_are_refused_by_name() {
    let cases = [
        ("num_hidden_layers", json!(0)),
        ("num_hidden_layers", json!(-1)),
        ("num_hidden_layers", json!(1_000_000_000)),
        ("num_hidden_layers", json!(1_u64 << 40)),
        ("num_attention_heads", json!(0)),
        ("num_key_value_heads", json!(0)),
        ("hidden_size", json!(-2560)),
        ("vocab_size", json!(0)),
        ("vocab_size", json!(-1)),
        ("head_dim", json!(0)),
        ("hidden_size", json!(u64::MAX)),
        ("hidden_size", json!("2560")),
        ("intermediate_size", json!(0)),
        ("intermediate_size", json!(null)),
        ("num_attention_heads", json!(-32)),
        ("num_key_value_heads", json!(5)),
        ("num_key_value_heads", json!(null)),
        ("head_dim", json!(127)),
        ("vocab_size", json!(1_u64 << 40)),
        ("max_position_embeddings", json!(0)),
        ("max_position_embeddings", json!(null)),
        ("rms_norm_eps", json!(0)),
        ("rope_theta", json!(null)),
        ("rope_theta", json!(-1)),
        ("attention_bias", json!("no")),
        ("tie_word_embeddings", json!(1)),
        ("hidden_act", json!("gelu")),
        ("use_sliding_window", json!(true)),
        ("use_sliding_window", json!("false")),
        ("layer_types", json!(vec!["sliding_attention"; 36])),
        ("layer_types", json!(["full_attention"])),
        ("layer_types", json!("full_attention")),
        ("rope_scaling", json!("linear")),
        ("partial_rotary_factor", json!(0.25)),
    ];
    for (field, value) in cases {
        let error = Config::read(&with(four(), json!({ field: value }))).expect_err(field);
        assert_eq!(error.field, field, "{value}: {error}");
    }
    let linear = with(four(), json!({ "rope_scaling": { "rope_type": "linear", "factor": 2.0 } }));
    let error = Config::read(&linear).unwrap_err();
    assert_eq!(error.field, "rope_scaling.rope_type");
    assert!(error.what.contains("\"linear\""), "{error}");
    assert!(Config::read(&json!({})).is_err() && Config::read(&json!([])).is_err());
}

#[test]
fn weights_arrive_in_the_order_of_the_model() {
    let mut ledger = Ledger::new(&[Encoding::Bf16]);
    let mut seen = Vec::new();
    let model = load(&open("qwen3"), &mut ledger, &OPTIONS, &mut |p| seen.push((p.done, p.total))).unwrap();
    assert_eq!(seen, [(1, 4), (2, 4), (3, 4), (4, 4)]);
    let block = [
        "[64]",
        "Bf16 [768, 64] bias None",
        "[128]",
        "[128]",
        "Bf16 [64, 512] bias None",
        "[64]",
        "Bf16 [192, 64] bias None",
        "Bf16 [64, 96] bias None",
    ];
    let expected = [&["Bf16 [512, 64] bias None"][..], &block, &block, &["[64]"]];
    assert_eq!(ledger.loads, expected.concat());

    model.forward(&mut ledger, &mut (), &prompt(1, true)).unwrap();
    let layer = |n: usize| {
        [
            format!("input {n} None 64, norms of heads"),
            format!("attention {n} sinks None"),
            "output Bf16 [64, 512] bias None".to_owned(),
            "mlp".to_owned(),
        ]
    };
    let table = "Bf16 [512, 64] bias None";
    let ends = [vec!["begin 512".to_owned(), format!("embed {table}")], vec![format!("logits [64] {table}")]];
    assert_eq!(ledger.ops, [&ends[0][..], &layer(0), &layer(1), &ends[1]].concat());

    ledger.ops.clear();
    model.forward(&mut ledger, &mut (), &prompt(1, false)).unwrap();
    assert_eq!(ledger.ops, [&ends[0][..], &layer(0), &layer(1)[..1], &ends[1]].concat());
}

#[test]
fn quantised_projections_stay_packed_where_they_are_taken() {
    let all = [Encoding::F32, Encoding::Bf16, Encoding::Mxfp4, Encoding::Nvfp4, Encoding::Affine];
    for (name, accepts, expected) in [
        ("qwen3_nvfp4", &all[..], "Nvfp4 [384, 80] bias None"),
        ("qwen3_nvfp4", &all[..2], "Bf16 [384, 80] bias None"),
        ("qwen3_nvfp4_packed", &all[..], "Nvfp4 [192, 64] bias None"),
        ("mlx", &all[..], "Affine [256, 128] bias Some(256)"),
        ("mlx", &all[..2], "Bf16 [256, 128] bias Some(256)"),
    ] {
        let mut ledger = Ledger::new(accepts);
        load(&open(name), &mut ledger, &OPTIONS, &mut |_| ()).unwrap();
        assert!(ledger.loads.iter().any(|entry| entry == expected), "{name}: {:?}", ledger.loads);
    }
}

#[test]
fn the_facts_are_those_of_the_files() {
    let info = inspect(&open("qwen3"), &OPTIONS).unwrap();
    assert_eq!((info.family, info.vocab_size, info.max_context, info.layers), ("qwen3", 512, 262_144, 2));
    assert_eq!(info.eos, [2]);
    assert!(info.description.contains("qwen3, dense: 2 layers of width 64"), "{}", info.description);
    let costs = info.costs;
    assert_eq!((costs.experts, costs.top_k, costs.expert_bytes, costs.expert_parameters), (0, 0, 0, 0));
    assert_eq!((costs.hidden, costs.inner, costs.query_width), (64, 96, 512));
    assert_eq!(costs.shared_parameters, 2 * 64 * (768 + 512 + 3 * 96));
    assert_eq!(costs.head_parameters, 512 * 64);
    // Tied: a step reads everything.
    assert_eq!(costs.shared_bytes, info.weight_bytes);
    let untied = inspect(&open("qwen3_untied"), &OPTIONS).unwrap();
    assert_eq!(untied.weight_bytes - untied.costs.shared_bytes, 512 * 96 * 2);
    assert_eq!(untied.max_context, 256);
}
