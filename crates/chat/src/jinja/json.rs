//! JSON as Python's `json` module reads and writes it: what templates were written for.

use std::fmt;
use std::sync::Arc;

use minijinja::value::{Object, ObjectRepr, Value, ValueKind};
use minijinja::{Error, ErrorKind};

use super::marks::{Marking, Seen, is_mark};

/// Deeper values are refused: reading and writing recurse.
const MAX_DEPTH: usize = 128;

/// A value. Numbers keep their text: Python's integers have no limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Json {
    Null,
    Bool(bool),
    Number(String),
    String(String),
    List(Vec<Json>),
    /// In order; a later entry of the same key replaces the value of an earlier one.
    Map(Vec<(String, Json)>),
}

impl Json {
    /// Notes the marks that strings have.
    pub(crate) fn see(&self, seen: &mut Seen) {
        match self {
            Self::String(text) => seen.add(text),
            Self::List(items) => items.iter().for_each(|item| item.see(seen)),
            Self::Map(entries) => entries.iter().for_each(|(key, value)| {
                seen.add(key);
                value.see(seen);
            }),
            Self::Null | Self::Bool(_) | Self::Number(_) => {}
        }
    }

    /// For a template, strings marked.
    pub(crate) fn to_value(&self, marking: &Marking<'_>) -> Value {
        match self {
            Self::Null => Value::from(()),
            Self::Bool(bool) => Value::from(*bool),
            Self::Number(text) => number(text),
            Self::String(text) => Value::from(marking.text(text)),
            Self::List(items) => items.iter().map(|item| item.to_value(marking)).collect(),
            Self::Map(entries) => Value::from_pairs(
                entries.iter().map(|(key, value)| (marking.key(key), value.to_value(marking))),
            ),
        }
    }
}

/// An integer too large for the engine's numbers.
#[derive(Debug)]
struct Digits(String);

impl Object for Digits {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn number(text: &str) -> Value {
    let is_integer = !text.contains(['.', 'e', 'E', 'N', 'I']);
    if is_integer {
        return match (text.parse::<i64>(), text.parse::<i128>()) {
            (Ok(small), _) => Value::from(small),
            (_, Ok(large)) => Value::from(large),
            _ => Value::from_object(Digits(text.to_owned())),
        };
    }
    Value::from(match text {
        "NaN" => f64::NAN,
        "Infinity" => f64::INFINITY,
        "-Infinity" => f64::NEG_INFINITY,
        _ => text.parse().unwrap_or(f64::NAN),
    })
}

/// Reads one value; `None` if that is not what the text is.
pub(crate) fn parse(text: &str) -> Option<Json> {
    let mut reader = Reader { rest: text };
    let value = reader.value(0)?;
    reader.skip_space();
    reader.rest.is_empty().then_some(value)
}

struct Reader<'a> {
    rest: &'a str,
}

impl Reader<'_> {
    fn skip_space(&mut self) {
        self.rest = self.rest.trim_start_matches([' ', '\t', '\n', '\r']);
    }

    fn take(&mut self, token: &str) -> bool {
        let rest = self.rest.strip_prefix(token);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn value(&mut self, depth: usize) -> Option<Json> {
        if depth > MAX_DEPTH {
            return None;
        }
        self.skip_space();
        for (token, value) in [("null", Json::Null), ("true", Json::Bool(true)), ("false", Json::Bool(false))]
        {
            if self.take(token) {
                return Some(value);
            }
        }
        for token in ["NaN", "Infinity", "-Infinity"] {
            if self.take(token) {
                return Some(Json::Number(token.to_owned()));
            }
        }
        match self.rest.chars().next()? {
            '"' => self.string().map(Json::String),
            '[' => self.list(depth),
            '{' => self.map(depth),
            _ => self.number(),
        }
    }

    fn list(&mut self, depth: usize) -> Option<Json> {
        self.take("[");
        let mut items = Vec::new();
        self.skip_space();
        if self.take("]") {
            return Some(Json::List(items));
        }
        loop {
            items.push(self.value(depth + 1)?);
            self.skip_space();
            if self.take("]") {
                return Some(Json::List(items));
            }
            self.take(",").then_some(())?;
        }
    }

    fn map(&mut self, depth: usize) -> Option<Json> {
        self.take("{");
        let mut entries = Vec::new();
        self.skip_space();
        if self.take("}") {
            return Some(Json::Map(entries));
        }
        loop {
            self.skip_space();
            let key = self.string()?;
            self.skip_space();
            self.take(":").then_some(())?;
            entries.push((key, self.value(depth + 1)?));
            self.skip_space();
            if self.take("}") {
                return Some(Json::Map(entries));
            }
            self.take(",").then_some(())?;
        }
    }

    /// A string literal: its end is found here, its escapes are the library's business.
    fn string(&mut self) -> Option<String> {
        let body = self.rest.strip_prefix('"')?;
        let mut escaped = false;
        let end = body.bytes().position(|byte| {
            let is_end = byte == b'"' && !escaped;
            escaped = byte == b'\\' && !escaped;
            is_end
        })?;
        let (literal, rest) = self.rest.split_at(end + 2);
        self.rest = rest;
        serde_json::from_str(literal).ok()
    }

    fn number(&mut self) -> Option<Json> {
        let end = self.rest.find(|c: char| !(c.is_ascii_digit() || "+-.eE".contains(c)));
        let (literal, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
        // The library's grammar is the same.
        serde_json::from_str::<&serde_json::value::RawValue>(literal).ok()?;
        self.rest = rest;
        Some(Json::Number(literal.to_owned()))
    }
}

/// How to write.
#[derive(Clone, Debug)]
pub(super) struct Style {
    pub(super) ascii: bool,
    /// White space of one level; without it, all is one line.
    pub(super) indent: Option<String>,
    /// Between items, and between key and value.
    pub(super) separators: (String, String),
    pub(super) sort_keys: bool,
}

/// Writes a template's value as `json.dumps` does.
pub(super) fn dump(value: &Value, style: &Style) -> Result<String, Error> {
    let mut writer = Writer { style, out: String::new() };
    writer.value(value, 0)?;
    Ok(writer.out)
}

struct Writer<'a> {
    style: &'a Style,
    out: String,
}

fn refused(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::BadSerialization, what.into())
}

impl Writer<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(refused("the value is nested too deeply"));
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => self.out.push_str(&value.to_string()),
            ValueKind::Number => self.out.push_str(&float(f64::try_from(value.clone())?)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.checked().map(|item| Ok((None, item?)));
                self.items(['[', ']'], items, depth)?;
            }
            ValueKind::Map => {
                let mut entries = Vec::new();
                for key in value.try_iter()?.checked() {
                    let key = key?;
                    let item = value.get_item(&key)?;
                    entries.push((Some(key_text(&key)?), item));
                }
                if self.style.sort_keys {
                    entries.sort_by(|(a, _), (b, _)| a.cmp(b));
                }
                self.items(['{', '}'], entries.into_iter().map(Ok), depth)?;
            }
            _ if value.downcast_object_ref::<Digits>().is_some() => self.out.push_str(&value.to_string()),
            kind => return Err(refused(format!("{kind} is not JSON serializable"))),
        }
        Ok(())
    }

    fn items(
        &mut self,
        brackets: [char; 2],
        items: impl Iterator<Item = Result<(Option<String>, Value), Error>>,
        depth: usize,
    ) -> Result<(), Error> {
        let style = self.style;
        self.out.push(brackets[0]);
        let mut any = false;
        for item in items {
            let (key, item) = item?;
            if std::mem::replace(&mut any, true) {
                self.out.push_str(&style.separators.0);
            }
            self.line(depth + 1);
            if let Some(key) = key {
                self.string(&key);
                self.out.push_str(&style.separators.1);
            }
            self.value(&item, depth + 1)?;
        }
        if any {
            self.line(depth);
        }
        self.out.push(brackets[1]);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.style.indent {
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                '\0'..='\x1f' => self.out.push_str(&format!("\\u{:04x}", u32::from(c))),
                // Marks are no text, and have to stay what they are.
                _ if self.style.ascii && (!c.is_ascii() || c == '\x7f') && !is_mark(c) => {
                    if c == '\x7f' {
                        self.out.push(c);
                    } else {
                        for unit in c.encode_utf16(&mut [0; 2]) {
                            self.out.push_str(&format!("\\u{unit:04x}"));
                        }
                    }
                }
                _ => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::Number if key.is_integer() => Ok(key.to_string()),
        ValueKind::Number => Ok(float(f64::try_from(key.clone())?)),
        kind => Err(refused(format!("keys must not be {kind}"))),
    }
}

/// As Python's `str`, which spells what is no number differently than JSON.
pub(super) fn str_of_float(number: f64) -> String {
    match float(number).as_str() {
        "NaN" => "nan".to_owned(),
        "Infinity" => "inf".to_owned(),
        "-Infinity" => "-inf".to_owned(),
        text => text.to_owned(),
    }
}

/// As Python's `repr`: the shortest digits, and an exponent where there are many zeros.
fn float(number: f64) -> String {
    if number.is_nan() {
        return "NaN".to_owned();
    }
    if number.is_infinite() {
        return if number > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = number.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_python_s() {
        for (number, text) in [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e-7, "1e-07"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (123456.789, "123456.789"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-Infinity"),
        ] {
            assert_eq!(float(number), text);
        }
    }

    #[test]
    fn what_python_does_not_read_is_no_json() {
        for text in [
            "",
            " ",
            "{",
            "[1,]",
            "{\"a\" 1}",
            "{\"a\":1,}",
            "{a: 1}",
            "'a'",
            "01",
            "1.",
            ".5",
            "+1",
            "1e",
            "-",
            "\"\n\"",
            "\"\\x\"",
            "\"\\ud800\"",
            "[1] 2",
            "nul",
            "True",
            "\u{a0}1",
            "\"",
            "\"\\\"",
        ] {
            assert_eq!(parse(text), None, "{text:?}");
        }
        let deep = "[".repeat(200_000);
        assert_eq!(parse(&deep), None);
        assert_eq!(parse(&("[".repeat(200) + &"]".repeat(200))), None);
    }

    #[test]
    fn what_python_reads_is_read() {
        let number = |text: &str| Json::Number(text.to_owned());
        assert_eq!(
            parse(" [1, -2.5E+3,\tNaN] "),
            Some(Json::List(vec![number("1"), number("-2.5E+3"), number("NaN")]))
        );
        let map = Json::Map(vec![("a\"".to_owned(), Json::Null), ("".to_owned(), Json::Map(Vec::new()))]);
        assert_eq!(parse(r#"{"a\"": null, "": {}}"#), Some(map));
        assert_eq!(parse(r#""\ud83e\udd80\\""#), Some(Json::String("🦀\\".to_owned())));
    }
}
