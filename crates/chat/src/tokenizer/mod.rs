//! Text to token ids and back, from a checkpoint's `tokenizer.json`.

mod control;
mod file;
mod segments;
mod table;

use std::collections::HashMap;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use ctxserve_core::TokenId;
use thiserror::Error;

use control::ControlNames;
use file::Spelling;
use segments::{pieces, segments};
use table::TokenTable;

/// A larger tokenizer.json is refused unread. The largest known are under 40 MB.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// A tokenizer.json that cannot be used.
#[derive(Debug, Error)]
pub enum TokenizerError {
    /// The file cannot be read.
    #[error("{file}: {source}")]
    Read {
        /// Path as given.
        file: String,
        /// Why.
        source: std::io::Error,
    },
    /// The contents are not a tokenizer that this version knows.
    #[error("{file}: not a usable tokenizer: {what}")]
    Invalid {
        /// Path as given, or `tokenizer.json` for bytes.
        file: String,
        /// What is wrong.
        what: String,
    },
}

/// A vocabulary with its encoder. Text never becomes a control token; those have ids by name.
///
/// Control tokens are the added tokens that are flagged as special, or that are markup by their name (`<tool_call>`).
/// The special ones among them are not shown in decoded text, the others are, as in Hugging Face tokenizers.
pub struct Tokenizer {
    encoder: tokenizers::Tokenizer,
    table: TokenTable,
    byte_ids: Box<[Option<TokenId>; 256]>,
    is_byte_level: bool,
    added: HashMap<String, TokenId>,
    control: ControlNames,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("len", &self.len()).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json`, or the one in a directory.
    ///
    /// # Errors
    /// [`TokenizerError`], which names the file.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        let path = path.as_ref();
        let path = if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() };
        let file = path.display().to_string();
        let read_error = |source| TokenizerError::Read { file: file.clone(), source };
        let opened = std::fs::File::open(&path).map_err(read_error)?;
        let mut json = Vec::new();
        if opened.metadata().map_err(read_error)?.len() <= MAX_FILE_BYTES {
            // What is not a regular file has no length, and may have no end.
            opened.take(MAX_FILE_BYTES).read_to_end(&mut json).map_err(read_error)?;
            Self::from_named(&json, &file)
        } else {
            Err(TokenizerError::Invalid { file, what: format!("larger than {MAX_FILE_BYTES} bytes") })
        }
    }

    /// Reads the bytes of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`TokenizerError::Invalid`].
    pub fn from_bytes(json: &[u8]) -> Result<Self, TokenizerError> {
        Self::from_named(json, "tokenizer.json")
    }

    fn from_named(json: &[u8], file: &str) -> Result<Self, TokenizerError> {
        let invalid = |what: String| TokenizerError::Invalid { file: file.to_owned(), what };
        // The library indexes and unwraps while it builds: a file must not be able to end the process.
        let contents = catch_unwind(|| file::read(json))
            .unwrap_or_else(|_| Err("the tokenizers library failed on it".to_owned()))
            .map_err(invalid)?;
        let table = TokenTable::new(&contents);
        let byte_ids = table.byte_ids();
        let is_byte_level = contents.spelling == Spelling::ByteLevel;
        let control = contents.added.iter().filter(|token| token.is_control());
        let control = ControlNames::new(control.map(|token| (token.content.as_str(), token.id)));
        let added = contents.added.into_iter().map(|token| (token.content, token.id)).collect();
        Ok(Self { encoder: contents.encoder, table, byte_ids, is_byte_level, added, control })
    }

    /// Ids of plain text. Text that spells a control token is text; nothing is added in front or behind.
    pub fn encode(&self, text: &str) -> Vec<TokenId> {
        let mut ids = Vec::new();
        self.encode_into(text, &mut ids);
        ids
    }

    /// As [`Tokenizer::encode`], appending.
    pub fn encode_into(&self, text: &str, ids: &mut Vec<TokenId>) {
        if self.is_byte_level {
            for segment in segments(text) {
                self.encode_segment(segment, ids);
            }
        } else {
            self.encode_segment(text, ids);
        }
    }

    fn encode_segment(&self, text: &str, ids: &mut Vec<TokenId>) {
        match self.encode_with_library(text) {
            Some(found) => self.extend_plain(&found, ids),
            // The library unwinds where its regex engine gives up. Shorter text works; its tokens spell the same,
            // though perhaps not in the canonical way at the cuts.
            None => {
                for piece in pieces(text) {
                    match self.encode_with_library(piece) {
                        Some(found) => self.extend_plain(&found, ids),
                        None => ids.extend(piece.bytes().filter_map(|byte| self.byte_id(byte))),
                    }
                }
            }
        }
    }

    fn encode_with_library(&self, text: &str) -> Option<Vec<TokenId>> {
        let encoding = catch_unwind(AssertUnwindSafe(|| self.encoder.encode_fast(text, false))).ok()?.ok()?;
        Some(encoding.get_ids().to_vec())
    }

    /// Some vocabularies list control tokens among the ordinary ones, so that the model could match them: those are
    /// spelled out byte by byte.
    fn extend_plain(&self, found: &[TokenId], ids: &mut Vec<TokenId>) {
        for &id in found {
            if self.is_control(id) {
                let bytes = self.token_bytes(id).unwrap_or_default();
                ids.extend(bytes.iter().filter_map(|byte| self.byte_id(*byte)));
            } else {
                ids.push(id);
            }
        }
    }

    /// Ids of text that we wrote ourselves, in which control tokens are spelled out. Never for client text.
    pub fn encode_with_control(&self, text: &str) -> Vec<TokenId> {
        let (mut ids, mut rest) = (Vec::new(), text);
        while let Some((at, len, id)) = self.find_control(rest) {
            self.encode_into(&rest[..at], &mut ids);
            ids.push(id);
            rest = &rest[at + len..];
        }
        self.encode_into(rest, &mut ids);
        ids
    }

    /// The first control token that the text spells, the longest where several begin: the byte it begins at, its
    /// length in bytes, its id.
    pub fn find_control(&self, text: &str) -> Option<(usize, usize, TokenId)> {
        self.control.find(text)
    }

    /// Control tokens with their ids, in no order.
    pub fn control_tokens(&self) -> impl Iterator<Item = (&str, TokenId)> {
        self.added.iter().map(|(text, id)| (text.as_str(), *id)).filter(|(_, id)| self.is_control(*id))
    }

    /// Ids of bytes that may begin or end within a character; `None` if the vocabulary has no token for a stray
    /// byte.
    pub fn encode_bytes(&self, bytes: &[u8]) -> Option<Vec<TokenId>> {
        let mut ids = Vec::new();
        for chunk in bytes.utf8_chunks() {
            self.encode_into(chunk.valid(), &mut ids);
            for byte in chunk.invalid() {
                ids.push(self.byte_id(*byte)?);
            }
        }
        Some(ids)
    }

    fn byte_id(&self, byte: u8) -> Option<TokenId> {
        self.byte_ids[usize::from(byte)]
    }

    /// Id of an added token by its text, for example `<|start|>`.
    pub fn special_id(&self, text: &str) -> Option<TokenId> {
        self.added.get(text).copied()
    }

    /// Special tokens with their ids, in no order.
    pub fn special_tokens(&self) -> impl Iterator<Item = (&str, TokenId)> {
        self.added.iter().map(|(text, id)| (text.as_str(), *id)).filter(|(_, id)| self.is_special(*id))
    }

    /// Whether the id is a control token whose text is not shown.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.table.is_special(id)
    }

    /// Whether the id is a control token, shown or not: no text of a client becomes it.
    pub fn is_control(&self, id: TokenId) -> bool {
        self.table.is_control(id)
    }

    /// What the token stands for, often not whole characters; of a special token, its text. `None` if there is no
    /// such id.
    pub fn token_bytes(&self, id: TokenId) -> Option<&[u8]> {
        self.table.bytes(id)
    }

    /// [`Tokenizer::token_bytes`] as text, U+FFFD for what is not.
    pub fn token_text(&self, id: TokenId) -> Option<String> {
        self.token_bytes(id).map(|bytes| String::from_utf8_lossy(bytes).into_owned())
    }

    /// Highest id + 1. Ids below it may be unused, and the model's logits may be wider.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Whether there are no tokens; never true of a loaded tokenizer.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Text of the ids, U+FFFD for bytes that are no character. Unknown ids are nothing.
    pub fn decode(&self, ids: &[TokenId], skip_special: bool) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            if !(skip_special && self.is_special(id)) {
                bytes.extend_from_slice(self.token_bytes(id).unwrap_or_default());
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}
