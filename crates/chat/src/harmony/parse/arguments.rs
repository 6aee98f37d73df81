//! The text of a call, as far as it is JSON.
//!
//! Arguments that begin with `{` or `[` stream up to the end of that value. Bad escapes and raw control characters
//! in strings are repaired, but only if the value then is JSON: from the first repair on, text is held back until
//! that is known, so that arguments which are no JSON come through verbatim.

use serde::de::IgnoredAny;

use super::work;

/// What a piece of a call's text turned out to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Pieces {
    /// More of the arguments.
    pub(super) arguments: String,
    /// Text around the arguments.
    pub(super) around: String,
}

/// How a call's text deviated from one JSON value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Faults {
    pub(super) before: bool,
    pub(super) after: bool,
    pub(super) repaired: bool,
    pub(super) invalid: bool,
    pub(super) empty: bool,
}

/// Scans a call's text. Work is linear in it, whatever it is.
#[derive(Clone, Debug)]
pub(super) struct Arguments {
    mode: Mode,
    faults: Faults,
    /// Look for an object behind other text.
    search: bool,
}

#[derive(Clone, Debug)]
enum Mode {
    /// Whitespace so far.
    Start,
    /// In the first value.
    Value(Value),
    /// Behind it.
    After,
    /// Not JSON: everything is arguments.
    Verbatim,
    /// Began with something else: all of it.
    Other(String),
}

impl Arguments {
    /// `code`: the text need not be JSON and is not searched for any.
    pub(super) fn new(code: bool) -> Self {
        Self { mode: Mode::Start, faults: Faults::default(), search: !code }
    }

    /// Whether nothing but whitespace has come.
    pub(super) fn is_blank(&self) -> bool {
        matches!(self.mode, Mode::Start)
    }

    /// Whether a whole JSON value has come.
    pub(super) fn is_complete(&self) -> bool {
        matches!(self.mode, Mode::After)
    }

    pub(super) fn faults(&self) -> Faults {
        self.faults
    }

    /// Takes more text.
    pub(super) fn push(&mut self, text: &str, out: &mut Pieces) {
        let mut rest = text;
        if self.is_blank() {
            rest = rest.trim_start();
            match rest.chars().next() {
                None => return,
                Some('{' | '[') => self.mode = Mode::Value(Value::default()),
                // Verbatim means with the whitespace in front.
                Some(_) => (self.mode, rest) = (Mode::Other(String::new()), text),
            }
        }
        if let Mode::Value(value) = &mut self.mode {
            let Some(taken) = value.push(rest) else {
                value.send(&mut out.arguments);
                return;
            };
            rest = &rest[taken..];
            self.mode = if value.is_json() {
                self.faults.repaired |= value.is_repaired();
                out.arguments.push_str(value.unsent_fixed());
                Mode::After
            } else {
                value.send_raw(&mut out.arguments);
                Mode::Verbatim
            };
        }
        match &mut self.mode {
            Mode::After => {
                let text = if self.faults.after { rest } else { rest.trim_start() };
                self.faults.after |= !text.is_empty();
                out.around.push_str(text);
            }
            Mode::Verbatim => out.arguments.push_str(rest),
            Mode::Other(held) => held.push_str(rest),
            Mode::Start | Mode::Value(_) => {}
        }
    }

    /// Ends a whole call.
    pub(super) fn finish(&mut self, out: &mut Pieces) {
        match std::mem::replace(&mut self.mode, Mode::Verbatim) {
            Mode::Start => {
                self.faults.empty = true;
                out.arguments.push_str("{}");
            }
            Mode::Value(value) => {
                self.faults.invalid = true;
                value.send_raw(&mut out.arguments);
            }
            Mode::After => {}
            Mode::Verbatim => self.faults.invalid = true,
            Mode::Other(held) => self.other(&held, out),
        }
    }

    /// Ends a call that was cut: what was held back comes as it was written.
    pub(super) fn cut(&mut self, out: &mut Pieces) {
        match std::mem::replace(&mut self.mode, Mode::Verbatim) {
            Mode::Value(value) => value.send_raw(&mut out.arguments),
            Mode::Other(held) => out.arguments.push_str(&held),
            Mode::Start | Mode::After | Mode::Verbatim => {}
        }
    }

    /// Text that does not begin as an object or a list: a JSON scalar, an object with words around it, or no JSON.
    fn other(&mut self, text: &str, out: &mut Pieces) {
        if is_json(text) {
            out.arguments.push_str(text);
            return;
        }
        let mut from = 0;
        while self.search
            && let Some(start) = text[from..].find('{').map(|at| from + at)
        {
            let mut value = Value::default();
            let Some(taken) = value.push(&text[start..]) else { break };
            if value.is_json() {
                self.faults.before = true;
                self.faults.repaired |= value.is_repaired();
                out.arguments.push_str(value.unsent_fixed());
                out.around.push_str(&text[..start]);
                out.around.push_str(text[start + taken..].trim_end());
                return;
            }
            from = start + taken;
        }
        self.faults.invalid = true;
        out.arguments.push_str(text);
    }
}

fn is_json(text: &str) -> bool {
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
struct Value {
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
    fn push(&mut self, text: &str) -> Option<usize> {
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
    fn send(&mut self, out: &mut String) {
        let certain = self.clean.unwrap_or(self.fixed.len());
        out.push_str(&self.fixed[self.sent..certain]);
        self.sent = certain;
    }

    /// The rest as written.
    fn send_raw(&self, out: &mut String) {
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

    fn unsent_fixed(&self) -> &str {
        &self.fixed[self.sent..]
    }

    fn is_repaired(&self) -> bool {
        self.clean.is_some()
    }

    fn is_json(&self) -> bool {
        !self.broken && is_json(&self.fixed)
    }
}
