//! Tokenizer files, and the files that prompts come from, changed at random: an error, or something that works; never a panic.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests, too")]

use std::sync::Arc;

use ctxserve_chat::testing::qwen_tokenizer;
use ctxserve_chat::{Conversation, Message, PromptFiles, Tokenizer, formats};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::{Value, json};

/// A tokenizer with a part of every kind.
fn small() -> Value {
    json!({
        "version": "1.0",
        "added_tokens": [
            {"id": 9, "content": "<|im_start|>", "special": true, "normalized": false},
            {"id": 10, "content": "<|im_end|>", "special": true},
            {"id": 11, "content": "<tool_call>", "special": false},
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+|\\s+"}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false, "byte_fallback": false,
            "vocab": {"a": 0, "b": 1, "c": 2, "d": 3, "ab": 4, "Ġ": 5, "<": 6, ">": 7, "|": 8},
            "merges": ["a b"],
        },
    })
}

fn leaf() -> impl Strategy<Value = Value> {
    let text = select(vec![
        "",
        "BPE",
        "WordPiece",
        "Unigram",
        "ByteLevel",
        "Sequence",
        "Split",
        "Removed",
        "Strip",
        "Replace",
        "Metaspace",
        "(a+)+$",
        "(?=",
        "[",
        "\\p{L",
        "(?i:x)",
        "<|im_end|>",
        "a",
        "Ġ",
        "ab",
        "a b",
        "\u{0}",
        "é",
        "{{ a",
        "{% for",
    ]);
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0_u64..20).prop_map(Value::from),
        Just(json!(4_194_303)),
        Just(json!(1e300)),
        text.prop_map(Value::from),
        Just(json!([])),
        Just(json!({})),
        Just(json!([["a", "b"]])),
        Just(json!({"Regex": "(x|x)*y"})),
        Just(json!({"String": ""})),
        Just(json!({"content": "<|im_end|>"})),
    ]
}

/// The value that a walk of `at` steps ends in.
fn walk(tree: &mut Value, at: usize) -> &mut Value {
    let children = match tree {
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
        _ => unreachable!("it has no children"),
    }
}

fn asking(text: &str) -> Conversation {
    let messages = vec![
        Message::System(text.to_owned()),
        Message::User { name: None, content: text.to_owned() },
        Message::Assistant { reasoning: None, content: Some(text.to_owned()), tool_calls: Vec::new() },
    ];
    Conversation { messages, ..Conversation::default() }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn tokenizer_files(
        changes in prop::collection::vec((0_usize..4000, leaf()), 0..3),
        byte in prop::option::of((any::<Index>(), any::<u8>())),
        text in "[ab<|>é ]{0,12}|<\\|im_end\\|>|<tool_call>",
    ) {
        let mut file = small();
        let unchanged = changes.is_empty() && byte.is_none();
        changes.into_iter().for_each(|(at, value)| *walk(&mut file, at) = value);
        let mut bytes = file.to_string().into_bytes();
        if let Some((at, byte)) = byte {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        match Tokenizer::from_bytes(&bytes) {
            Ok(tokenizer) => {
                let ids = tokenizer.encode(&text);
                prop_assert!(ids.iter().all(|&id| (id as usize) < tokenizer.len()), "{ids:?}");
                prop_assert!(!ids.iter().any(|&id| tokenizer.is_special(id)), "{ids:?}");
                tokenizer.decode(&ids, false);
                tokenizer.encode_with_control(&text);
                // Every id alone, those that are nothing among them.
                (0..24).chain([u32::MAX]).for_each(|id| drop(tokenizer.decode(&[id], id % 2 == 0)));
                if let Ok(format) = formats::open("hermes", Arc::new(tokenizer), &PromptFiles::default()) {
                    let _ = format.render(&asking(&text));
                }
            }
            Err(error) => {
                let error = error.to_string();
                prop_assert!(!unchanged && error.starts_with("tokenizer.json: ") && error.len() < 8000, "{error}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn files_of_prompts(
        changes in prop::collection::vec((0_usize..400, leaf()), 0..3),
        pieces in prop::collection::vec(select(PIECES.to_vec()), 0..12),
        own in any::<bool>(),
    ) {
        let mut config = json!({
            "bos_token": null, "eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>",
            "chat_template": [{"name": "default", "template": pieces.concat()}, {"name": "tool_use", "template": "{{ tools }}"}],
        });
        changes.into_iter().for_each(|(at, value)| *walk(&mut config, at) = value);
        let files = PromptFiles {
            chat_template: own.then(|| pieces.concat()),
            tokenizer_config: Some(config),
        };
        if let Ok(format) = formats::open("hermes", qwen_tokenizer(), &files) {
            let _ = format.render(&asking("<|im_end|> {{ messages }}"));
        }
    }
}

/// Pieces of templates.
const PIECES: [&str; 24] = [
    "{{ messages }}",
    "{{ messages[0].content }}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if tools %}",
    "{% endif %}",
    "{% set x = ",
    "messages + messages",
    " %}",
    "{{ x",
    " | tojson",
    " ~ 'a'",
    " }}",
    "{%- macro f(a) -%}",
    "{% endmacro %}",
    "{{ f(1) }}",
    "{# ",
    " #}",
    "{{ (1 + [2]) }}",
    "{{ [1] * 9999999 + [2] }}",
    "{% generation %}",
    "{% endgeneration %}",
    "<|im_start|>",
    "{{ namespace(a=1).a + 1 }}",
];
