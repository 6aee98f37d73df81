//! Support for tests: the real o200k vocabulary of gpt-oss, offline, and a small one like Qwen3's.
#![expect(clippy::expect_used, reason = "only tests call this, and they should stop here")]

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use serde_json::{Map, Value, json};

use crate::Tokenizer;

/// Ordinary tokens of o200k.
const RANKS: u32 = 199_998;

/// Size of gpt-oss's vocabulary.
const SIZE: u32 = 201_088;

const SPLIT: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// gpt-oss's tokenizer, made once a process.
pub fn o200k_tokenizer() -> Arc<Tokenizer> {
    static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    let make = || Arc::new(Tokenizer::from_bytes(&o200k_tokenizer_json()).expect("o200k is a tokenizer"));
    Arc::clone(TOKENIZER.get_or_init(make))
}

/// The demo tokenizer, made once a process.
pub fn demo_tokenizer() -> Arc<Tokenizer> {
    static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    let make = || {
        Arc::new(
            Tokenizer::from_bytes(crate::demo_tokenizer_json()).expect("the demo tokenizer is a tokenizer"),
        )
    };
    Arc::clone(TOKENIZER.get_or_init(make))
}

/// A small tokenizer with Qwen3's pipeline and added tokens, made once a process.
pub fn qwen_tokenizer() -> Arc<Tokenizer> {
    static TOKENIZER: OnceLock<Arc<Tokenizer>> = OnceLock::new();
    let make =
        || Arc::new(Tokenizer::from_bytes(qwen_tokenizer_json()).expect("the small one is a tokenizer"));
    Arc::clone(TOKENIZER.get_or_init(make))
}

/// `tokenizer.json` of [`qwen_tokenizer`].
pub fn qwen_tokenizer_json() -> &'static [u8] {
    include_bytes!("../tests/data/qwen/tokenizer.json")
}

/// gpt-oss's `tokenizer.json`, from tiktoken's ranks in the way Hugging Face converts them.
pub fn o200k_tokenizer_json() -> Vec<u8> {
    let tokens = o200k_ranks();
    let by_bytes: HashMap<&[u8], usize> =
        tokens.iter().enumerate().map(|(rank, t)| (t.as_slice(), rank)).collect();
    let alphabet = alphabet();
    let spell = |bytes: &[u8]| bytes.iter().map(|byte| alphabet[usize::from(*byte)]).collect::<String>();

    let mut vocab = Map::new();
    let mut merges = Vec::new();
    for (rank, token) in tokens.iter().enumerate() {
        vocab.insert(spell(token), json!(rank));
        // Every pair that makes the token: tiktoken merges by the rank of the result alone.
        let mut pairs: Vec<_> = (1..token.len())
            .filter_map(|at| {
                let (left, right) = token.split_at(at);
                Some((*by_bytes.get(left)?, *by_bytes.get(right)?, at))
            })
            .collect();
        pairs.sort_unstable();
        merges.extend(pairs.into_iter().map(|(.., at)| json!([spell(&token[..at]), spell(&token[at..])])));
    }
    let added = |id: u32| {
        json!({
            "id": id, "content": o200k_special(id), "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    };
    let added: Vec<Value> = (RANKS..SIZE).map(added).collect();
    let document = json!({
        "version": "1.0",
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
            { "type": "Split", "pattern": { "Regex": SPLIT }, "behavior": "Isolated", "invert": false },
            { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false },
        ] },
        "post_processor": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true },
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": { "type": "BPE", "ignore_merges": true, "vocab": vocab, "merges": merges },
    });
    serde_json::to_vec(&document).expect("JSON values serialise")
}

/// o200k's ordinary tokens by rank.
pub fn o200k_ranks() -> Vec<Vec<u8>> {
    let bpe = tiktoken_rs::o200k_base_singleton();
    (0..RANKS).map(|rank| bpe.decode_bytes(&[rank]).expect("ranks have no holes")).collect()
}

/// Text of a special token of `o200k_harmony`.
pub fn o200k_special(id: u32) -> String {
    match id {
        199_998 => "<|startoftext|>".to_owned(),
        199_999 => "<|endoftext|>".to_owned(),
        200_002 => "<|return|>".to_owned(),
        200_003 => "<|constrain|>".to_owned(),
        200_005 => "<|channel|>".to_owned(),
        200_006 => "<|start|>".to_owned(),
        200_007 => "<|end|>".to_owned(),
        200_008 => "<|message|>".to_owned(),
        200_012 => "<|call|>".to_owned(),
        _ => format!("<|reserved_{id}|>"),
    }
}

/// The character that stands for each byte.
fn alphabet() -> Vec<char> {
    let mut spare = (0x100..).filter_map(char::from_u32);
    (0..=u8::MAX)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            _ => spare.next().expect("there are enough characters"),
        })
        .collect()
}
