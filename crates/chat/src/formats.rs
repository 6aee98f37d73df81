//! The known chat formats, one row each.

use std::sync::Arc;

use serde_json::Value;

use crate::harmony::{self, Harmony};
use crate::hermes::{self, Hermes};
use crate::{ChatFormat, FormatError, Tokenizer};

/// What a checkpoint brings for its prompts beside the tokenizer; formats that render by a template use it.
#[derive(Clone, Debug, Default)]
pub struct PromptFiles {
    /// A Jinja template (`chat_template.jinja`), if there is one; it wins over those of `tokenizer_config`.
    pub chat_template: Option<String>,
    /// `tokenizer_config.json`: templates, names of special tokens.
    pub tokenizer_config: Option<Value>,
}

type Open = fn(Arc<Tokenizer>, &PromptFiles) -> Result<Arc<dyn ChatFormat>, FormatError>;

struct Row {
    name: &'static str,
    /// Whether prompts are rendered by a template.
    templated: bool,
    open: Open,
}

const FORMATS: &[Row] = &[
    Row {
        name: harmony::NAME,
        templated: false,
        open: |tokenizer, _| Ok(Arc::new(Harmony::new(tokenizer)?)),
    },
    Row {
        name: hermes::NAME,
        templated: true,
        open: |tokenizer, files| Ok(Arc::new(Hermes::new(tokenizer, files)?)),
    },
];

/// Whether the named format renders prompts by a chat template; `false` for unknown names.
pub fn uses_template(name: &str) -> bool {
    FORMATS.iter().any(|row| row.name == name && row.templated)
}

/// Names of the known formats, as profiles and flags spell them.
pub fn names() -> impl Iterator<Item = &'static str> {
    FORMATS.iter().map(|row| row.name)
}

/// Binds the named format to a tokenizer and what came with it.
///
/// # Errors
/// An unknown name, a tokenizer without the format's control tokens, or a template that cannot be used.
pub fn open(
    name: &str,
    tokenizer: Arc<Tokenizer>,
    files: &PromptFiles,
) -> Result<Arc<dyn ChatFormat>, FormatError> {
    match FORMATS.iter().find(|row| row.name == name) {
        Some(row) => (row.open)(tokenizer, files),
        None => {
            Err(FormatError::Unknown { name: name.to_owned(), known: names().collect::<Vec<_>>().join(", ") })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{demo_tokenizer, qwen_tokenizer};

    #[test]
    fn every_name_opens() {
        let files = PromptFiles::default();
        for name in names() {
            let opened = [demo_tokenizer(), qwen_tokenizer()].map(|tokenizer| open(name, tokenizer, &files));
            assert_eq!(opened.iter().flatten().map(|format| format.name()).collect::<Vec<_>>(), [name]);
        }
    }

    #[test]
    fn an_unknown_name_lists_the_known() {
        let error = open("telepathy", demo_tokenizer(), &PromptFiles::default()).err().unwrap().to_string();
        assert!(error.contains("telepathy") && error.contains("harmony, hermes"), "{error}");
    }

    #[test]
    fn a_tokenizer_without_control_tokens_is_refused() {
        let json = br#"{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#;
        for (format, token) in [("harmony", "<|return|>"), ("hermes", "<|im_start|>")] {
            let tokenizer = Arc::new(Tokenizer::from_bytes(json).unwrap());
            let error = open(format, tokenizer, &PromptFiles::default()).err().unwrap();
            assert_eq!(error, FormatError::MissingToken { format, token });
        }
    }

    #[test]
    fn only_some_formats_use_a_template() {
        assert!(uses_template("hermes") && !uses_template("harmony") && !uses_template("telepathy"));
    }
}
