//! The JSON object of one call: `{"name": ..., "arguments": {...}}`, character by character.

use std::sync::Arc;

use crate::scan::{Value, is_json};

use super::recovery::{self as note, Notes};

/// What a character did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The call goes on.
    More,
    /// This is no call.
    NoCall,
    /// The call's last brace came.
    Closed,
    /// The call is over; the character is not part of it.
    Over,
}

/// What became certain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// The function's name. Comes once, before any arguments.
    Name(String),
    /// More of the arguments.
    Arguments(String),
    /// Text that belongs to neither.
    Around(String),
}

/// A string literal so far.
#[derive(Clone, Debug, Default)]
struct Literal {
    raw: String,
    escaped: bool,
}

impl Literal {
    /// Takes a character; whether it ended the literal. The first one is the opening quote.
    fn push(&mut self, c: char) -> bool {
        self.raw.push(c);
        if std::mem::take(&mut self.escaped) {
            return false;
        }
        self.escaped = c == '\\';
        c == '"' && self.raw.len() > 1
    }

    fn decode(&self) -> Option<String> {
        serde_json::from_str(&self.raw).ok()
    }
}

/// What a member's value is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum For {
    Arguments,
    Nothing,
}

#[derive(Clone, Debug)]
enum Stage {
    /// Before the first brace.
    Open,
    /// Where a member may begin.
    Member,
    Key(Literal),
    Colon(String),
    /// Before the value of this key.
    Value(String),
    Name(Literal),
    Json(For, Value),
    Text(For, Literal),
    Scalar(For, String),
    /// Behind a value.
    Next,
    /// Arguments whose brackets do not match, with the braces and white space at their end.
    Broken(String),
}

/// A call in progress. Before its name is announced it may still turn out to be none.
#[derive(Clone, Debug)]
pub(super) struct Call {
    /// Functions on offer; `None` is any.
    declared: Option<Arc<[String]>>,
    stage: Stage,
    name: Option<String>,
    announced: bool,
    /// Whole arguments that came before the name.
    early: Option<String>,
    has_arguments: bool,
    /// Text of the present member, for members that mean nothing.
    member: String,
    around: String,
    /// A raw line break and white space came last. JSON has none in strings, so a tag there is a tag.
    line_start: bool,
    /// The name is not on offer.
    undeclared: bool,
    notes: Notes,
}

impl Call {
    pub(super) fn new(declared: Option<Arc<[String]>>) -> Self {
        Self {
            declared,
            stage: Stage::Open,
            name: None,
            announced: false,
            early: None,
            has_arguments: false,
            member: String::new(),
            around: String::new(),
            line_start: false,
            undeclared: false,
            notes: Notes::default(),
        }
    }

    /// Whether the arguments are being written.
    pub(super) fn is_in_arguments(&self) -> bool {
        matches!(
            self.stage,
            Stage::Json(For::Arguments, _)
                | Stage::Text(For::Arguments, _)
                | Stage::Scalar(For::Arguments, _)
                | Stage::Broken(_)
        )
    }

    /// Whether nothing but the start of a call has come: no value except perhaps a name.
    pub(super) fn is_head(&self) -> bool {
        let in_value = matches!(self.stage, Stage::Json(..) | Stage::Text(..) | Stage::Scalar(..));
        !(self.announced || self.has_arguments || in_value) && self.around.is_empty()
    }

    /// Whether a tag at this place ends the call. Within a string it is text.
    pub(super) fn watches_tags(&self) -> bool {
        let in_string = match &self.stage {
            Stage::Key(_) | Stage::Name(_) | Stage::Text(..) => true,
            Stage::Json(_, value) => value.is_in_string(),
            _ => false,
        };
        !in_string || self.line_start
    }

    /// Whether this is no call because its function is not on offer.
    pub(super) fn is_undeclared(&self) -> bool {
        self.undeclared
    }

    /// What was forgiven so far.
    pub(super) fn take_notes(&mut self) -> Notes {
        std::mem::take(&mut self.notes)
    }

    /// Takes a character.
    pub(super) fn push(&mut self, c: char, out: &mut Vec<Piece>) -> Step {
        self.line_start = c == '\n' || (self.line_start && c.is_whitespace());
        let is_space = c.is_ascii_whitespace();
        match std::mem::replace(&mut self.stage, Stage::Next) {
            stage @ (Stage::Open | Stage::Member | Stage::Next) if is_space => self.stay(stage),
            Stage::Open if c == '{' => self.stay(Stage::Member),
            Stage::Open => Step::NoCall,
            Stage::Member => match c {
                '"' => {
                    let mut key = Literal::default();
                    key.push(c);
                    self.member = key.raw.clone();
                    self.stay(Stage::Key(key))
                }
                '}' => self.close(out),
                _ => self.fail(out),
            },
            Stage::Key(mut key) => {
                self.member.push(c);
                if !key.push(c) {
                    return self.stay(Stage::Key(key));
                }
                match key.decode() {
                    Some(key) => self.stay(Stage::Colon(key)),
                    None => self.fail(out),
                }
            }
            stage @ (Stage::Colon(_) | Stage::Value(_)) if is_space => {
                self.member.push(c);
                self.stay(stage)
            }
            Stage::Colon(key) if c == ':' => {
                self.member.push(c);
                self.stay(Stage::Value(key))
            }
            Stage::Colon(_) => self.fail(out),
            Stage::Value(key) => self.value(&key, c, out),
            Stage::Name(mut name) => {
                if name.push(c) {
                    self.named(name.decode(), out)
                } else {
                    self.stay(Stage::Name(name))
                }
            }
            Stage::Json(role, value) => self.json(role, value, c, out),
            Stage::Text(role, mut text) => {
                self.remember(role, c);
                if !text.push(c) {
                    return self.stay(Stage::Text(role, text));
                }
                if role == For::Arguments {
                    let text = self.unwrapped(text);
                    return self.arguments(text, out);
                }
                self.meaningless();
                Step::More
            }
            Stage::Scalar(role, text) if is_space || c == ',' || c == '}' => {
                self.scalar(role, text, out);
                self.push(c, out)
            }
            Stage::Scalar(role, mut text) => {
                self.remember(role, c);
                text.push(c);
                self.stay(Stage::Scalar(role, text))
            }
            Stage::Next => match c {
                ',' => self.stay(Stage::Member),
                '}' => self.close(out),
                _ => self.fail(out),
            },
            Stage::Broken(mut tail) => {
                if !(is_space || c == '}') {
                    let text = std::mem::take(&mut tail);
                    out.push(Piece::Arguments(text));
                    out.push(Piece::Arguments(c.to_string()));
                } else {
                    tail.push(c);
                }
                self.stay(Stage::Broken(tail))
            }
        }
    }

    /// The call ends here, without its last brace: at a tag, or at the end of the turn. Whether it is one.
    pub(super) fn end(&mut self, out: &mut Vec<Piece>) -> bool {
        let mut stage = std::mem::replace(&mut self.stage, Stage::Next);
        if let Stage::Scalar(role, text) = stage {
            self.scalar(role, text, out);
            stage = Stage::Next;
        }
        if !self.announced {
            let is_whole = matches!(stage, Stage::Next) && self.name.is_some();
            return is_whole && {
                self.notes.add(note::MISSING_BRACE);
                self.close(out) == Step::Closed
            };
        }
        match stage {
            Stage::Json(For::Arguments, value) => match value.closers() {
                Some(closers) => {
                    self.notes.add(note::ARGUMENTS_CLOSED);
                    out.push(Piece::Arguments(value.unsent_fixed().to_owned() + &closers));
                }
                None => {
                    self.notes.add(note::INVALID_ARGUMENTS);
                    let mut text = String::new();
                    value.send_raw(&mut text);
                    out.push(Piece::Arguments(text.trim_end().to_owned()));
                }
            },
            Stage::Broken(tail) => {
                let tail = tail.trim_end();
                out.push(Piece::Arguments(tail.strip_suffix('}').unwrap_or(tail).trim_end().to_owned()));
            }
            _ => {
                self.notes.add(note::MISSING_BRACE);
                self.meaningless();
            }
        }
        self.release_around(out);
        true
    }

    /// The answer was cut here: what was held back of announced arguments comes as it was written.
    pub(super) fn cut(&mut self, out: &mut Vec<Piece>) {
        let stage = std::mem::replace(&mut self.stage, Stage::Next);
        if !self.announced {
            return;
        }
        match stage {
            Stage::Json(For::Arguments, value) => {
                let mut text = String::new();
                value.send_raw(&mut text);
                out.push(Piece::Arguments(text));
            }
            Stage::Broken(tail) => out.push(Piece::Arguments(tail)),
            _ => self.meaningless(),
        }
        self.release_around(out);
    }

    fn stay(&mut self, stage: Stage) -> Step {
        self.stage = stage;
        Step::More
    }

    /// The character cannot stand here.
    fn fail(&mut self, out: &mut Vec<Piece>) -> Step {
        if !self.announced {
            return Step::NoCall;
        }
        self.meaningless();
        self.release_around(out);
        self.notes.add(note::MISSING_BRACE);
        Step::Over
    }

    /// The first character of a member's value.
    fn value(&mut self, key: &str, c: char, out: &mut Vec<Piece>) -> Step {
        let role = match key {
            "name" if self.name.is_none() => {
                self.member.clear();
                if c != '"' {
                    return self.fail(out);
                }
                let mut name = Literal::default();
                name.push(c);
                return self.stay(Stage::Name(name));
            }
            "arguments" | "parameters" if !self.has_arguments => {
                self.member.clear();
                self.has_arguments = true;
                For::Arguments
            }
            _ => For::Nothing,
        };
        match c {
            '{' | '[' => {
                if role == For::Arguments {
                    self.announce(out);
                }
                self.json(role, Value::default(), c, out)
            }
            '"' => {
                self.remember(role, c);
                let mut text = Literal::default();
                text.push(c);
                self.stay(Stage::Text(role, text))
            }
            ',' | '}' => self.fail(out),
            _ => {
                self.remember(role, c);
                self.stay(Stage::Scalar(role, c.to_string()))
            }
        }
    }

    fn named(&mut self, name: Option<String>, out: &mut Vec<Piece>) -> Step {
        let Some(name) = name.filter(|name| !name.is_empty()) else { return Step::NoCall };
        if self.declared.as_ref().is_some_and(|declared| !declared.contains(&name)) {
            self.undeclared = true;
            return Step::NoCall;
        }
        self.name = Some(name);
        if let Some(text) = self.early.take() {
            self.announce(out);
            out.push(Piece::Arguments(text));
        }
        Step::More
    }

    fn json(&mut self, role: For, mut value: Value, c: char, out: &mut Vec<Piece>) -> Step {
        self.remember(role, c);
        let done = value.push(c.encode_utf8(&mut [0; 4])).is_some();
        let streams = role == For::Arguments && self.announced;
        if !done {
            if streams {
                let mut text = String::new();
                value.send(&mut text);
                out.push(Piece::Arguments(text));
            }
            return self.stay(Stage::Json(role, value));
        }
        if role == For::Nothing {
            self.meaningless();
            return Step::More;
        }
        let mut text = String::new();
        if value.is_json() {
            if value.is_repaired() {
                self.notes.add(note::ARGUMENTS_REPAIRED);
            }
            text.push_str(value.unsent_fixed());
            return self.arguments(text, out);
        }
        self.notes.add(note::INVALID_ARGUMENTS);
        value.send_raw(&mut text);
        if !value.is_broken() {
            return self.arguments(text, out);
        }
        if !streams {
            return Step::NoCall;
        }
        out.push(Piece::Arguments(text));
        self.stay(Stage::Broken(String::new()))
    }

    /// The arguments are whole; `text` is what of them has not been sent.
    fn arguments(&mut self, text: String, out: &mut Vec<Piece>) -> Step {
        if self.name.is_some() {
            self.announce(out);
            out.push(Piece::Arguments(text));
        } else {
            self.early = Some(text);
        }
        Step::More
    }

    /// Arguments that are a string: the JSON in it, if there is any.
    fn unwrapped(&mut self, literal: Literal) -> String {
        match literal.decode() {
            Some(text) if text.trim().is_empty() => {
                self.notes.add(note::EMPTY_ARGUMENTS);
                "{}".to_owned()
            }
            Some(text) if text.trim_start().starts_with(['{', '[']) && is_json(&text) => {
                self.notes.add(note::ARGUMENTS_IN_STRING);
                text
            }
            Some(_) => literal.raw,
            None => {
                self.notes.add(note::INVALID_ARGUMENTS);
                literal.raw
            }
        }
    }

    fn scalar(&mut self, role: For, text: String, out: &mut Vec<Piece>) {
        if role == For::Nothing {
            self.meaningless();
        } else if text == "null" {
            self.notes.add(note::EMPTY_ARGUMENTS);
            self.arguments("{}".to_owned(), out);
        } else {
            if !is_json(&text) {
                self.notes.add(note::INVALID_ARGUMENTS);
            }
            self.arguments(text, out);
        }
    }

    /// The call's last brace.
    fn close(&mut self, out: &mut Vec<Piece>) -> Step {
        if self.name.is_none() {
            return Step::NoCall;
        }
        if !self.has_arguments {
            self.has_arguments = true;
            self.notes.add(note::EMPTY_ARGUMENTS);
            self.announce(out);
            out.push(Piece::Arguments("{}".to_owned()));
        }
        self.release_around(out);
        Step::Closed
    }

    fn announce(&mut self, out: &mut Vec<Piece>) {
        if !self.announced
            && let Some(name) = self.name.clone()
        {
            self.announced = true;
            out.push(Piece::Name(name));
        }
    }

    fn remember(&mut self, role: For, c: char) {
        if role == For::Nothing {
            self.member.push(c);
        }
    }

    /// The present member has no meaning.
    fn meaningless(&mut self) {
        if !self.member.is_empty() {
            self.notes.add(note::UNKNOWN_MEMBER);
            self.around.push_str(&std::mem::take(&mut self.member));
            self.around.push('\n');
        }
    }

    fn release_around(&mut self, out: &mut Vec<Piece>) {
        if !self.around.is_empty() {
            out.push(Piece::Around(std::mem::take(&mut self.around)));
        }
    }
}
