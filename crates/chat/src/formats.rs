//! The known chat formats, one row each.

use std::sync::Arc;

use crate::{ChatFormat, FormatError, Tokenizer};

type Open = fn(Arc<Tokenizer>) -> Result<Arc<dyn ChatFormat>, FormatError>;

const FORMATS: &[(&str, Open)] = &[];

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
        None => Err(FormatError::Unknown { name: name.to_owned(), known: names().collect::<Vec<_>>().join(", ") }),
    }
}
