//! Bounds on what clients may ask grammars to be.
//!
//! Everything here is checked before a grammar library sees the text, or is a count that the library itself keeps: a
//! grammar that is too large, too deep or too slow is refused, and costs no more than its own refusal.

use std::time::Duration;

use llguidance::api::ParserLimits;
use serde_json::Value;

/// Bounds that a server may set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuideLimits {
    /// Largest JSON Schema, bytes.
    pub schema_bytes: usize,
    /// Deepest JSON Schema.
    pub schema_depth: usize,
    /// Longest regular expression or grammar, and strings to choose from together, bytes.
    pub text_bytes: usize,
    /// Longest time a grammar may take to compile; what takes longer is refused.
    pub compile_time: Duration,
}

impl GuideLimits {
    /// Where nobody sets them.
    pub const DEFAULT: Self = Self {
        schema_bytes: 256 << 10,
        schema_depth: 64,
        text_bytes: 32 << 10,
        compile_time: Duration::from_secs(5),
    };
}

/// Grammars compiled at once. One that was given up keeps its place until it ends.
pub(crate) const COMPILING: usize = 4;

/// Stack of a compiling thread, of which only what is used is taken: grammar libraries descend recursively.
pub(crate) const COMPILE_STACK: usize = 256 << 20;

/// Deepest nesting of brackets in a regular expression or grammar, and longest run of operators in front of a term.
pub(crate) const TEXT_DEPTH: usize = 64;

/// Most strings to choose from.
pub(crate) const CHOICES: usize = 4096;

/// Compiled grammars kept for requests to come, and the bytes of their sources.
pub(crate) const KEPT: usize = 64;

/// See [`KEPT`].
pub(crate) const KEPT_BYTES: usize = 2 << 20;

/// What a compiled grammar may cost: at compile time, for a mask (tens of milliseconds at the very most), and in memory.
pub(crate) fn parser_limits() -> ParserLimits {
    ParserLimits {
        initial_lexer_fuel: 1_000_000,
        step_lexer_fuel: 200_000,
        step_max_items: 50_000,
        max_items_in_row: 2000,
        max_lexer_states: 20_000,
        max_grammar_size: 300_000,
        precompute_large_lexemes: false,
        verbose_errors: false,
    }
}

impl GuideLimits {
    /// Checks a schema's size and depth.
    ///
    /// # Errors
    /// Which bound, with the numbers.
    pub(crate) fn check_schema(&self, schema: &Value) -> Result<(), String> {
        // The reader of JSON has bounded the depth already, so this recursion is.
        fn depth(value: &Value) -> usize {
            match value {
                Value::Array(list) => 1 + list.iter().map(depth).max().unwrap_or(0),
                Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
                _ => 0,
            }
        }
        let (bytes, most) = (schema.to_string().len(), self.schema_bytes);
        if bytes > most {
            return Err(format!("the schema has {bytes} bytes, at most {most} are allowed"));
        }
        let (depth, most) = (depth(schema), self.schema_depth);
        if depth > most {
            return Err(format!("the schema is {depth} levels deep, at most {most} are allowed"));
        }
        strings(schema).try_for_each(|text| check_depth("a string of the schema", text))
    }

    /// Checks the size and nesting of a regular expression or grammar.
    ///
    /// # Errors
    /// Which bound, with the numbers.
    pub(crate) fn check_text(&self, what: &str, text: &str) -> Result<(), String> {
        if text.trim().is_empty() {
            return Err(format!("{what} is empty"));
        }
        let most = self.text_bytes;
        if text.len() > most {
            return Err(format!("{what} has {} bytes, at most {most} are allowed", text.len()));
        }
        check_depth(what, text)
    }
}

/// All strings in a schema: patterns are among them.
fn strings(value: &Value) -> Box<dyn Iterator<Item = &str> + '_> {
    match value {
        Value::String(text) => Box::new(std::iter::once(text.as_str())),
        Value::Array(list) => Box::new(list.iter().flat_map(strings)),
        Value::Object(map) => Box::new(map.values().flat_map(strings)),
        _ => Box::new(std::iter::empty()),
    }
}

/// Brackets are counted wherever they stand, also in quotes: what is refused by that was hardly meant.
fn check_depth(what: &str, text: &str) -> Result<(), String> {
    let (mut depth, mut deepest, mut run, mut longest) = (0_usize, 0, 0_usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        run = if matches!(byte, b'~' | b'!' | b'*' | b'+' | b'?' | b'&') { run + 1 } else { 0 };
        deepest = deepest.max(depth);
        longest = longest.max(run);
    }
    let most = deepest.max(longest);
    if most > TEXT_DEPTH {
        return Err(format!("{what} nests {most} levels deep, at most {TEXT_DEPTH} are allowed"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const LIMITS: GuideLimits = GuideLimits::DEFAULT;

    #[test]
    fn sizes_and_depths_are_bounded() {
        assert_eq!(LIMITS.check_schema(&json!({"type": "object"})), Ok(()));
        let mut deep = json!({});
        for _ in 0..LIMITS.schema_depth {
            deep = json!({"not": deep});
        }
        assert!(LIMITS.check_schema(&deep).unwrap_err().contains("deep"));
        let wide = json!({"enum": vec!["x"; LIMITS.schema_bytes / 4 + 1]});
        assert!(LIMITS.check_schema(&wide).unwrap_err().contains("bytes"));
        let pattern = json!({"pattern": "(".repeat(TEXT_DEPTH + 1)});
        assert!(LIMITS.check_schema(&pattern).unwrap_err().contains("nests"));
    }

    #[test]
    fn texts_are_bounded() {
        assert_eq!(LIMITS.check_text("regex", "(a|b)*[cd]{2}"), Ok(()));
        for text in [
            String::new(),
            " \n".to_owned(),
            "x".repeat(LIMITS.text_bytes + 1),
            "(".repeat(100),
            format!("start: {}x", "~".repeat(100)),
            format!("a{}", "?".repeat(100)),
        ] {
            assert!(LIMITS.check_text("regex", &text).is_err());
        }
    }
}
