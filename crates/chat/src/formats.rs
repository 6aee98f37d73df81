//! The known chat formats, one row each.

use std::sync::Arc;

use crate::harmony::{self, Harmony};
use crate::{ChatFormat, FormatError, Tokenizer};

type Open = fn(Arc<Tokenizer>) -> Result<Arc<dyn ChatFormat>, FormatError>;

const FORMATS: &[(&str, Open)] = &[(harmony::NAME, |tokenizer| Ok(Arc::new(Harmony::new(tokenizer)?)))];

/// Names of the known formats, as profiles and flags spell them.
pub fn names() -> impl Iterator<Item = &'static str> {
    FORMATS.iter().map(|(name, _)| *name)
}

/// Binds the named format to a tokenizer.
///
/// # Errors
/// An unknown name, or a tokenizer without the format's control tokens.
pub fn open(name: &str, tokenizer: Arc<Tokenizer>) -> Result<Arc<dyn ChatFormat>, FormatError> {
    match FORMATS.iter().find(|(known, _)| *known == name) {
        Some((_, open)) => open(tokenizer),
        None => {
            Err(FormatError::Unknown { name: name.to_owned(), known: names().collect::<Vec<_>>().join(", ") })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::demo_tokenizer;

    #[test]
    fn every_name_opens() {
        for name in names() {
            assert_eq!(open(name, demo_tokenizer()).unwrap().name(), name);
        }
    }

    #[test]
    fn an_unknown_name_lists_the_known() {
        let error = open("telepathy", demo_tokenizer()).err().unwrap().to_string();
        assert!(error.contains("telepathy") && error.contains("harmony"), "{error}");
    }

    #[test]
    fn a_tokenizer_without_control_tokens_is_refused() {
        let json = br#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#;
        let tokenizer = Arc::new(Tokenizer::from_bytes(json).unwrap());
        let error = open("harmony", tokenizer).err().unwrap();
        assert_eq!(error, FormatError::MissingToken { format: "harmony", token: "<|return|>" });
    }
}
