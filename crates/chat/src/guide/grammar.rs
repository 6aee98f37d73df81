//! Grammars: what may be asked for, compiled and followed.

use std::fmt::{self, Debug};

use ctxserve_core::{ConstraintError, TokenId, TokenMask};
use llguidance::Matcher;
use llguidance::api::TopLevelGrammar;
use serde_json::{Value, json};

use super::limits::{CHOICES, GuideLimits};
use super::vocabulary::Vocabulary;

/// White space between two tokens of JSON: at most eight characters, or a model at a loss writes blanks to the end.
const WHITE_SPACE: &str = r"[ \t\n\r]{1,8}";

/// A language that a text has to be in.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// A JSON value of a schema.
    Json {
        /// JSON Schema: an object or a boolean.
        schema: Value,
        /// Refuse schemas with keywords that cannot be enforced; else those keywords are ignored.
        strict: bool,
    },
    /// A regular expression, matched as a whole.
    Regex(String),
    /// One of these strings.
    Choice(Vec<String>),
    /// A context-free grammar in the Lark dialect of llguidance.
    Lark(String),
    /// As `Lark`, written by a chat format around schemas that were checked one by one.
    Composed(String),
}

impl Grammar {
    /// Any JSON object.
    pub fn json_object() -> Self {
        Self::Json { schema: json!({"type": "object"}), strict: false }
    }

    /// A name for the cache: equal grammars have equal names.
    pub(super) fn key(&self) -> String {
        match self {
            Self::Json { schema, strict } => format!("json {strict} {schema}"),
            Self::Regex(text) => format!("regex {text}"),
            Self::Choice(list) => format!("choice {}", json!(list)),
            Self::Lark(text) => format!("lark {text}"),
            Self::Composed(text) => format!("composed {text}"),
        }
    }

    /// Checks sizes and depths: quick, and nothing recursive has run before.
    ///
    /// # Errors
    /// What is wrong, for the client.
    pub(super) fn check(&self, limits: &GuideLimits) -> Result<(), String> {
        match self {
            Self::Json { schema, .. } => {
                if !(schema.is_object() || schema.is_boolean()) {
                    return Err("a JSON Schema is an object".to_owned());
                }
                if schema == false {
                    return Err("the schema false allows nothing".to_owned());
                }
                limits.check_schema(schema)
            }
            Self::Regex(text) => {
                // The library drops a last backslash that escapes nothing, and with it what was meant.
                if text.bytes().rev().take_while(|&byte| byte == b'\\').count() % 2 == 1 {
                    return Err("the regular expression ends within an escape".to_owned());
                }
                limits.check_text("the regular expression", text)
            }
            Self::Lark(text) => limits.check_text("the grammar", text),
            Self::Composed(_) => Ok(()),
            Self::Choice(list) => {
                let bytes: usize = list.iter().map(String::len).sum();
                let most = limits.text_bytes;
                if list.is_empty() || list.len() > CHOICES || bytes > most {
                    return Err(format!(
                        "a choice is 1 to {CHOICES} strings of at most {most} bytes together"
                    ));
                }
                if list.iter().any(String::is_empty) {
                    return Err("a string to choose must not be empty".to_owned());
                }
                Ok(())
            }
        }
    }

    /// Compiles. To be called on a thread with a large stack, after [`Grammar::check`].
    ///
    /// # Errors
    /// What is wrong, for the client.
    pub(super) fn compile(&self, vocabulary: &Vocabulary) -> Result<Follower, String> {
        let compile = |grammar| {
            let parser = vocabulary.factory().create_parser(grammar).map_err(|error| message(&error))?;
            Ok(Follower { matcher: Box::new(Matcher::new(Ok(parser))), len: vocabulary.len() })
        };
        let top = match self {
            Self::Json { schema, strict } => {
                let exact = compile(TopLevelGrammar::from_json_schema(with_options(schema, false)));
                if exact.is_ok() || *strict {
                    return exact;
                }
                // A keyword that cannot be enforced may be left out; what is no schema stays an error.
                let lenient = compile(TopLevelGrammar::from_json_schema(with_options(schema, true)));
                return lenient.map_err(|_| exact.err().unwrap_or_default());
            }
            Self::Regex(text) => TopLevelGrammar::from_regex(text),
            Self::Lark(text) | Self::Composed(text) => TopLevelGrammar::from_lark(text.clone()),
            Self::Choice(list) => {
                let quoted: Vec<String> = list.iter().map(|text| json!(text).to_string()).collect();
                TopLevelGrammar::from_lark(format!("start: {}", quoted.join(" | ")))
            }
        };
        compile(top)
    }
}

/// The schema with our options for the compiler; a client's own are taken out.
pub(crate) fn with_options(schema: &Value, lenient: bool) -> Value {
    let mut schema = match schema {
        Value::Object(map) => map.clone(),
        // `true` is any value; `false` is refused.
        _ => serde_json::Map::new(),
    };
    schema.insert("x-guidance".to_owned(), json!({"whitespace_pattern": WHITE_SPACE, "lenient": lenient}));
    Value::Object(schema)
}

/// The library's words without what it appends for its own developers.
fn message(error: &impl fmt::Display) -> String {
    let text = error.to_string();
    let text = text.split("<backtrace>").next().unwrap_or_default();
    let text = text.split("<non-verbose/>").next().unwrap_or_default().trim();
    text.chars().take(500).collect()
}

/// A text in progress.
pub(crate) struct Follower {
    matcher: Box<Matcher>,
    len: usize,
}

impl Follower {
    /// Ids that may come next, and whether the text may end here.
    ///
    /// # Errors
    /// Nothing may follow and this is no end, or the grammar became too complex.
    pub(crate) fn next(&mut self) -> Result<(TokenMask, bool), ConstraintError> {
        let fail = |error: &dyn fmt::Display| ConstraintError::new(message(&error));
        if self.matcher.is_stopped() {
            let reason = self.matcher.stop_reason();
            return if reason.is_ok() { Ok((TokenMask::none(self.len), true)) } else { Err(fail(&reason)) };
        }
        let may_end = self.matcher.is_accepting().map_err(|error| fail(&error))?;
        match self.matcher.compute_mask() {
            Ok(mask) => Ok((TokenMask::from_words(mask.into(), self.len), may_end)),
            Err(_) if may_end => Ok((TokenMask::none(self.len), true)),
            Err(error) => Err(fail(&error)),
        }
    }

    /// Takes a token.
    ///
    /// # Errors
    /// It may not follow, or the grammar became too complex.
    pub(crate) fn accept(&mut self, id: TokenId) -> Result<(), ConstraintError> {
        self.matcher.consume_token(id).map_err(|error| ConstraintError::new(message(&error)))
    }

    /// A copy that shares nothing.
    pub(crate) fn fork(&self) -> Self {
        Self { matcher: Box::new(self.matcher.deep_clone()), len: self.len }
    }
}

impl Debug for Follower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Follower").finish_non_exhaustive()
    }
}
