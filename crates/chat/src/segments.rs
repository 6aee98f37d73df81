//! Token sequences written down by hand: control tokens by name, text, and bytes.

use ctxserve_core::TokenId;
use serde::Deserialize;
use thiserror::Error;

use crate::{End, Tokenizer};

/// A piece of a token sequence, in JSON one of `{"control": "<|channel|>"}`, `{"text": "..."}` and `{"bytes": "e2"}`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Segment {
    /// One control token, by its text.
    Control(String),
    /// Text, tokenized as the tokenizer does; never control tokens.
    Text(String),
    /// Bytes in hexadecimal, which may begin or end within a character.
    Bytes(String),
}

/// A segment that has no tokens.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SegmentError {
    /// The tokenizer has no such control token.
    #[error("segments[{index}]: the tokenizer has no control token {name:?}")]
    UnknownControl {
        /// Which segment.
        index: usize,
        /// As written.
        name: String,
    },
    /// Not pairs of hexadecimal digits.
    #[error("segments[{index}]: {bytes:?} is not hexadecimal")]
    NotHex {
        /// Which segment.
        index: usize,
        /// As written.
        bytes: String,
    },
    /// The tokenizer has no tokens for these bytes.
    #[error("segments[{index}]: the tokenizer has no tokens for the bytes {bytes}")]
    NoTokens {
        /// Which segment.
        index: usize,
        /// As written.
        bytes: String,
    },
}

/// Token ids of the segments, each tokenized by itself.
///
/// A control token that is not in the vocabulary is an error, except `<|reserved_N|>`: if the vocabulary ends before
/// `N`, it is the id `N`, which a parser must bear like any other.
///
/// # Errors
/// [`SegmentError`], which names the segment.
pub fn segments_to_ids(tokenizer: &Tokenizer, segments: &[Segment]) -> Result<Vec<TokenId>, SegmentError> {
    let mut ids = Vec::new();
    for (index, segment) in segments.iter().enumerate() {
        match segment {
            Segment::Control(name) => {
                let id = tokenizer.special_id(name).or_else(|| reserved_id(tokenizer, name));
                ids.push(id.ok_or_else(|| SegmentError::UnknownControl { index, name: name.clone() })?);
            }
            Segment::Text(text) => ids.extend(tokenizer.encode(text)),
            Segment::Bytes(hex) => {
                let bytes =
                    from_hex(hex).ok_or_else(|| SegmentError::NotHex { index, bytes: hex.clone() })?;
                let found = tokenizer.encode_bytes(&bytes);
                ids.extend(found.ok_or_else(|| SegmentError::NoTokens { index, bytes: hex.clone() })?);
            }
        }
    }
    Ok(ids)
}

/// Why a recorded sequence ends: by its last token if that is a stop token, else by length.
pub fn end_of(ids: &[TokenId], stop_ids: &[TokenId]) -> End {
    if ids.last().is_some_and(|id| stop_ids.contains(id)) { End::Stop } else { End::Cut }
}

fn reserved_id(tokenizer: &Tokenizer, name: &str) -> Option<TokenId> {
    let id: TokenId = name.strip_prefix("<|reserved_")?.strip_suffix("|>")?.parse().ok()?;
    (id as usize >= tokenizer.len()).then_some(id)
}

fn from_hex(hex: &str) -> Option<Vec<u8>> {
    let digits = hex.as_bytes();
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    digits
        .chunks(2)
        .map(|pair| {
            let digit = |at: usize| pair.get(at).and_then(|digit| char::from(*digit).to_digit(16));
            u8::try_from(digit(0)? << 4 | digit(1)?).ok()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::demo_tokenizer;

    fn ids(json: &str) -> Result<Vec<TokenId>, SegmentError> {
        let segments: Vec<Segment> = serde_json::from_str(json).unwrap();
        segments_to_ids(&demo_tokenizer(), &segments)
    }

    #[test]
    fn control_tokens_come_from_control_segments_alone() {
        let tokenizer = demo_tokenizer();
        let end = tokenizer.special_id("<|end|>").unwrap();
        assert_eq!(ids(r#"[{"control": "<|end|>"}]"#), Ok(vec![end]));
        let text = ids(r#"[{"text": "<|end|>"}]"#).unwrap();
        assert!(!text.contains(&end));
        assert_eq!(tokenizer.decode(&text, false), "<|end|>");
    }

    #[test]
    fn bytes_may_be_half_a_character() {
        let found = ids(r#"[{"bytes": "e282"}, {"bytes": "AC"}, {"bytes": ""}]"#).unwrap();
        assert_eq!(demo_tokenizer().decode(&found, false), "€");
    }

    #[test]
    fn what_has_no_tokens_is_named() {
        let name = "<|nonsense|>".to_owned();
        assert_eq!(
            ids(r#"[{"text": "a"}, {"control": "<|nonsense|>"}]"#),
            Err(SegmentError::UnknownControl { index: 1, name })
        );
        for bytes in ["e", "zz", "+1", "é2"] {
            let segments = [Segment::Bytes(bytes.to_owned())];
            let error = SegmentError::NotHex { index: 0, bytes: bytes.to_owned() };
            assert_eq!(segments_to_ids(&demo_tokenizer(), &segments), Err(error));
        }
    }

    #[test]
    fn reserved_tokens_behind_the_vocabulary_are_their_number() {
        assert_eq!(ids(r#"[{"control": "<|reserved_200013|>"}]"#), Ok(vec![200_013]));
        assert!(ids(r#"[{"control": "<|reserved_100|>"}]"#).is_err());
        let known = demo_tokenizer().special_id("<|reserved_1|>").unwrap();
        assert_eq!(ids(r#"[{"control": "<|reserved_1|>"}]"#), Ok(vec![known]));
    }

    #[test]
    fn other_segments_are_refused() {
        for json in [r#"[{"text": "a", "bytes": "62"}]"#, r#"[{"id": 1}]"#, r#"["a"]"#, r#"[{"text": 1}]"#] {
            assert!(serde_json::from_str::<Vec<Segment>>(json).is_err(), "{json}");
        }
    }

    #[test]
    fn the_last_token_tells_the_end() {
        assert_eq!(end_of(&[1, 2], &[2]), End::Stop);
        assert_eq!(end_of(&[2, 1], &[2]), End::Cut);
        assert_eq!(end_of(&[], &[2]), End::Cut);
    }
}
