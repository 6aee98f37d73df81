//! The text of a call, as far as it is JSON.
//!
//! Arguments that begin with `{` or `[` stream up to the end of that value. Bad escapes and raw control characters
//! in strings are repaired, but only if the value then is JSON: from the first repair on, text is held back until
//! that is known, so that arguments which are no JSON come through verbatim.

use crate::scan::{Value, is_json};

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
