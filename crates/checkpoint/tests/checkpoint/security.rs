//! The rules on model files, and what holds each. The first test below breaks each rule on a file of each format.
//!
//! | rule | held by |
//! |---|---|
//! | header: present, no longer than the file nor than the limit | `malformed::headers_that_lie_are_refused_by_file_and_tensor`, `malformed::a_header_over_the_limit_is_not_read`, here |
//! | header: JSON of the right shape, bounded nesting, names once | `malformed::headers_that_lie_are_refused_by_file_and_tensor`, here |
//! | offsets: in order, no overlap, no gap, the whole of the file | `malformed::headers_that_lie_are_refused_by_file_and_tensor`, here |
//! | dtype x shape = bytes, multiplied with checks | `malformed::headers_that_lie_are_refused_by_file_and_tensor`, here |
//! | nothing is allocated by a claimed size | `fuzz::any_changes`, `formats::absurd_wants_are_mismatches_not_allocations`, `quantised::absurd_wants_are_mismatches_in_every_format` |
//! | files that are cut while they are read | `round_trip::a_file_cut_after_opening_is_an_error_that_names_the_tensor` |
//! | the index agrees with its shards, no path leaves the directory | `malformed::an_index_must_agree_with_its_shards` |
//! | packed tensors and their scales agree; no NaN, no negative scale | `formats` (MXFP4, BF16), `quantised` (NVFP4 of both spellings, MLX) |
//! | any change at all is an error or works | `fuzz::any_changes`, `fuzz_files::files_beside_the_weights` |
//! | configurations: zero, negative, huge and contradicting values | `models/tests/suite/config.rs`, `qwen3.rs` and `config_fuzz.rs` |
//! | tokenizers: ids, nesting, added tokens within added tokens | `chat/tests/tokenizer_files.rs`, `chat/tests/fuzz_files.rs` |
//! | templates: fuel, output, recursion, no code | `chat/src/jinja`, `chat/tests/hermes_render/injection.rs` |
//! | code beside a model is not read | here, and `tests/e2e/test_security.py` |

use serde_json::{Map, Value, json};

use crate::support::{bf16s, dir, f32s, mxfp4_config, raw, tensor, write};
use crate::{formats, quantised};
use ctxserve_checkpoint::{Checkpoint, Dtype, MemoryTensor};

/// A small checkpoint of each format.
fn every_format() -> [(&'static str, Vec<MemoryTensor>, Value); 5] {
    let dense = vec![
        tensor("model.norm.weight", Dtype::F32, &[3], f32s([1.0; 3])),
        tensor("model.layers.0.mlp.experts.down_proj", Dtype::BF16, &[2, 5, 3], bf16s([1.0; 30])),
    ];
    let named = |name, (tensors, config): (Vec<MemoryTensor>, Value)| (name, tensors, config);
    [
        ("BF16", dense, json!({})),
        ("MXFP4", formats::mxfp4_layer(127), mxfp4_config()),
        named("NVFP4 of ModelOpt", quantised::modelopt()),
        named("NVFP4 of compressed-tensors", quantised::compressed()),
        named("MLX", quantised::mlx()),
    ]
}

/// A file taken apart.
struct Taken {
    header: Map<String, Value>,
    data: Vec<u8>,
}

impl Taken {
    fn of(tensors: &[MemoryTensor]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        write(&path, tensors);
        let bytes = std::fs::read(path).unwrap();
        let (length, rest) = bytes.split_first_chunk().unwrap();
        let (header, data) = rest.split_at(usize::try_from(u64::from_le_bytes(*length)).unwrap());
        Self { header: serde_json::from_slice(header).unwrap(), data: data.to_vec() }
    }

    fn file(&self) -> Vec<u8> {
        raw(&Value::Object(self.header.clone()).to_string(), &self.data)
    }

    /// Names of tensors in the order of their data.
    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> =
            self.header.keys().filter(|name| *name != "__metadata__").cloned().collect();
        names.sort_by_key(|name| self.header[name]["data_offsets"][0].as_u64());
        names
    }

    fn entry(&mut self, name: &str) -> &mut Value {
        &mut self.header[name]
    }

    fn offsets(&self, name: &str) -> [u64; 2] {
        [0, 1].map(|end| self.header[name]["data_offsets"][end].as_u64().unwrap())
    }
}

type Break = fn(&mut Taken, &str);

/// Ways to break the entry of a tensor; whether the message has to name that very tensor.
const BREAKS: &[(&str, bool, Break)] = &[
    ("no offsets", true, |taken, name| {
        drop(taken.entry(name).as_object_mut().unwrap().remove("data_offsets"));
    }),
    ("no dtype", true, |taken, name| drop(taken.entry(name).as_object_mut().unwrap().remove("dtype"))),
    ("unknown dtype", true, |taken, name| taken.entry(name)["dtype"] = json!("Q4_K")),
    ("one dimension more", true, |taken, name| {
        taken.entry(name)["shape"].as_array_mut().unwrap().push(json!(2));
    }),
    ("negative dimension", true, |taken, name| taken.entry(name)["shape"] = json!([-1])),
    ("huge dimension", true, |taken, name| taken.entry(name)["shape"] = json!([1_u64 << 62])),
    ("dimensions that overflow", true, |taken, name| {
        taken.entry(name)["shape"] = json!([1_u64 << 40, 1_u64 << 40]);
    }),
    ("another width of element", true, |taken, name| taken.entry(name)["dtype"] = json!("F64")),
    ("end beyond the file", true, |taken, name| {
        taken.entry(name)["data_offsets"][1] = json!(u64::MAX);
    }),
    ("offsets that run backwards", true, |taken, name| {
        let [begin, end] = taken.offsets(name);
        taken.entry(name)["data_offsets"] = json!([end, begin]);
    }),
    ("one byte short", true, |taken, name| {
        let [begin, end] = taken.offsets(name);
        taken.entry(name)["data_offsets"] = json!([begin, end - 1]);
    }),
    ("one byte long", true, |taken, name| {
        let [begin, end] = taken.offsets(name);
        taken.entry(name)["data_offsets"] = json!([begin, end + 1]);
    }),
    ("shifted onto its neighbour", false, |taken, name| {
        let [begin, end] = taken.offsets(name);
        taken.entry(name)["data_offsets"] = json!([begin + 1, end + 1]);
    }),
    ("left out, its data stay", false, |taken, name| drop(taken.header.remove(name))),
];

/// security: model files. CVE-2025-53630, CVE-2026-27940, CVE-2026-33298 and the rest of that class, for every format.
#[test]
fn each_rule_is_broken_in_a_file_of_each_format() {
    let mut broken = 0;
    for (format, tensors, config) in every_format() {
        let open = |bytes: &[u8]| {
            let dir = dir(&config, &[("model.safetensors", bytes)]);
            Checkpoint::open(dir.path()).map(drop).map_err(|error| error.to_string())
        };
        let whole = Taken::of(&tensors);
        assert_eq!(open(&whole.file()), Ok(()), "{format}");
        for name in whole.names() {
            for (what, named, change) in BREAKS {
                let mut taken = Taken::of(&tensors);
                change(&mut taken, &name);
                let error = open(&taken.file()).expect_err(&format!("{format}: {name}: {what}"));
                assert!(error.contains("model.safetensors"), "{format}: {what}: {error}");
                assert!(!named || error.contains(&format!("{name:?}")), "{format}: {name}: {what}: {error}");
                assert!(error.len() < 1000, "{format}: {what}: {} bytes", error.len());
                broken += 1;
            }
        }
        let file = whole.file();
        for length in [0, u64::MAX, file.len() as u64, (file.len() - 7) as u64, 1] {
            let mut lying = file.clone();
            lying[..8].copy_from_slice(&length.to_le_bytes());
            assert!(open(&lying).is_err(), "{format}: header length {length}");
        }
        for cut in (0..file.len()).step_by(13) {
            assert!(open(&file[..cut]).is_err(), "{format}: cut at {cut}");
        }
        assert!(open(&[&file[..], b"\0"].concat()).is_err(), "{format}: a byte more");
    }
    assert!(broken > 200, "{broken}");
}

/// security: code from a model, CVE-2026-65119, C7. What is named as code is neither needed nor looked at: the names lead nowhere.
#[cfg(unix)]
#[test]
fn code_beside_a_model_is_not_opened() {
    for (format, tensors, mut config) in every_format() {
        config["auto_map"] = json!({"AutoModelForCausalLM": "modeling_evil.Model"});
        config["custom_pipelines"] = json!({"x": {"impl": "evil.py"}});
        let dir = dir(&config, &[("model.safetensors", &Taken::of(&tensors).file())]);
        for name in ["modeling_evil.py", "evil.py", "pytorch_model.bin", "model.pt", "__init__.py"] {
            // Opening one would be an error.
            std::os::unix::fs::symlink(dir.path().join("nowhere"), dir.path().join(name)).unwrap();
        }
        assert!(Checkpoint::open(dir.path()).is_ok(), "{format}");
    }
}
