//! A JSON value in text that comes piece by piece.
//!
//! Bad escapes and raw control characters in strings are repaired, but only if the value then is JSON: from the first
//! repair on, text is held back until that is known, so that what is no JSON comes through verbatim. Work is linear.

use serde::de::IgnoredAny;

use crate::work;

/// Whether the text is one JSON value.
pub(crate) fn is_json(text: &str) -> bool {
    work::count(text.len());
    serde_json::from_str::<IgnoredAny>(text).is_ok()
}

/// Where in a value the next character stands.
#[derive(Clone, Debug, Default)]
enum At {
    #[default]
    Outside,
    String,
    /// Behind a backslash.
    Escape,
    /// Behind `\u` and so many hexadecimal digits.
    Unicode(String),
}

/// An object or list, up to its last bracket.
#[derive(Clone, Debug, Default)]
pub(crate) struct Value {
    at: At,
    open: Vec<char>,
    /// The brackets do not match: no JSON.
    broken: bool,
    /// Text so far, repaired; an unfinished escape is not in it yet.
    fixed: String,
    /// Bytes of `fixed` up to the first repair; those behind it may not be sent yet.
    clean: Option<usize>,
    /// Text as written from the first repair on.
    raw: String,
    sent: usize,
}

impl Value {
    /// Takes text; the number of its bytes that belong to the value once that is whole or hopeless.
    pub(crate) fn push(&mut self, text: &str) -> Option<usize> {
        for (at, c) in text.char_indices() {
            work::count(1);
            self.character(c);
            if self.clean.is_some() {
                self.raw.push(c);
            }
            if self.broken || self.open.is_empty() {
                return Some(at + c.len_utf8());
            }
        }
        None
    }

    fn character(&mut self, c: char) {
        match std::mem::take(&mut self.at) {
            At::Outside => {
                match c {
                    '"' => self.at = At::String,
                    '{' => self.open.push('}'),
                    '[' => self.open.push(']'),
                    '}' | ']' => self.broken = self.open.pop() != Some(c),
                    _ => {}
                }
                self.fixed.push(c);
            }
            At::String => self.in_string(c),
            At::Escape => match c {
                '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't' => {
                    self.fixed.extend(['\\', c]);
                    self.at = At::String;
                }
                'u' => self.at = At::Unicode(String::new()),
                _ => self.double_backslash("", c),
            },
            At::Unicode(mut digits) if c.is_ascii_hexdigit() => {
                digits.push(c);
                if digits.len() == 4 {
                    self.fixed.push_str("\\u");
                    self.fixed.push_str(&digits);
                    self.at = At::String;
                } else {
                    self.at = At::Unicode(digits);
                }
            }
            At::Unicode(digits) => self.double_backslash(&format!("u{digits}"), c),
        }
    }

    fn in_string(&mut self, c: char) {
        self.at = At::String;
        match c {
            '"' => {
                self.at = At::Outside;
                self.fixed.push(c);
            }
            '\\' => self.at = At::Escape,
            '\0'..='\x1f' => {
                self.repair("");
                match c {
                    '\n' => self.fixed.push_str("\\n"),
                    '\r' => self.fixed.push_str("\\r"),
                    '\t' => self.fixed.push_str("\\t"),
                    _ => self.fixed.push_str(&format!("\\u{:04x}", u32::from(c))),
                }
            }
            _ => self.fixed.push(c),
        }
    }

    /// The backslash before `text` began no escape: it stands for itself.
    fn double_backslash(&mut self, text: &str, c: char) {
        self.repair(&format!("\\{text}"));
        self.fixed.push_str("\\\\");
        self.fixed.push_str(text);
        self.in_string(c);
    }

    /// From here on `fixed` and the text as written differ; `written` precedes the present character.
    fn repair(&mut self, written: &str) {
        if self.clean.is_none() {
            self.clean = Some(self.fixed.len());
            self.raw.push_str(written);
        }
    }

    /// Sends what is certain.
    pub(crate) fn send(&mut self, out: &mut String) {
        let certain = self.clean.unwrap_or(self.fixed.len());
        out.push_str(&self.fixed[self.sent..certain]);
        self.sent = certain;
    }

    /// The rest as written.
    pub(crate) fn send_raw(&self, out: &mut String) {
        out.push_str(&self.fixed[self.sent..self.clean.unwrap_or(self.fixed.len())]);
        if self.clean.is_some() {
            out.push_str(&self.raw);
        } else {
            match &self.at {
                At::Escape => out.push('\\'),
                At::Unicode(digits) => {
                    out.push_str("\\u");
                    out.push_str(digits);
                }
                At::Outside | At::String => {}
            }
        }
    }

    pub(crate) fn unsent_fixed(&self) -> &str {
        &self.fixed[self.sent..]
    }

    pub(crate) fn is_repaired(&self) -> bool {
        self.clean.is_some()
    }

    /// Whether it is JSON, repaired if need be.
    pub(crate) fn is_json(&self) -> bool {
        !self.broken && is_json(&self.fixed)
    }

    /// A bracket closed what it did not open.
    pub(crate) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Whether the next character stands in a string.
    pub(crate) fn is_in_string(&self) -> bool {
        !matches!(self.at, At::Outside)
    }

    /// The brackets that would make JSON of an unfinished value.
    pub(crate) fn closers(&self) -> Option<String> {
        if self.broken || self.is_in_string() {
            return None;
        }
        let closers: String = self.open.iter().rev().collect();
        is_json(&format!("{}{closers}", self.fixed)).then_some(closers)
    }
}
