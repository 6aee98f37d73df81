//! Reading `tokenizer.json`: what is ours to know (ids, added tokens, bytes) and the library's encoder for the rest.

use std::collections::HashMap;

use ctxserve_core::TokenId;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::BPE;
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper};

/// Ids lie below this. Known vocabularies have under 300,000; the bound keeps a lie from sizing a table.
const MAX_VOCAB: TokenId = 1 << 22;

/// Normalisers and pre-tokenisers nest no deeper. The library's reader takes time exponential in the depth.
const MAX_NESTING: usize = 12;

#[derive(Deserialize)]
struct Document<'a> {
    #[serde(default)]
    added_tokens: Vec<AddedEntry>,
    #[serde(default)]
    normalizer: Option<Value>,
    #[serde(default)]
    pre_tokenizer: Option<Value>,
    #[serde(default)]
    decoder: Option<Value>,
    #[serde(borrow)]
    model: &'a RawValue,
}

/// An entry of `added_tokens`.
#[derive(Deserialize)]
pub(super) struct AddedEntry {
    pub(super) id: TokenId,
    pub(super) content: String,
    #[serde(default)]
    special: bool,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    normalized: Option<bool>,
}

impl AddedEntry {
    /// Skipped in shown text.
    pub(super) fn is_special(&self) -> bool {
        self.special
    }

    /// Never made of text, unlike in Hugging Face tokenizers: text from a client must not turn into protocol. Flagged,
    /// or markup by its name (`<tool_call>` is not flagged, in Qwen3).
    pub(super) fn is_control(&self) -> bool {
        self.special || (self.content.starts_with('<') && self.content.ends_with('>'))
    }

    fn for_library(&self) -> AddedToken {
        let token = AddedToken::from(self.content.as_str(), false)
            .single_word(self.single_word)
            .lstrip(self.lstrip)
            .rstrip(self.rstrip);
        match self.normalized {
            Some(normalized) => token.normalized(normalized),
            None => token,
        }
    }
}

#[derive(Deserialize)]
struct ModelKind {
    #[serde(rename = "type")]
    kind: Option<String>,
}

#[derive(Deserialize)]
struct Model {
    vocab: HashMap<String, TokenId>,
    #[serde(default)]
    merges: Vec<Merge>,
    #[serde(default)]
    unk_token: Option<String>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    fuse_unk: Option<bool>,
    #[serde(default)]
    byte_fallback: Option<bool>,
    #[serde(default)]
    ignore_merges: Option<bool>,
}

/// Both spellings that are in use.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Joined(String),
}

impl Merge {
    fn into_pair(self) -> Result<(String, String), String> {
        match self {
            Self::Pair(left, right) => Ok((left, right)),
            Self::Joined(text) => match text.split_once(' ') {
                Some((left, right)) if !right.contains(' ') => Ok((left.to_owned(), right.to_owned())),
                _ => Err(format!("model.merges: {text:?} is not two tokens")),
            },
        }
    }
}

/// How token strings spell bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spelling {
    /// GPT-2's alphabet: one printable character a byte.
    ByteLevel,
    /// Plain text; `▁` may stand for a space, `<0x0A>` for a byte.
    Plain {
        /// `▁` is a space.
        metaspace: bool,
        /// `<0xNN>` is a byte.
        bytes: bool,
    },
}

/// A tokenizer.json, read and checked.
pub(super) struct Contents {
    /// Model vocabulary.
    pub(super) vocab: Vec<(String, TokenId)>,
    /// Added tokens, special and not.
    pub(super) added: Vec<AddedEntry>,
    /// How vocabulary strings spell bytes.
    pub(super) spelling: Spelling,
    /// Encodes text without knowing any control token and without adding any.
    pub(super) encoder: tokenizers::Tokenizer,
}

/// Reads the document. Errors are sentences without the file's name.
pub(super) fn read(json: &[u8]) -> Result<Contents, String> {
    let document: Document<'_> = serde_json::from_slice(json).map_err(|e| e.to_string())?;
    for (part, value) in [
        ("normalizer", &document.normalizer),
        ("pre_tokenizer", &document.pre_tokenizer),
        ("decoder", &document.decoder),
    ] {
        if value.as_ref().is_some_and(|value| depth(value) > MAX_NESTING) {
            return Err(format!("{part} is nested deeper than {MAX_NESTING} levels"));
        }
    }
    let kind: ModelKind = serde_json::from_str(document.model.get()).map_err(|e| format!("model: {e}"))?;
    let kind = kind.kind.unwrap_or_else(|| "BPE".to_owned());
    if !matches!(kind.as_str(), "BPE" | "WordPiece" | "WordLevel") {
        return Err(format!("model.type {kind:?} is not supported; BPE, WordPiece and WordLevel are"));
    }
    let mut model: Model = serde_json::from_str(document.model.get()).map_err(|e| format!("model: {e}"))?;
    let largest = model.vocab.values().copied().chain(document.added_tokens.iter().map(|t| t.id)).max();
    match largest {
        None => return Err("model.vocab is empty".to_owned()),
        Some(id) if id >= MAX_VOCAB => {
            return Err(format!("token id {id} is out of range (below {MAX_VOCAB})"));
        }
        Some(_) => {}
    }

    let mentions_byte_level =
        |value: &Option<Value>| value.as_ref().is_some_and(|v| mentions(v, "ByteLevel"));
    let spelling = if mentions_byte_level(&document.decoder) || mentions_byte_level(&document.pre_tokenizer) {
        Spelling::ByteLevel
    } else {
        let decoder = document.decoder.as_ref();
        Spelling::Plain {
            metaspace: decoder.is_some_and(|v| mentions(v, "Metaspace") || mentions(v, "▁")),
            bytes: model.byte_fallback == Some(true) || decoder.is_some_and(|v| mentions(v, "ByteFallback")),
        }
    };
    let vocab: Vec<_> = model.vocab.iter().map(|(token, id)| (token.clone(), *id)).collect();

    let text_tokens: Vec<&AddedEntry> =
        document.added_tokens.iter().filter(|token| !token.is_control()).collect();
    // The library numbers unknown added tokens itself, unless the model knows them.
    for token in &text_tokens {
        model.vocab.entry(token.content.clone()).or_insert(token.id);
    }
    let model = if kind == "BPE" { bpe(model)? } else { other_model(document.model, &model.vocab)? };

    let mut encoder = tokenizers::Tokenizer::new(model);
    if let Some(value) = document.normalizer {
        let part: NormalizerWrapper =
            serde_json::from_value(value).map_err(|e| format!("normalizer: {e}"))?;
        encoder.with_normalizer(Some(part));
    }
    if let Some(value) = document.pre_tokenizer {
        let part: PreTokenizerWrapper =
            serde_json::from_value(value).map_err(|e| format!("pre_tokenizer: {e}"))?;
        encoder.with_pre_tokenizer(Some(part));
    }
    let text_tokens: Vec<AddedToken> = text_tokens.into_iter().map(AddedEntry::for_library).collect();
    encoder.add_tokens(&text_tokens);
    Ok(Contents { vocab, added: document.added_tokens, spelling, encoder })
}

/// Built from parts, without the library's own reader, which copies the vocabulary three times.
fn bpe(model: Model) -> Result<ModelWrapper, String> {
    let merges = model.merges.into_iter().map(Merge::into_pair).collect::<Result<Vec<_>, _>>()?;
    let mut builder = BPE::builder()
        .vocab_and_merges(model.vocab.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges)
        .fuse_unk(model.fuse_unk.unwrap_or(false))
        .byte_fallback(model.byte_fallback.unwrap_or(false))
        .ignore_merges(model.ignore_merges.unwrap_or(false));
    if let Some(token) = model.unk_token {
        builder = builder.unk_token(token);
    }
    if let Some(prefix) = model.continuing_subword_prefix {
        builder = builder.continuing_subword_prefix(prefix);
    }
    if let Some(suffix) = model.end_of_word_suffix {
        builder = builder.end_of_word_suffix(suffix);
    }
    builder.build().map(ModelWrapper::BPE).map_err(|e| format!("model: {e}"))
}

fn other_model(raw: &RawValue, vocab: &HashMap<String, TokenId>) -> Result<ModelWrapper, String> {
    let mut value: Value = serde_json::from_str(raw.get()).map_err(|e| format!("model: {e}"))?;
    value["vocab"] = vocab.iter().map(|(token, id)| (token.clone(), Value::from(*id))).collect();
    serde_json::from_value(value).map_err(|e| format!("model: {e}"))
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        Value::Object(fields) => 1 + fields.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

/// Whether any string in the value is `text`.
fn mentions(value: &Value, text: &str) -> bool {
    match value {
        Value::String(string) => string == text,
        Value::Array(items) => items.iter().any(|item| mentions(item, text)),
        Value::Object(fields) => fields.values().any(|field| mentions(field, text)),
        _ => false,
    }
}
