use std::path::PathBuf;

use ctxserve_chat::demo_tokenizer_json;
use serde_json::json;

use super::*;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
}

/// A golden's files, to be changed.
fn copy(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "generation_config.json", "model.safetensors"] {
        let from = golden(name).join(file);
        if from.exists() {
            std::fs::copy(from, dir.path().join(file)).unwrap();
        }
    }
    dir
}

fn inspected(dir: &Path, json: bool) -> String {
    let args = InspectArgs { source: dir.display().to_string(), json };
    let mut out = Vec::new();
    run(&args, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

fn findings(dir: &Path) -> Value {
    serde_json::from_str(&inspected(dir, true)).unwrap()
}

fn odd(dir: &Path) -> Vec<String> {
    serde_json::from_value(findings(dir)["odd"].clone()).unwrap()
}

#[test]
fn a_checkpoint_is_described_whole() {
    let dir = copy("served");
    std::fs::write(dir.path().join("tokenizer.json"), demo_tokenizer_json()).unwrap();
    let found = findings(dir.path());
    assert_eq!((found["family"].as_str(), found["format"].as_str()), (Some("gpt_oss"), Some("mxfp4")));
    assert_eq!(found["architecture"], "GptOssForCausalLM");
    assert_eq!(found["chat_format"], "harmony");
    let kinds = found["bytes_by_kind"].as_array().unwrap();
    let names: Vec<&str> = kinds.iter().map(|kind| kind["kind"].as_str().unwrap()).collect();
    assert_eq!(names, ["embedding", "attention", "experts or MLP", "head", "norms"]);
    let sum: u64 = kinds.iter().map(|kind| kind["bytes"].as_u64().unwrap()).sum();
    assert_eq!(found["bytes"], sum);
    let tensors: u64 = kinds.iter().map(|kind| kind["tensors"].as_u64().unwrap()).sum();
    assert_eq!(tensors as usize, wants(&Checkpoint::open(dir.path()).unwrap()).unwrap().len());
    assert_eq!(found["tokenizer_ids"], found["vocab_size"]);
    assert!(found["eos"].as_array().unwrap().iter().any(|eos| eos["text"] == "<|return|>"), "{found}");

    let text = inspected(dir.path(), false);
    for wanted in
        ["GptOssForCausalLM (gpt_oss, mxfp4", "format        mxfp4", "harmony", "bfloat16: ", "<|return|>"]
    {
        assert!(text.contains(wanted), "{text}");
    }
}

#[test]
fn keys_and_values_are_counted_by_hand() {
    // Two heads of 64, keys and values: 512 bytes a layer and token in bfloat16, and 2 * 2 * (64 + 4) with a scale a head.
    let config: Value =
        serde_json::from_slice(&std::fs::read(golden("mxfp4").join("config.json")).unwrap()).unwrap();
    let number = |key: &str| config[key].as_u64().unwrap();
    let (heads, dim, layers) =
        (number("num_key_value_heads"), number("head_dim"), number("num_hidden_layers"));
    let sliding =
        config["layer_types"].as_array().unwrap().iter().filter(|kind| *kind == "sliding_attention");
    let sliding = sliding.count() as u64;
    let found = findings(&golden("mxfp4"));
    let (bf16, fp8) = (&found["kv"][0], &found["kv"][1]);
    assert_eq!((bf16["dtype"].as_str(), fp8["dtype"].as_str()), (Some("bfloat16"), Some("fp8")));
    assert_eq!(bf16["bytes_per_token"], (layers - sliding) * heads * dim * 2 * 2);
    assert_eq!(fp8["bytes_per_token"], (layers - sliding) * heads * 2 * (dim + 4));
    let window = number("sliding_window");
    let bytes = bf16["window_bytes"].as_u64().unwrap() / (sliding * heads * dim * 2 * 2);
    assert!(bytes >= window && bytes <= window + 600, "{bytes} positions for a window of {window}");
}

#[test]
fn what_fits_is_said_of_the_device_at_hand() {
    let found = findings(&golden("mxfp4"));
    let fit = &found["fit"];
    assert_eq!(fit["problem"], Value::Null, "{fit}");
    // A machine without a GPU says why.
    assert!(
        fit["device"] != "CPU" || fit["notes"][0].as_str().unwrap().starts_with("no GPU is used: "),
        "{fit}"
    );
    let rooms = fit["room"].as_array().unwrap();
    assert_eq!(rooms.len(), 2);
    for room in rooms.iter().filter(|room| !room["bytes"].is_null()) {
        assert_eq!(room["longest"], found["context"], "a tiny model fits: {room}");
        assert!(room["sequences"].as_u64() > Some(0), "{room}");
    }
}

#[test]
fn odd_things_are_named() {
    let dir = copy("served");
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("generation_config.json"), r#"{"eos_token_id": [7, 999999]}"#).unwrap();
    std::fs::write(path("modeling.py"), "").unwrap();
    let mut config: Value = serde_json::from_slice(&std::fs::read(path("config.json")).unwrap()).unwrap();
    config["auto_map"] = json!({"AutoModel": "modeling.X"});
    config["eos_token_id"] = json!(7);
    std::fs::write(path("config.json"), config.to_string()).unwrap();
    let has =
        |odd: &[String], wanted: &str| assert!(odd.iter().any(|it| it.contains(wanted)), "{wanted}: {odd:?}");
    let found = odd(dir.path());
    for wanted in [
        "no tokenizer.json",
        "generation_config.json ends turns at 999999",
        "no chat template",
        "auto_map",
        "modeling.py are there and not read",
    ] {
        has(&found, wanted);
    }
    std::fs::write(path("tokenizer.json"), demo_tokenizer_json()).unwrap();
    std::fs::write(path("chat_template.jinja"), "").unwrap();
    let found = odd(dir.path());
    has(&found, "<|call|>");
    assert!(!found.iter().any(|it| it.contains("template")), "{found:?}");
    std::fs::write(path("tokenizer.json"), "{").unwrap();
    has(&odd(dir.path()), "tokenizer.json cannot be read");
    // Ids 1 and 2 of four are nowhere.
    let holed = json!({"model": {"type": "BPE", "vocab": {"a": 0, "b": 3}, "merges": []}});
    std::fs::write(path("tokenizer.json"), holed.to_string()).unwrap();
    let found = odd(dir.path());
    has(&found, "no token for 2 of its 4 ids, 1 to 2");
    has(&found, "lacks control tokens of harmony");
    std::fs::remove_file(path("generation_config.json")).unwrap();
    has(&odd(dir.path()), "there is no generation_config.json");
}

#[test]
fn the_end_at_a_call_is_missed_without_a_tokenizer_too() {
    let ends = |family, vocab| odd::ends_of(None, family, vocab).to_vec();
    assert_eq!(ends("gpt_oss", 201_088), [200_002, 200_012]);
    assert_eq!((ends("gpt_oss", 3072), ends("qwen3", 201_088)), (vec![], vec![]));
    assert_eq!(odd::ends_of(Some(&[7]), "gpt_oss", 201_088), [7]);
}

#[test]
fn factors_that_differ_within_a_product_are_named() {
    let found = odd(&golden("qwen3_nvfp4"));
    let wanted =
        "factors of their own: model.layers.0.mlp.{gate,up}_proj, model.layers.0.self_attn.{q,k,v}_proj";
    assert!(found.iter().any(|it| it.contains(wanted)), "{found:?}");
}

#[test]
fn what_cannot_be_served_is_an_error() {
    let dir = copy("served");
    let args = InspectArgs { source: dir.path().display().to_string(), json: false };
    std::fs::write(dir.path().join("config.json"), r#"{"architectures": ["LlamaForCausalLM"]}"#).unwrap();
    let error = run(&args, &mut Vec::new()).unwrap_err().to_string();
    assert!(error.contains("quant") || error.contains("LlamaForCausalLM"), "{error}");
}
