//! Configurations: every spelling of one model reads alike, and every bad value is refused by name.

use ctxserve_backend::{KvDtype, KvGroup};
use ctxserve_models::gpt_oss::Config;
use ctxserve_models::{LoadOptions, Yarn};
use serde_json::{Value, json};

/// gpt-oss-20b as transformers 4 spells it.
fn four() -> Value {
    let kinds: Vec<&str> = (0..24).map(|i| ["sliding_attention", "full_attention"][i % 2]).collect();
    json!({
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": true,
        "attention_dropout": 0.0, "eos_token_id": 200002, "pad_token_id": 199999, "experts_per_token": 4,
        "num_experts_per_tok": 4, "num_local_experts": 32, "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2880, "intermediate_size": 2880, "initial_context_length": 4096,
        "initializer_range": 0.02, "max_position_embeddings": 131072, "layer_types": kinds,
        "num_attention_heads": 64, "num_hidden_layers": 24, "num_key_value_heads": 8,
        "output_router_logits": false, "rms_norm_eps": 1e-5, "rope_theta": 150000,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "rope_type": "yarn", "truncate": false,
        },
        "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 201088,
    })
}

fn without(mut config: Value, names: &[&str]) -> Value {
    let map = config.as_object_mut().unwrap();
    names.iter().for_each(|name| drop(map.shift_remove(*name)));
    config
}

fn with(mut config: Value, more: Value) -> Value {
    let Value::Object(more) = more else { panic!("not an object") };
    config.as_object_mut().unwrap().extend(more);
    config
}

fn read(config: &Value) -> Config {
    Config::read(config).unwrap()
}

fn yarn() -> Yarn {
    Yarn {
        factor: 32.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original_positions: 4096.0,
        truncate: false,
        attention_factor: 0.1 * 32.0_f64.ln() + 1.0,
    }
}

#[test]
fn the_twenty_billion_reads_as_published() {
    let config = read(&four());
    assert_eq!((config.hidden, config.inner, config.vocab, config.layers()), (2880, 2880, 201_088, 24));
    assert_eq!((config.heads, config.kv_heads, config.head_dim), (64, 8, 64));
    assert_eq!((config.experts, config.top_k, config.alpha, config.limit), (32, 4, 1.702, 7.0));
    assert_eq!((config.norm_eps, config.attention_bias, config.tied), (1e-5, true, false));
    assert_eq!((config.max_context, config.rope.theta, config.rope.yarn), (131_072, 150_000.0, Some(yarn())));
    assert_eq!((config.windows[0], config.windows[1], config.windows[23]), (Some(128), None, None));
    assert_eq!(config.attention(0).scale, 0.125);
}

#[test]
fn every_spelling_reads_alike() {
    let rope = json!({
        "rope_type": "yarn", "rope_theta": 150000.0, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
        "original_max_position_embeddings": 4096, "truncate": false,
    });
    let five = with(
        without(four(), &["rope_scaling", "rope_theta", "torch_dtype", "experts_per_token"]),
        json!({ "rope_parameters": rope, "dtype": "bfloat16" }),
    );
    let flat = json!({
        "num_hidden_layers": 24, "num_experts": 32, "experts_per_token": 4, "vocab_size": 201088,
        "hidden_size": 2880, "intermediate_size": 2880, "swiglu_limit": 7.0, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128,
        "initial_context_length": 4096, "rope_theta": 150000, "rope_scaling_factor": 32.0,
        "rope_ntk_alpha": 1, "rope_ntk_beta": 32,
    });
    let expected = read(&four());
    let spellings = [
        ("transformers 5", five.clone()),
        ("OpenAI", flat),
        (
            "both of transformers",
            with(five, json!({ "rope_scaling": four()["rope_scaling"], "rope_theta": 150000 })),
        ),
        ("silent about truncation", {
            let mut config = four();
            config["rope_scaling"].as_object_mut().unwrap().shift_remove("truncate");
            config
        }),
        ("old name of the type", {
            let mut config = four();
            let scaling = config["rope_scaling"].as_object_mut().unwrap();
            scaling.shift_remove("rope_type");
            scaling.insert("type".to_owned(), json!("yarn"));
            config
        }),
        ("original length outside", {
            let mut config = four();
            config["rope_scaling"].as_object_mut().unwrap().shift_remove("original_max_position_embeddings");
            config
        }),
        ("layer types left out", without(four(), &["layer_types"])),
        ("nothing about rotation", without(four(), &["rope_scaling", "rope_theta"])),
        (
            "nothing optional",
            without(four(), &["swiglu_limit", "rms_norm_eps", "attention_bias", "hidden_act"]),
        ),
    ];
    for (name, config) in spellings {
        assert_eq!(read(&config), expected, "{name}");
    }
}

#[test]
fn scaling_can_be_absent_or_said_otherwise() {
    let plain = with(four(), json!({ "rope_scaling": null, "rope_theta": 10000 }));
    assert_eq!((read(&plain).rope.theta, read(&plain).rope.yarn), (10_000.0, None));
    let default = with(
        without(four(), &["rope_scaling", "rope_theta"]),
        json!({ "rope_parameters": { "rope_type": "default", "rope_theta": 500 } }),
    );
    assert_eq!((read(&default).rope.theta, read(&default).rope.yarn), (500.0, None));
    let scaling = json!({
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "truncate": true,
        "attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2,
    });
    let expected = Yarn {
        factor: 4.0,
        beta_fast: 16.0,
        beta_slow: 2.0,
        original_positions: 512.0,
        truncate: true,
        attention_factor: 1.5,
    };
    assert_eq!(read(&with(four(), json!({ "rope_scaling": scaling }))).rope.yarn, Some(expected));
    let weighed = json!({ "rope_type": "yarn", "factor": 4.0, "mscale": 2.0, "mscale_all_dim": 1.0 });
    let factor = read(&with(four(), json!({ "rope_scaling": weighed }))).rope.yarn.unwrap().attention_factor;
    let ln = 4.0_f64.ln();
    assert!((factor - (0.2 * ln + 1.0) / (0.1 * ln + 1.0)).abs() < 1e-12, "{factor}");
}

#[test]
fn groups_follow_the_layers() {
    let options = LoadOptions { page_size: 16, kv_dtype: KvDtype::Bf16 };
    let spec = read(&four()).kv_spec(&options);
    let layers = |start: usize| (start..24).step_by(2).collect::<Vec<_>>();
    let expected = |sliding, full| {
        [
            KvGroup { window: Some(128), layers: layers(0), dtype: sliding },
            KvGroup { window: None, layers: layers(1), dtype: full },
        ]
    };
    assert_eq!(spec.groups, expected(KvDtype::Bf16, KvDtype::Bf16));
    assert_eq!((spec.page_size, spec.kv_heads, spec.head_dim), (16, 8, 64));
    let of = |kv_dtype| read(&four()).kv_spec(&LoadOptions { kv_dtype, ..options }).groups;
    assert_eq!(of(KvDtype::F32), expected(KvDtype::F32, KvDtype::F32));
    assert_eq!(of(KvDtype::Fp8E4m3), expected(KvDtype::Bf16, KvDtype::Fp8E4m3), "windows keep bfloat16");
    for (kind, window) in [("sliding_attention", Some(128)), ("full_attention", None)] {
        let config = read(&with(four(), json!({ "layer_types": vec![kind; 24] })));
        let groups = config.kv_spec(&options).groups;
        assert_eq!(groups, [KvGroup { window, layers: (0..24).collect(), dtype: KvDtype::Bf16 }], "{kind}");
    }
    let all_full = with(four(), json!({ "layer_types": vec!["full_attention"; 24], "sliding_window": null }));
    assert_eq!(read(&all_full).windows, vec![None; 24]);
}

#[test]
fn bad_values_are_refused_by_name() {
    let huge = json!(1_000_000_000_u64);
    let cases = [
        ("num_hidden_layers", json!(0)),
        ("num_hidden_layers", json!(-1)),
        ("num_hidden_layers", huge.clone()),
        ("num_hidden_layers", json!(24.5)),
        ("num_hidden_layers", json!("24")),
        ("num_hidden_layers", json!(null)),
        ("hidden_size", json!(0)),
        ("hidden_size", json!(u64::MAX)),
        ("hidden_size", json!([2880])),
        ("intermediate_size", json!(0)),
        ("intermediate_size", huge.clone()),
        ("num_attention_heads", json!(0)),
        ("num_attention_heads", huge.clone()),
        ("num_key_value_heads", json!(0)),
        ("num_key_value_heads", json!(7)),
        ("num_key_value_heads", json!(128)),
        ("head_dim", json!(0)),
        ("head_dim", json!(63)),
        ("head_dim", huge.clone()),
        ("num_local_experts", json!(0)),
        ("num_local_experts", huge.clone()),
        ("num_experts_per_tok", json!(0)),
        ("num_experts_per_tok", json!(5)),
        ("vocab_size", json!(0)),
        ("vocab_size", json!(-201088)),
        ("vocab_size", json!(1_u64 << 40)),
        ("max_position_embeddings", json!(0)),
        ("max_position_embeddings", json!(1_u64 << 60)),
        ("sliding_window", json!(0)),
        ("sliding_window", json!(-128)),
        ("sliding_window", json!(null)),
        ("rms_norm_eps", json!(0)),
        ("rms_norm_eps", json!(-1e-5)),
        ("rms_norm_eps", json!("1e-5")),
        ("swiglu_limit", json!(0)),
        ("swiglu_alpha", json!(-1)),
        ("rope_theta", json!(0)),
        ("rope_theta", json!(1)),
        ("rope_theta", json!(-150000)),
        ("attention_bias", json!("yes")),
        ("tie_word_embeddings", json!(1)),
        ("hidden_act", json!("gelu")),
        ("hidden_act", json!(3)),
        ("layer_types", json!("alternating")),
        ("layer_types", json!(["full_attention"])),
        ("layer_types", json!([])),
        ("layer_types", json!(vec!["linear_attention"; 24])),
        ("layer_types", json!(vec![0; 24])),
        ("partial_rotary_factor", json!(0.5)),
        ("rope_scaling", json!("yarn")),
        ("rope_parameters", json!([1])),
    ];
    for (field, value) in cases {
        let error = Config::read(&with(four(), json!({ field: value }))).expect_err(field);
        assert_eq!(error.field, field, "{value}: {error}");
        assert!(error.to_string().len() < 300, "{error}");
    }
    for field in
        ["num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"]
    {
        let error = Config::read(&without(four(), &[field])).expect_err(field);
        assert_eq!((error.field.as_str(), error.what.as_str()), (field, "is missing"));
    }
}

#[test]
fn bad_scalings_are_refused_by_name() {
    let cases = [
        ("rope_type", json!("llama3")),
        ("rope_type", json!(null)),
        ("factor", json!(0)),
        ("factor", json!(0.5)),
        ("factor", json!(1e30)),
        ("factor", json!("32")),
        ("factor", json!(null)),
        ("beta_fast", json!(0)),
        ("beta_slow", json!(-1)),
        ("original_max_position_embeddings", json!(0)),
        ("original_max_position_embeddings", json!(1e12)),
        ("truncate", json!("false")),
        ("attention_factor", json!(0)),
        ("mscale", json!(-1)),
        ("full_attention", json!({ "rope_type": "yarn" })),
    ];
    for (field, value) in cases {
        let mut config = four();
        config["rope_scaling"][field] = value.clone();
        let error = Config::read(&config).expect_err(field);
        assert_eq!(error.field, format!("rope_scaling.{field}"), "{value}: {error}");
    }
    let mut crossed = four();
    crossed["rope_scaling"]["beta_slow"] = json!(64);
    assert_eq!(Config::read(&crossed).unwrap_err().field, "beta_fast");
}

#[test]
fn spellings_that_contradict_one_another_are_refused() {
    let cases = [
        ("num_local_experts", json!({ "num_experts": 16 })),
        ("num_experts_per_tok", json!({ "experts_per_token": 2 })),
        (
            "rope_theta",
            json!({ "rope_parameters": { "rope_type": "yarn", "factor": 32, "rope_theta": 1e4 } }),
        ),
        ("rope_scaling.factor", json!({ "rope_parameters": { "rope_type": "yarn", "factor": 16 } })),
        ("rope_scaling.rope_type", json!({ "rope_parameters": { "rope_type": "default" } })),
        ("rope_scaling_factor", json!({ "rope_scaling_factor": 8 })),
        ("rope_ntk_beta", json!({ "rope_ntk_beta": 16 })),
    ];
    for (field, more) in cases {
        let error = Config::read(&with(four(), more)).expect_err(field);
        assert_eq!(error.field, field, "{error}");
    }
}

#[test]
fn anything_but_an_object_is_refused() {
    for config in [json!(null), json!([]), json!("gpt_oss"), json!(1)] {
        assert_eq!(Config::read(&config).unwrap_err().field, "config");
    }
    assert!(Config::read(&json!({})).is_err());
}
