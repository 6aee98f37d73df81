//! Directories whose configuration and index are changed at random: an error that names a file, or a checkpoint that can be
//! read; never a panic.

use std::path::Path;

use ctxserve_checkpoint::{Checkpoint, Dtype};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::{Value, json};

use crate::support::{bf16s, tensor, write};

const FILES: [&str; 4] =
    ["config.json", "generation_config.json", "hf_quant_config.json", "model.safetensors.index.json"];
const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

/// A model in two files, with everything that may be beside them.
fn model(dir: &Path) -> [Value; 4] {
    for (shard, name) in SHARDS.iter().zip(["a.weight", "b.weight"]) {
        write(&dir.join(shard), &[tensor(name, Dtype::BF16, &[2, 2], bf16s([1.0; 4]))]);
    }
    [
        json!({"architectures": ["X"], "dtype": "bfloat16", "quantization_config": null}),
        json!({"eos_token_id": [1, 2]}),
        json!({"quantization": {"quant_algo": null}}),
        json!({"metadata": {"total_size": 16}, "weight_map": {"a.weight": SHARDS[0], "b.weight": SHARDS[1]}}),
    ]
}

/// What stands in for a value, or for a name of a file.
fn leaf() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<i64>().prop_map(Value::from),
        Just(json!(1e300)),
        Just(json!([])),
        Just(json!({})),
        Just(json!([[[[7]]]])),
        select(vec![
            "",
            ".",
            "..",
            "/",
            "/etc/passwd",
            "../config.json",
            "a/b.safetensors",
            "config.json",
            "model.safetensors",
            "NUL\u{0}",
            SHARDS[0],
            SHARDS[1],
            "\u{202e}x",
        ])
        .prop_map(Value::from),
        "[ -~]{0,20}".prop_map(Value::from),
    ]
}

#[derive(Clone, Debug)]
enum Change {
    /// A value in the walk through a file becomes another.
    Value(Index, Index, Value),
    /// A key is added to the object that a walk ends in.
    Key(Index, Index, String, Value),
    /// A byte of the text.
    Byte(Index, Index, u8),
    Cut(Index, Index),
    Deep(Index, usize),
    Gone(Index),
}

fn change() -> impl Strategy<Value = Change> {
    let index = any::<Index>;
    let key =
        select(vec!["weight_map", "a.weight", "c.weight", "quantization", "quant_method", "metadata", ""]);
    prop_oneof![
        6 => (index(), index(), leaf()).prop_map(|(file, at, value)| Change::Value(file, at, value)),
        3 => (index(), index(), key, leaf()).prop_map(|(f, at, key, v)| Change::Key(f, at, key.to_owned(), v)),
        2 => (index(), index(), any::<u8>()).prop_map(|(file, at, byte)| Change::Byte(file, at, byte)),
        1 => (index(), index()).prop_map(|(file, at)| Change::Cut(file, at)),
        1 => (index(), 1_usize..100_000).prop_map(|(file, depth)| Change::Deep(file, depth)),
        1 => index().prop_map(Change::Gone),
    ]
}

/// The value that a walk of `at` steps ends in.
fn walk(tree: &mut Value, at: usize) -> &mut Value {
    let children: usize = match tree {
        Value::Object(fields) => fields.len(),
        Value::Array(list) => list.len(),
        _ => 0,
    };
    if at == 0 || children == 0 {
        return tree;
    }
    let (child, rest) = ((at - 1) % children, (at - 1) / children);
    match tree {
        Value::Object(fields) => walk(fields.values_mut().nth(child).unwrap(), rest),
        Value::Array(list) => walk(&mut list[child], rest),
        _ => unreachable!(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn files_beside_the_weights(changes in prop::collection::vec(change(), 0..4)) {
        let dir = tempfile::tempdir().unwrap();
        let mut values = model(dir.path());
        let unchanged = changes.is_empty();
        let file = |index: &Index| index.index(FILES.len());
        for change in &changes {
            match change {
                Change::Value(at, steps, value) => *walk(&mut values[file(at)], steps.index(40)) = value.clone(),
                Change::Key(at, steps, key, value) => {
                    if let Value::Object(fields) = walk(&mut values[file(at)], steps.index(40)) {
                        fields.insert(key.clone(), value.clone());
                    }
                }
                _ => {}
            }
        }
        let mut texts: Vec<Option<Vec<u8>>> = values.iter().map(|value| Some(value.to_string().into_bytes())).collect();
        for change in &changes {
            match change {
                Change::Byte(at, byte, with) => {
                    if let Some(text) = &mut texts[file(at)] && !text.is_empty() {
                        let byte = byte.index(text.len());
                        text[byte] = *with;
                    }
                }
                Change::Cut(at, end) => {
                    if let Some(text) = &mut texts[file(at)] {
                        text.truncate(end.index(text.len() + 1));
                    }
                }
                Change::Deep(at, depth) => {
                    texts[file(at)] = Some(format!("{{\"a\": {}", "[".repeat(*depth)).into_bytes());
                }
                Change::Gone(at) => texts[file(at)] = None,
                Change::Value(..) | Change::Key(..) => {}
            }
        }
        for (name, text) in FILES.iter().zip(&texts) {
            if let Some(text) = text {
                std::fs::write(dir.path().join(name), text).unwrap();
            }
        }
        match Checkpoint::open(dir.path()) {
            Ok(checkpoint) => {
                // Whatever the index said, tensors come from the directory's own files.
                for name in ["a.weight", "b.weight"].into_iter().filter(|name| checkpoint.contains(name)) {
                    prop_assert!(checkpoint.matrix(name, 2, 2).is_ok(), "{name}");
                }
            }
            Err(error) => {
                let text = error.to_string();
                prop_assert!(!unchanged && text.len() < 8000, "{text}");
                let named = text.contains(&dir.path().display().to_string()) || FILES.iter().any(|file| text.contains(file));
                prop_assert!(named, "{text}");
                prop_assert!(!text.contains("root:"), "{text}");
            }
        }
    }
}
