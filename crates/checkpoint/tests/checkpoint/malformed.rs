//! Files that lie. Each case states what the message must contain, the file and the tensor among it.

use std::io::Write;

use crate::support::{dir, mxfp4_config, open_error, raw};
use ctxserve_checkpoint::Checkpoint;
use serde_json::{Value, json};

/// One entry of a header.
fn entry(name: &str, dtype: &str, shape: &str, begin: u64, end: u64) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
}

fn header(entries: &[String]) -> String {
    format!("{{{}}}", entries.join(","))
}

#[test]
fn headers_that_lie_are_refused_by_file_and_tensor() {
    let f32s = |name, begin, end| entry(name, "F32", "[2]", begin, end);
    let deep = format!(r#"{{"a":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    let rank = format!("[{}]", ["1"; 9].join(","));
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("empty file", vec![], &["0 bytes are too few"]),
        ("seven bytes", vec![0; 7], &["7 bytes are too few"]),
        ("length u64::MAX", [0xff; 16].to_vec(), &["header length 18446744073709551615 exceeds the file"]),
        ("length one too long", raw("{}", &[])[..9].to_vec(), &["header length 2 exceeds the file"]),
        ("length zero", raw("", &[]), &["header is not valid"]),
        ("not JSON", raw("hello", &[]), &["header is not valid"]),
        ("not an object", raw("[1]", &[]), &["header is not valid", "tensor names as keys"]),
        ("not UTF-8", [&2_u64.to_le_bytes()[..], &[0xff, 0xfe]].concat(), &["header is not valid"]),
        ("cut JSON", raw(r#"{"a":{"dtype":"F32""#, &[]), &["header is not valid", "\"a\""]),
        ("nesting", raw(&deep, &[]), &["header is not valid", "\"a\""]),
        ("unknown dtype", raw(&header(&[entry("a", "Q4_0", "[1]", 0, 4)]), &[0; 4]), &["\"a\"", "Q4_0"]),
        ("negative size", raw(&header(&[entry("a", "F32", "[-1]", 0, 4)]), &[0; 4]), &["\"a\"", "-1"]),
        ("fraction", raw(&header(&[entry("a", "F32", "[1.5]", 0, 4)]), &[0; 4]), &["\"a\"", "1.5"]),
        ("no offsets", raw(r#"{"a":{"dtype":"F32","shape":[1]}}"#, &[0; 4]), &["\"a\"", "data_offsets"]),
        (
            "unknown field",
            raw(r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"strides":[1]}}"#, &[0]),
            &["\"a\"", "strides"],
        ),
        ("metadata", raw(r#"{"__metadata__":{"a":1}}"#, &[]), &["\"__metadata__\""]),
        ("duplicate", raw(&header(&[f32s("a", 0, 8), f32s("a", 0, 8)]), &[0; 8]), &["\"a\"", "listed twice"]),
        ("backwards", raw(&header(&[f32s("a", 8, 0)]), &[0; 8]), &["tensor \"a\"", "[8, 0] run backwards"]),
        ("truncated", raw(&header(&[f32s("a", 0, 8)]), &[0; 7]), &["tensor \"a\"", "truncated", "7 bytes"]),
        ("short", raw(&header(&[f32s("a", 0, 7)]), &[0; 7]), &["tensor \"a\"", "takes 8 bytes", "hold 7"]),
        ("long", raw(&header(&[f32s("a", 0, 8)]), &[0; 9]), &["1 bytes after tensor \"a\""]),
        ("data without tensors", raw("{}", &[0; 5]), &["5 bytes after the header"]),
        ("leading gap", raw(&header(&[f32s("a", 1, 9)]), &[0; 9]), &["tensor \"a\"", "1 bytes before"]),
        (
            "gap",
            raw(&header(&[f32s("a", 0, 8), f32s("b", 12, 20)]), &[0; 20]),
            &["tensor \"b\"", "4 bytes before"],
        ),
        (
            "overlap",
            raw(&header(&[f32s("a", 0, 8), f32s("b", 4, 12)]), &[0; 12]),
            &["tensor \"b\"", "overlaps \"a\""],
        ),
        (
            "same bytes twice",
            raw(&header(&[f32s("a", 0, 8), f32s("b", 0, 8)]), &[0; 8]),
            &["tensor \"b\"", "overlaps \"a\""],
        ),
        (
            "empty tensor inside another",
            raw(&header(&[f32s("a", 0, 8), entry("b", "F32", "[0]", 4, 4)]), &[0; 8]),
            &["tensor \"b\"", "overlaps \"a\""],
        ),
        (
            "not a whole number of elements",
            raw(&header(&[entry("a", "F32", "[1]", 0, 5)]), &[0; 5]),
            &["tensor \"a\"", "takes 4 bytes", "hold 5"],
        ),
        (
            "half a byte",
            raw(&header(&[entry("a", "F4", "[3]", 0, 2)]), &[0; 2]),
            &["tensor \"a\"", "no byte size"],
        ),
        (
            "huge offsets",
            raw(&header(&[entry("a", "U8", "[1]", 0, u64::MAX)]), &[0]),
            &["tensor \"a\"", "truncated"],
        ),
        (
            "huge shape",
            raw(&header(&[entry("a", "U8", "[1152921504606846976]", 0, 1)]), &[0]),
            &["tensor \"a\"", "takes 1152921504606846976 bytes"],
        ),
        (
            "overflowing shape",
            raw(&header(&[entry("a", "F32", "[4294967296,4294967296]", 0, 0)]), &[]),
            &["tensor \"a\"", "no byte size"],
        ),
        ("shape beyond u64", raw(&header(&[entry("a", "U8", "[1e30]", 0, 0)]), &[]), &["\"a\"", "header"]),
        (
            "too many dimensions",
            raw(&header(&[entry("a", "U8", &rank, 0, 1)]), &[0]),
            &["\"a\"", "9 dimensions"],
        ),
        (
            "quantised without saying so",
            raw(&header(&[entry("a", "U8", "[1]", 0, 1)]), &[0]),
            &["tensor \"a\"", "U8", "declares no quantization"],
        ),
    ];
    for (case, bytes, wanted) in cases {
        let message = open_error(&bytes);
        assert!(message.contains("model.safetensors"), "{case}: {message}");
        for part in wanted {
            assert!(message.contains(part), "{case}: {message:?} lacks {part:?}");
        }
        assert!(message.len() < 1000, "{case}: {} bytes of message", message.len());
    }
}

#[test]
fn a_name_from_the_file_is_shown_escaped_and_cut() {
    let name = format!("\\u001b[31m{}", "x".repeat(5000));
    let message = open_error(&raw(&header(&[entry(&name, "F32", "[1]", 0, 5)]), &[0; 5]));
    assert!(message.contains("\\u{1b}[31m") && !message.contains('\u{1b}'), "{message}");
    assert!(message.len() < 1000, "{} bytes of message", message.len());
}

#[test]
fn a_header_over_the_limit_is_not_read() {
    let dir = dir(&json!({}), &[]);
    let mut file = std::fs::File::create(dir.path().join("model.safetensors")).unwrap();
    file.write_all(&100_000_001_u64.to_le_bytes()).unwrap();
    file.set_len(200_000_000).unwrap(); // a hole, no disk
    let message = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(message.contains("header length 100000001, at most 100000000"), "{message}");
}

/// A valid file with one F32 tensor per name.
fn shard(names: &[&str]) -> Vec<u8> {
    let entries: Vec<String> = names
        .iter()
        .enumerate()
        .map(|(i, name)| entry(name, "F32", "[1]", 4 * i as u64, 4 * i as u64 + 4))
        .collect();
    raw(&header(&entries), &vec![0; 4 * names.len()])
}

fn index(map: Value) -> Vec<u8> {
    json!({"metadata": {"total_size": 8}, "weight_map": map}).to_string().into_bytes()
}

#[test]
fn an_index_must_agree_with_its_shards() {
    const A: &str = "model-00001-of-00002.safetensors";
    const B: &str = "model-00002-of-00002.safetensors";
    const INDEX: &str = "model.safetensors.index.json";
    let twice = format!(r#"{{"weight_map":{{"a":"{A}","a":"{A}"}}}}"#).into_bytes();
    let (a, b, ab) = (shard(&["a"]), shard(&["b"]), shard(&["a", "b"]));
    let cut = &a[..a.len() - 1];
    type Files<'a> = Vec<(&'a str, &'a [u8])>;
    let cases: Vec<(&str, Vec<u8>, Files<'_>, &[&str])> = vec![
        ("missing shard", index(json!({"a": A, "b": B})), vec![(A, &a)], &[B, "not found", "\"b\""]),
        (
            "truncated shard",
            index(json!({"a": A, "b": B})),
            vec![(A, cut), (B, &b)],
            &[A, "\"a\"", "truncated"],
        ),
        (
            "swapped",
            index(json!({"a": B, "b": A})),
            vec![(A, &a), (B, &b)],
            &[A, "tensor \"a\"", "the index lists it in", B],
        ),
        ("unlisted", index(json!({"a": A})), vec![(A, &ab)], &[A, "tensor \"b\"", "does not list it"]),
        (
            "in two shards",
            index(json!({"a": A, "b": B})),
            vec![(A, &a), (B, &ab)],
            &[B, "tensor \"a\"", "the index lists it in", A],
        ),
        (
            "listed but absent",
            index(json!({"a": A, "b": A})),
            vec![(A, &a)],
            &[INDEX, "tensor \"b\"", "is not in", A],
        ),
        ("listed twice", twice, vec![(A, &a)], &[INDEX, "\"a\"", "listed twice"]),
        (
            "traversal",
            index(json!({"a": "../model.safetensors"})),
            vec![(A, &a)],
            &[INDEX, "tensor \"a\"", "not a file name"],
        ),
        (
            "absolute",
            index(json!({"a": "/etc/model.safetensors"})),
            vec![(A, &a)],
            &[INDEX, "tensor \"a\"", "not a file name"],
        ),
        ("not text", index(json!({"a": 7})), vec![(A, &a)], &[INDEX, "\"a\""]),
        ("no map", b"{}".to_vec(), vec![(A, &a)], &[INDEX, "weight_map"]),
        ("not JSON", b"\0\0".to_vec(), vec![(A, &a)], &[INDEX, "not valid"]),
        (
            "stale single file",
            index(json!({"a": A})),
            vec![(A, &a), ("model.safetensors", &a)],
            &[INDEX, "does not mention model.safetensors"],
        ),
    ];
    for (case, index, mut files, wanted) in cases {
        files.push((INDEX, &index));
        let dir = dir(&json!({}), &files);
        let message = Checkpoint::open(dir.path()).unwrap_err().to_string();
        for part in wanted {
            assert!(message.contains(part), "{case}: {message:?} lacks {part:?}");
        }
    }
}

#[test]
fn missing_files_are_named_with_what_is_there_instead() {
    let no_config = tempfile::tempdir().unwrap();
    let message = Checkpoint::open(no_config.path()).unwrap_err().to_string();
    assert!(message.contains("config.json: file not found"), "{message}");
    let message = Checkpoint::open(&no_config.path().join("absent")).unwrap_err().to_string();
    assert!(message.contains("absent: not a directory"), "{message}");
    for (file, wanted) in [
        ("pytorch_model.bin", "\"pytorch_model.bin\", but only safetensors"),
        ("model.gguf", "\"model.gguf\", but only safetensors"),
        ("weights.pt", "\"weights.pt\", but only safetensors"),
        ("model-00001-of-00002.safetensors", "neither model.safetensors nor model.safetensors.index.json"),
        ("modeling.py", "no weights"),
    ] {
        let dir = dir(&json!({}), &[(file, b"")]);
        let message = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(message.contains("model.safetensors: file not found"), "{message}");
        assert!(message.contains(wanted), "{file}: {message}");
    }
}

#[test]
fn configuration_is_bounded_and_must_be_an_object() {
    let model = shard(&["a"]);
    let deep = format!("{}{}", "[".repeat(10_000), "]".repeat(10_000)).into_bytes();
    let large = vec![b' '; (4 << 20) + 1];
    for name in ["config.json", "generation_config.json", "hf_quant_config.json"] {
        for (content, wanted) in [
            (&b"{"[..], "not valid"),
            (b"[]", "not a JSON object"),
            (b"", "not valid"),
            (b"{\"a\": Infinity}", "not valid"),
            (&deep, "recursion limit"),
            (&large, "at most 4194304 are accepted"),
        ] {
            let dir = dir(&json!({}), &[("model.safetensors", &model), (name, content)]);
            let message = Checkpoint::open(dir.path()).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains(wanted), "{name}: {message}");
        }
    }
}

#[test]
fn an_oversized_tokenizer_is_refused_before_it_is_read() {
    let dir = dir(&json!({}), &[("model.safetensors", &shard(&["a"]))]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.tokenizer_json().unwrap(), None);
    let path = dir.path().join("tokenizer.json");
    std::fs::write(&path, b"{}").unwrap();
    assert_eq!(checkpoint.tokenizer_json().unwrap().as_deref(), Some(&b"{}"[..]));
    std::fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    let message = checkpoint.tokenizer_json().unwrap_err().to_string();
    assert!(message.contains("tokenizer.json: 1099511627776 bytes"), "{message}");
}

#[test]
fn unsupported_quantisation_is_refused_by_name() {
    let model = shard(&["a"]);
    for (config, named) in [
        (json!({"quantization_config": {"quant_method": "gptq"}}), "gptq"),
        (json!({"quantization_config": {"quant_method": "MXFP4 but not really"}}), "MXFP4 but not really"),
        (json!({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}), "modelopt FP8"),
        (
            json!({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}),
            "compressed-tensors pack-quantized",
        ),
        (json!({"quantization": {"group_size": 16, "bits": 4, "mode": "nvfp4"}}), "mlx nvfp4"),
    ] {
        let dir = dir(&config, &[("model.safetensors", &model)]);
        let message = Checkpoint::open(dir.path()).unwrap_err().to_string();
        let supported = "(supported: mxfp4, nvfp4, mlx, dense)";
        let wanted = format!("config.json: quantization {named} is not supported {supported}");
        assert!(message.ends_with(&wanted), "{message}");
    }
    let declared = json!({"quantization": {"quant_algo": "W4A8_AWQ"}}).to_string();
    let dir =
        dir(&json!({}), &[("model.safetensors", &model), ("hf_quant_config.json", declared.as_bytes())]);
    let message = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(message.contains("hf_quant_config.json: quantization modelopt W4A8_AWQ"), "{message}");
}

#[test]
fn declared_mxfp4_needs_packed_tensors() {
    let dir = dir(&mxfp4_config(), &[("model.safetensors", &shard(&["a"]))]);
    let message = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(message.contains("model.safetensors: config.json declares mxfp4, but"), "{message}");
}
