//! Configurations that are changed at random: a model that can be described, or an error; never a panic, never an allocation by
//! a claimed size.

use ctxserve_backend::KvDtype;
use ctxserve_checkpoint::Checkpoint;
use ctxserve_models::{LoadOptions, inspect, wants};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::{Value, json};

use crate::common::golden_dir;

/// Goldens of every family, format and spelling.
const GOLDENS: [&str; 7] = ["mxfp4", "dense", "long", "unusual", "mlx", "qwen3_nvfp4", "qwen3_nvfp4_packed"];

fn leaf() -> impl Strategy<Value = Value> {
    let number = select(vec![0, 1, 2, 3, 7, 32, 64, 128, 1 << 20, 1 << 31, 1 << 40, u64::MAX]);
    let text = select(vec![
        "",
        "yarn",
        "linear",
        "default",
        "full_attention",
        "sliding_attention",
        "gpt_oss",
        "qwen3",
        "silu",
    ]);
    prop_oneof![
        4 => number.prop_map(Value::from),
        2 => any::<i64>().prop_map(Value::from),
        2 => select(vec![0.0, -1.0, 0.5, 1e-300, 1e300]).prop_map(Value::from),
        1 => any::<bool>().prop_map(Value::from),
        1 => Just(Value::Null),
        1 => text.prop_map(Value::from),
        1 => Just(json!([])),
        1 => Just(json!({})),
        1 => Just(json!(["full_attention", 7])),
        1 => Just(json!({"rope_type": "yarn", "factor": 1e300, "original_max_position_embeddings": 1})),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_configuration(
        golden in select(GOLDENS.to_vec()),
        changes in prop::collection::vec((any::<Index>(), leaf(), any::<bool>()), 0..4),
        page_size in 1_usize..300,
    ) {
        let file = std::fs::read(golden_dir(golden).join("config.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&file).unwrap();
        let unchanged = changes.is_empty();
        for (at, value, inner) in changes {
            let fields = config.as_object_mut().unwrap();
            let at = at.index(fields.len());
            match fields.values_mut().nth(at).unwrap() {
                Value::Object(inside) if inner && !inside.is_empty() => {
                    let at = at % inside.len();
                    *inside.values_mut().nth(at).unwrap() = value;
                }
                field => *field = value,
            }
        }
        // Without weights: what a configuration claims is compared with them, and they are few.
        let opened = Checkpoint::in_memory(config.clone(), Vec::new());
        if let Ok(checkpoint) = opened {
            let error = wants(&checkpoint).unwrap_err().to_string();
            prop_assert!(error.len() < 8000, "{} bytes of message", error.len());
        }
        // And over the golden's own.
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let weights = golden_dir(golden).join("model.safetensors");
        std::os::unix::fs::symlink(weights, dir.path().join("model.safetensors")).unwrap();
        let options = LoadOptions { page_size, kv_dtype: KvDtype::Fp8E4m3 };
        match Checkpoint::open(dir.path()).map_err(Into::into).and_then(|checkpoint| inspect(&checkpoint, &options)) {
            Ok(info) => {
                // What the server multiplies with.
                let kv = &info.kv;
                let bytes = (0..kv.groups.len()).map(|group| kv.page_bytes(group)).sum::<usize>();
                prop_assert!(bytes > 0 && info.max_context > 0 && info.layers > 0, "{info:?}");
            }
            Err(error) => prop_assert!(!unchanged && error.to_string().len() < 8000, "{error}"),
        }
    }
}
