//! The files beside the weights: configuration rewritten, tokenizer and templates copied.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::journal::io_error;
use super::{TOOL, Target};
use crate::checkpoint::Checkpoint;
use crate::error::CheckpointError;

/// What is copied as it is, where it is there. No code: nothing here runs what a checkpoint brings.
const COMPANIONS: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "USAGE_POLICY",
];

/// gpt-oss's `<|call|>`, which ends a turn that calls a tool.
const CALL: u64 = 200_012;

/// Modules that Hugging Face's MXFP4 leaves in floats.
const NOT_CONVERTED: [&str; 4] =
    ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"];

/// Writes all of them into `dir`.
pub(super) fn write(
    source: &Checkpoint,
    target: Target,
    excluded: &BTreeSet<String>,
    dir: &Path,
) -> Result<(), CheckpointError> {
    write_json(&dir.join("config.json"), &config(source.config(), target, excluded))?;
    if let Some(generation) = generation_config(source) {
        write_json(&dir.join("generation_config.json"), &generation)?;
    }
    if target == Target::Nvfp4 {
        write_json(&dir.join("hf_quant_config.json"), &hf_quant_config(excluded))?;
    }
    let Some(from) = source.dir() else { return Ok(()) };
    for name in COMPANIONS {
        let (from, to) = (from.join(name), dir.join(name));
        if from.is_file() {
            fs::copy(&from, &to).map_err(|source| io_error(&from, source))?;
            File::open(&to).and_then(|file| file.sync_all()).map_err(|source| io_error(&to, source))?;
        }
    }
    Ok(())
}

/// Writes a value, for people to read, and makes it durable.
pub(super) fn write_json(path: &Path, value: &Value) -> Result<(), CheckpointError> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(format!("{value:#}\n").as_bytes())?;
        file.sync_all()
    };
    write().map_err(|source| io_error(path, source))
}

/// The configuration with the quantisation of the target in place of the source's.
fn config(source: &Value, target: Target, excluded: &BTreeSet<String>) -> Value {
    let mut config: Map<String, Value> = source.as_object().cloned().unwrap_or_default();
    config.retain(|key, _| key != "quantization" && key != "quantization_config");
    // Transformers 5 spells it without the prefix.
    let spellings = ["torch_dtype", "dtype"];
    let spelled: Vec<&str> = spellings.into_iter().filter(|key| config.contains_key(*key)).collect();
    for key in if spelled.is_empty() { vec!["dtype"] } else { spelled } {
        config.insert(key.to_owned(), json!("bfloat16"));
    }
    let section = match target {
        Target::Bf16 => return Value::Object(config),
        Target::Mxfp4 => json!({"quant_method": "mxfp4", "modules_to_not_convert": NOT_CONVERTED}),
        Target::Nvfp4 => {
            let numbers = json!({"dynamic": false, "num_bits": 4, "type": "float", "group_size": 16});
            json!({
                "quant_method": "modelopt",
                "quant_algo": "NVFP4",
                "config_groups": {"group_0": {
                    "input_activations": numbers, "weights": numbers, "targets": ["Linear"],
                }},
                "ignore": ignored(excluded),
                "producer": {"name": TOOL, "version": env!("CARGO_PKG_VERSION")},
            })
        }
    };
    config.insert("quantization_config".to_owned(), section);
    Value::Object(config)
}

fn hf_quant_config(excluded: &BTreeSet<String>) -> Value {
    json!({
        "producer": {"name": TOOL, "version": env!("CARGO_PKG_VERSION")},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": null,
            "group_size": 16,
            "exclude_modules": ignored(excluded),
        },
    })
}

/// The head is listed where it is tied to the embedding too: readers make a module of it.
fn ignored(excluded: &BTreeSet<String>) -> Vec<&str> {
    let head = (!excluded.contains("lm_head")).then_some("lm_head");
    excluded.iter().map(String::as_str).chain(head).collect()
}

/// The source's, and for gpt-oss `<|call|>` among the ids that end a turn.
fn generation_config(source: &Checkpoint) -> Option<Value> {
    let config = source.config();
    let mut generation = source.generation_config().cloned();
    let named = |value: &Value| value == "gpt_oss" || value == "GptOssForCausalLM";
    let family = config.get("model_type").is_some_and(named)
        || config.get("architectures").and_then(Value::as_array).is_some_and(|list| list.iter().any(named));
    if !family || config.get("vocab_size").and_then(Value::as_u64).is_none_or(|size| size <= CALL) {
        return generation;
    }
    let stated = |file: &Value| file.get("eos_token_id").filter(|value| !value.is_null()).cloned();
    let ids = generation.as_ref().and_then(stated).or_else(|| stated(config));
    let mut ids = match ids {
        Some(Value::Array(ids)) => ids,
        Some(id) => vec![id],
        None => Vec::new(),
    };
    if !ids.iter().any(|id| id.as_u64() == Some(CALL)) {
        ids.push(json!(CALL));
    }
    let file = generation.get_or_insert_with(|| json!({}));
    file["eos_token_id"] = Value::Array(ids);
    generation
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quantisation_is_replaced_and_the_rest_kept() {
        let source = json!({"model_type": "gpt_oss", "torch_dtype": "float32", "x": [1],
            "quantization": {"bits": 4}, "quantization_config": {"bits": 4}});
        let excluded = BTreeSet::from(["model.layers.0.mlp.router".to_owned()]);
        let dense = config(&source, Target::Bf16, &excluded);
        assert_eq!(dense, json!({"model_type": "gpt_oss", "torch_dtype": "bfloat16", "x": [1]}));
        let packed = config(&source, Target::Mxfp4, &excluded);
        assert_eq!(packed["quantization_config"]["quant_method"], "mxfp4");
        assert_eq!(packed["quantization_config"]["modules_to_not_convert"].as_array().unwrap().len(), 4);
        let packed = config(&json!({}), Target::Nvfp4, &excluded);
        assert_eq!(packed["dtype"], "bfloat16");
        let wanted = json!(["model.layers.0.mlp.router", "lm_head"]);
        assert_eq!(packed["quantization_config"]["ignore"], wanted);
        assert_eq!(hf_quant_config(&excluded)["quantization"]["exclude_modules"], wanted);
    }

    #[test]
    fn gpt_oss_ends_at_a_call() {
        let eos = |config: Value| {
            let source = Checkpoint::in_memory(config, Vec::new()).unwrap();
            generation_config(&source).map(|file| file["eos_token_id"].clone())
        };
        let gpt_oss =
            |ids: Value| json!({"model_type": "gpt_oss", "vocab_size": 201_088, "eos_token_id": ids});
        assert_eq!(eos(gpt_oss(json!(200_002))), Some(json!([200_002, CALL])));
        assert_eq!(eos(gpt_oss(json!([CALL, 7]))), Some(json!([CALL, 7])));
        assert_eq!(eos(gpt_oss(Value::Null)), Some(json!([CALL])));
        assert_eq!(
            eos(json!({"architectures": ["GptOssForCausalLM"], "vocab_size": 201_088})),
            Some(json!([CALL]))
        );
        assert_eq!(eos(json!({"model_type": "gpt_oss", "vocab_size": 512, "eos_token_id": 3})), None);
        assert_eq!(eos(json!({"model_type": "qwen3", "vocab_size": 201_088})), None);
    }
}
