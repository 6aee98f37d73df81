//! A tokenizer of Qwen2's and Qwen3's structure against the tokenizers library, on a small vocabulary.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too")]

use std::sync::OnceLock;

use ctxserve_chat::testing::{qwen_tokenizer, qwen_tokenizer_json};
use ctxserve_chat::{Detokenizer, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Added tokens that the file flags as special, and those that it does not.
const SPECIAL: usize = 14;
const VISIBLE: [&str; 12] = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
];

fn library() -> &'static tokenizers::Tokenizer {
    static LIBRARY: OnceLock<tokenizers::Tokenizer> = OnceLock::new();
    LIBRARY.get_or_init(|| tokenizers::Tokenizer::from_bytes(qwen_tokenizer_json()).unwrap())
}

/// Ids as the library finds them, and back.
#[track_caller]
fn agree(text: &str) {
    let tokenizer = qwen_tokenizer();
    let ids = tokenizer.encode(text);
    assert_eq!(ids, library().encode(text, false).unwrap().get_ids(), "of {text:?}");
    assert_eq!(tokenizer.decode(&ids, true), library().decode(&ids, true).unwrap(), "of {text:?}");
}

#[test]
fn text_of_every_kind() {
    for text in [
        "",
        "a",
        " ",
        "Hello, world! It's the model's turn; THEY'LL say we've won, I'm sure you're right, he'd know.",
        "def f(x):\n\tif x:\n\t\treturn {'a': [1, 22, 333]}\r\n    \r\n\r\n# end\n",
        "1 12 123 1,234,567.89 0x1F １２３ ½ ² Ⅷ ٣٤",
        "   leading\n\n \t\n  x  \n\n\n",
        "東京は日本の首都です。今天天气很好。안녕하세요 Привет नमस्ते ภาษาไทย",
        "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 🦀",
        "\u{a0}\u{2003}\u{3000}x\u{2028}\u{85}\u{b}\u{c}\u{0}\u{1}\u{7f}\u{feff}",
        "https://example.org/a/b?c=d&e=%20f#g <div class=\"x\">&nbsp;</div>",
    ] {
        agree(text);
    }
    for n in [1, 2, 3, 80, 3_000] {
        for unit in [" ", "\n", "\r\n", "a", "=", "9", "あ", " \n"] {
            agree(&unit.repeat(n));
            agree(&format!("x{}y", unit.repeat(n)));
        }
    }
}

#[test]
fn text_is_composed_first() {
    let tokenizer = qwen_tokenizer();
    for (decomposed, composed) in
        [("cafe\u{301}", "café"), ("\u{1100}\u{1161}\u{11a8}", "각"), ("A\u{30a}\u{212b}", "ÅÅ")]
    {
        agree(decomposed);
        assert_eq!(tokenizer.encode(decomposed), tokenizer.encode(composed));
        assert_eq!(tokenizer.decode(&tokenizer.encode(decomposed), true), composed);
    }
}

#[test]
fn digits_stand_alone_and_the_last_space_joins_its_word() {
    let tokenizer = qwen_tokenizer();
    let texts = |text: &str| -> Vec<String> {
        tokenizer.encode(text).iter().map(|id| tokenizer.token_text(*id).unwrap()).collect()
    };
    assert_eq!(texts("2024"), ["2", "0", "2", "4"]);
    // The last space of a run belongs to the word behind it: a look-ahead.
    assert_eq!(texts("a   the").last().map(String::as_str), Some(" the"));
}

#[test]
fn added_tokens_that_are_not_special_are_shown() {
    let tokenizer = qwen_tokenizer();
    for name in VISIBLE {
        let id = tokenizer.special_id(name).unwrap();
        assert!(!tokenizer.is_special(id) && tokenizer.is_control(id), "{name}");
        assert_eq!(tokenizer.decode(&[id], true), name);
        assert_eq!(library().decode(&[id], true).unwrap(), name);
        let mut detokenizer = Detokenizer::new(qwen_tokenizer());
        assert_eq!(detokenizer.push(id) + &detokenizer.finish(), name);
    }
    assert_eq!(tokenizer.special_tokens().count(), SPECIAL);
    for (name, id) in tokenizer.special_tokens() {
        assert!(tokenizer.is_control(id));
        assert_eq!(tokenizer.decode(&[id], true), "", "{name}");
        assert_eq!(library().decode(&[id], true).unwrap(), "", "{name}");
        assert_eq!(tokenizer.decode(&[id], false), name);
    }
    assert_eq!(tokenizer.control_tokens().count(), SPECIAL + VISIBLE.len());
}

#[test]
fn no_text_becomes_a_control_token() {
    let tokenizer = qwen_tokenizer();
    let names: Vec<&str> = tokenizer.control_tokens().map(|(name, _)| name).collect();
    for name in &names {
        for text in [(*name).to_owned(), format!("a{name}b"), format!(" {name}\n"), name.repeat(3)] {
            let ids = tokenizer.encode(&text);
            assert!(ids.iter().all(|id| !tokenizer.is_control(*id)), "{text:?}: {ids:?}");
            assert_eq!(tokenizer.decode(&ids, true), text);
            // The library would have made it one.
            assert_ne!(ids, library().encode(text.as_str(), false).unwrap().get_ids());
        }
    }
}

/// Qwen2's own file spells merges as text, and some files list added tokens in the vocabulary too.
#[test]
fn other_spellings_of_the_file_read_alike() {
    let mut document: Value = serde_json::from_slice(qwen_tokenizer_json()).unwrap();
    let joined = |pair: &Value| json!(format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap()));
    let merges: Vec<Value> = document["model"]["merges"].as_array().unwrap().iter().map(joined).collect();
    document["model"]["merges"] = json!(merges);
    for entry in document["added_tokens"].as_array().unwrap().clone() {
        document["model"]["vocab"][entry["content"].as_str().unwrap()] = entry["id"].clone();
    }
    for ignore_merges in [false, true] {
        document["model"]["ignore_merges"] = json!(ignore_merges);
        let other = Tokenizer::from_bytes(&serde_json::to_vec(&document).unwrap()).unwrap();
        for text in ["You may call <tool_call>\n{\"name\": 1}\n</tool_call>", "<think>", "<|im_end|>\n"] {
            assert_eq!(other.encode(text), qwen_tokenizer().encode(text));
            let written = other.encode_with_control(text);
            assert_eq!(written, library().encode(text, false).unwrap().get_ids());
        }
    }
}

proptest! {
    #[test]
    fn any_text_agrees(text in "\\PC{0,60}") {
        prop_assume!(qwen_tokenizer().find_control(&text).is_none());
        agree(&text);
    }

    #[test]
    fn any_white_space_and_punctuation_agrees(text in "[ \t\r\na1é'<>|/.,\u{301}]{0,40}") {
        prop_assume!(qwen_tokenizer().find_control(&text).is_none());
        agree(&text);
    }

    /// Text of ours, with control tokens in it, is what the library makes of it.
    #[test]
    fn written_text_agrees(pieces in prop::collection::vec((0..26usize, "[a-z \n<|]{0,6}"), 0..8)) {
        let tokenizer = qwen_tokenizer();
        let mut names: Vec<(u32, &str)> = tokenizer.control_tokens().map(|(name, id)| (id, name)).collect();
        names.sort_unstable();
        let text: String = pieces.iter().map(|(which, plain)| format!("{plain}{}", names[*which].1)).collect();
        let ids = tokenizer.encode_with_control(&text);
        let expected = library().encode(text.as_str(), false).unwrap();
        prop_assert_eq!(&ids, expected.get_ids());
        prop_assert_eq!(tokenizer.decode(&ids, false), text);
    }

    #[test]
    fn streamed_text_equals_the_whole(ids in prop::collection::vec(0..700u32, 0..30)) {
        let tokenizer = qwen_tokenizer();
        let mut detokenizer = Detokenizer::new(qwen_tokenizer());
        let mut streamed: String = ids.iter().map(|id| detokenizer.push(*id)).collect();
        streamed.push_str(&detokenizer.finish());
        prop_assert_eq!(&streamed, &tokenizer.decode(&ids, true));
        let known: Vec<u32> = ids.into_iter().filter(|id| (*id as usize) < tokenizer.len()).collect();
        prop_assert_eq!(tokenizer.decode(&known, true), library().decode(&known, true).unwrap());
    }
}
