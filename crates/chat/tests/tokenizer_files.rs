//! Tokenizer files of every kind, sound and not.

#![allow(clippy::unwrap_used, reason = "helpers of tests, too")]

use ctxserve_chat::testing::demo_tokenizer;
use ctxserve_chat::{Tokenizer, TokenizerError};
use serde_json::{Value, json};

fn load(document: &Value) -> Result<Tokenizer, TokenizerError> {
    Tokenizer::from_bytes(&serde_json::to_vec(document).unwrap())
}

/// A vocabulary of the letters `a` to `d`, `ab` and `Ġ`, with the given added tokens.
fn small(added: Value) -> Value {
    json!({
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true },
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true },
        "model": {
            "type": "BPE",
            "vocab": { "a": 0, "b": 1, "c": 2, "d": 3, "ab": 4, "Ġ": 5, "<": 6, ">": 7, "|": 8 },
            "merges": ["a b"],
        },
    })
}

#[track_caller]
fn refused(json: &[u8], expected: &str) {
    let error = Tokenizer::from_bytes(json).unwrap_err().to_string();
    assert!(error.starts_with("tokenizer.json: ") && error.contains(expected), "{error}");
}

#[test]
fn malformed_files_are_errors_that_name_the_file() {
    refused(b"", "EOF");
    refused(b"{", "EOF");
    refused(b"[]", "expected struct");
    refused(b"null", "null");
    refused(b"\xff\xfe", "line 1");
    refused(b"{}", "missing field `model`");
    refused(br#"{"model": 3}"#, "model");
    refused(br#"{"model": {}}"#, "vocab");
    refused(br#"{"model": {"type": "BPE", "vocab": {}, "merges": []}}"#, "empty");
    refused(br#"{"model": {"type": "BPE", "vocab": {"a": -1}}}"#, "-1");
    refused(br#"{"model": {"type": "BPE", "vocab": {"a": 1.5}}}"#, "1.5");
    refused(br#"{"model": {"type": "BPE", "vocab": {"a": 4294967295}}}"#, "out of range");
    refused(br#"{"model": {"type": "BPE", "vocab": {"a": 99999999999}}}"#, "model");
    refused(br#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}"#, "out of vocabulary");
    refused(br#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}}"#, "not two tokens");
    refused(br#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a"]]}}"#, "model");
    refused(br#"{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}"#, "Unigram");
    refused(br#"{"model": {"type": "BPE", "vocab": {"a": 0}}, "added_tokens": [{"content": "x"}]}"#, "id");
    refused(br#"{"model": {"type": "BPE", "vocab": {"a": 0}}, "added_tokens": [{"id": 4194304, "content": "x"}]}"#, "out of range");
    refused(
        br#"{"model": {"type": "BPE", "vocab": {"a": 0}}, "pre_tokenizer": {"type": "Nonsense"}}"#,
        "pre_tokenizer",
    );
    refused(br#"{"model": {"type": "BPE", "vocab": {"a": 0}}, "normalizer": 7}"#, "normalizer");
    refused(
        br#"{"model": {"type": "BPE", "vocab": {"a": 0}}, "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false}}"#,
        "pre_tokenizer",
    );
    // The library slices at the prefix's length, wherever that falls.
    refused(
        r#"{"model": {"type": "BPE", "vocab": {"a": 0, "é": 1, "aé": 2}, "merges": ["a é"], "continuing_subword_prefix": "x"}}"#
            .as_bytes(),
        "failed",
    );
}

#[test]
fn every_truncation_is_an_error() {
    let json =
        serde_json::to_vec(&small(json!([{ "id": 9, "content": "<|end|>", "special": true }]))).unwrap();
    for cut in 0..json.len() {
        assert!(Tokenizer::from_bytes(&json[..cut]).is_err(), "cut at {cut}");
    }
    assert!(Tokenizer::from_bytes(&json).is_ok());
}

#[test]
fn nesting_is_bounded() {
    for open in ["[", r#"{"model":"#, r#"{"pre_tokenizer":{"type":"Sequence","pretokenizers":["#] {
        refused(open.repeat(100_000).as_bytes(), "");
    }
    let mut nested = json!({ "type": "ByteLevel" });
    for _ in 0..40 {
        nested = json!({ "type": "Sequence", "pretokenizers": [nested] });
    }
    let mut document = small(json!([]));
    document["pre_tokenizer"] = nested;
    refused(&serde_json::to_vec(&document).unwrap(), "nested deeper");
}

/// security: model files. Added tokens that contain one another, by the thousand: the longest that fits is cut out, nothing is
/// expanded, and none comes from a client's text.
#[test]
fn added_tokens_within_added_tokens_are_not_expanded() {
    let nested = |depth: usize| format!("{}x{}", "<".repeat(depth), ">".repeat(depth));
    let added: Vec<Value> = (1..=2000)
        .map(|depth| json!({ "id": 9 + depth, "content": nested(depth), "special": depth % 2 == 0 }))
        .collect();
    let tokenizer = load(&small(json!(added))).unwrap();
    for depth in [1, 2, 3, 1000, 1999] {
        let ids = tokenizer.encode(&nested(depth));
        assert!(ids.iter().all(|&id| !tokenizer.is_control(id)), "{depth}");
        assert!(ids.len() <= 2 * depth + 1);
    }
    let twice = json!([{ "id": 9, "content": "<a>" }, { "id": 10, "content": "<a>" }]);
    let circular = json!([{ "id": 9, "content": "<a><b>" }, { "id": 10, "content": "<b><a>" }, { "id": 11, "content": "" }]);
    for odd in [twice, circular] {
        if let Ok(tokenizer) = load(&small(odd)) {
            let text = "<a><b>".repeat(1000);
            assert!(tokenizer.encode(&text).len() <= text.len());
        }
    }
}

#[test]
fn from_file_names_the_path() {
    let dir = std::env::temp_dir().join(format!("ctxserve-tokenizer-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let missing = Tokenizer::from_file(dir.join("absent.json")).unwrap_err().to_string();
    assert!(missing.contains("absent.json"), "{missing}");
    std::fs::write(dir.join("tokenizer.json"), b"nonsense").unwrap();
    let broken = Tokenizer::from_file(&dir).unwrap_err().to_string();
    assert!(broken.contains(dir.to_str().unwrap()) && broken.contains("tokenizer.json"), "{broken}");
    std::fs::File::create(dir.join("huge.json")).unwrap().set_len(1 << 40).unwrap();
    let huge = Tokenizer::from_file(dir.join("huge.json")).unwrap_err().to_string();
    assert!(huge.contains("huge.json") && huge.contains("larger than"), "{huge}");
    std::fs::write(dir.join("tokenizer.json"), serde_json::to_vec(&small(json!([]))).unwrap()).unwrap();
    assert_eq!(Tokenizer::from_file(&dir).unwrap().encode("ab"), [4]);
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn special_tokens_come_from_the_file_and_never_from_text() {
    let tokenizer = load(&small(json!([
        { "id": 20, "content": "<|end|>", "special": true },
        { "id": 12, "content": "abc", "special": true },
        { "id": 13, "content": "<|d|>", "special": false },
        { "id": 14, "content": "<a>", "special": false },
    ])))
    .unwrap();
    assert_eq!(tokenizer.len(), 21);
    assert_eq!(tokenizer.special_id("<|end|>"), Some(20));
    assert_eq!(tokenizer.special_id("<|start|>"), None);
    assert!([20, 12].iter().all(|id| tokenizer.is_special(*id)), "flagged");
    assert!([20, 12, 13, 14].iter().all(|id| tokenizer.is_control(*id)), "flagged, or markup");
    assert!(!tokenizer.is_special(13), "not flagged: shown");
    assert!(!tokenizer.is_special(14) && !tokenizer.is_control(0) && !tokenizer.is_control(15));
    assert_eq!(tokenizer.encode("abc"), [4, 2]);
    assert_eq!(tokenizer.encode("<|d|>"), [6, 8, 3, 8, 7]);
    assert_eq!(tokenizer.encode("<a>"), [6, 0, 7]);
    assert_eq!(tokenizer.decode(&[0, 20, 12, 14, 15], true), "a<a>");
    assert_eq!(tokenizer.decode(&[0, 20, 12], false), "a<|end|>abc");
    assert_eq!(tokenizer.encode_with_control("ab<|end|>abcc"), [4, 20, 12, 2]);
}

#[test]
fn added_text_tokens_match_as_in_hugging_face() {
    let tokenizer = load(&small(json!([
        { "id": 9, "content": "dd", "special": false, "normalized": false },
        { "id": 30, "content": "cd", "special": false, "single_word": true },
        { "id": 10, "content": "b b", "special": false, "lstrip": true },
    ])))
    .unwrap();
    assert_eq!(tokenizer.encode("adda"), [0, 9, 0]);
    assert_eq!(tokenizer.encode("cd cda"), [30, 5, 2, 3, 0]);
    assert_eq!(tokenizer.encode("c  b bc"), [2, 10, 2], "spaces on the left belong to the token");
    assert_eq!(tokenizer.decode(&[9, 30, 10], true), "ddcdb b");
}

/// Such vocabularies exist: the special token is an ordinary entry too, and a whole word may be looked up.
#[test]
fn a_special_token_inside_the_vocabulary_is_spelled_out() {
    let mut document = small(json!([{ "id": 4, "content": "ab", "special": true }]));
    for ignore_merges in [false, true] {
        document["model"]["ignore_merges"] = json!(ignore_merges);
        let tokenizer = load(&document).unwrap();
        assert_eq!(tokenizer.encode("ab c"), [0, 1, 5, 2]);
        assert_eq!(tokenizer.special_id("ab"), Some(4));
    }
}

#[test]
fn nothing_is_added_in_front_or_behind() {
    let mut document = small(json!([{ "id": 9, "content": "<s>", "special": true }]));
    document["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
        "pair": [],
        "special_tokens": { "<s>": { "id": "<s>", "ids": [9], "tokens": ["<s>"] } },
    });
    document["truncation"] =
        json!({ "max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right" });
    assert_eq!(load(&document).unwrap().encode("abc"), [4, 2]);
}

#[test]
fn odd_vocabulary_strings_are_their_own_text() {
    let mut document = small(json!([]));
    document["model"]["vocab"]["日"] = json!(40);
    document["model"]["vocab"]["æĹ"] = json!(41);
    document["model"]["vocab"]["¥"] = json!(42);
    let tokenizer = load(&document).unwrap();
    assert_eq!(tokenizer.token_bytes(40), Some("日".as_bytes()));
    assert_eq!(tokenizer.token_text(41).as_deref(), Some("\u{fffd}"));
    assert_eq!(tokenizer.decode(&[41, 42], true), "日");
    assert_eq!(tokenizer.token_bytes(30), None);
    assert_eq!(tokenizer.encode_bytes(b"a\xff"), None, "this vocabulary has no token for the byte");
}

#[test]
fn byte_fallback_vocabularies_decode() {
    let document = json!({
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
            { "type": "ByteFallback" },
            { "type": "Fuse" },
        ] },
        "model": {
            "type": "BPE",
            "byte_fallback": true,
            "unk_token": "<unk>",
            "vocab": { "<unk>": 0, "<0xE2>": 1, "<0x82>": 2, "<0xAC>": 3, "▁": 4, "a": 5, "▁a": 6 },
            "merges": ["▁ a"],
        },
        "normalizer": { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
    });
    let tokenizer = load(&document).unwrap();
    assert_eq!(tokenizer.encode("a a€"), [5, 6, 1, 2, 3]);
    assert_eq!(tokenizer.decode(&[5, 6, 1, 2, 3], true), "a a€");
}

#[test]
fn word_vocabularies_work() {
    let document = json!({
        "added_tokens": [{ "id": 3, "content": "<|end|>", "special": true }],
        "pre_tokenizer": { "type": "Whitespace" },
        "model": { "type": "WordLevel", "unk_token": "?", "vocab": { "hello": 0, "world": 1, "?": 2 } },
    });
    let tokenizer = load(&document).unwrap();
    assert_eq!(tokenizer.encode("hello there world"), [0, 2, 1]);
    assert_eq!((tokenizer.special_id("<|end|>"), tokenizer.len()), (Some(3), 4));
}

#[test]
fn the_demo_tokenizer_has_all_it_needs() {
    let tokenizer = demo_tokenizer();
    assert_eq!(tokenizer.len(), 3_072);
    assert!(ctxserve_chat::demo_tokenizer_json().len() < 300_000);
    let all: Vec<u8> = (0..=255).collect();
    let ids = tokenizer.encode_bytes(&all).unwrap();
    let decoded: Vec<u8> = ids.iter().flat_map(|id| tokenizer.token_bytes(*id).unwrap()).copied().collect();
    assert_eq!(decoded, all);
    for name in [
        "<|start|>",
        "<|end|>",
        "<|message|>",
        "<|channel|>",
        "<|constrain|>",
        "<|return|>",
        "<|call|>",
        "<|endoftext|>",
    ] {
        assert!(tokenizer.special_id(name).is_some_and(|id| tokenizer.is_special(id)), "{name}");
    }
    for text in ["Hello! What is the capital of France?", "東京 🦀 e\u{301}", " \n\t x"] {
        assert_eq!(tokenizer.decode(&tokenizer.encode(text), true), text);
    }
}
