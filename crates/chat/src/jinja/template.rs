//! Compiling and rendering one template.

use std::fmt;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, escape_formatter};
use minijinja_contrib::pycompat;

use super::date::Date;
use super::json::{Style, dump, str_of_float};
use super::sums;

/// A larger template is refused. Known ones are under 100 KB.
const MAX_SOURCE: usize = 1 << 20;
const NAME: &str = "chat_template";
/// Stack of a rendering thread for each unit of fuel: what the deepest value that fuel buys takes to be dropped.
const STACK_PER_FUEL: u64 = 128;
const MIN_STACK: u64 = 16 << 20;
const MAX_STACK: u64 = 2 << 30;
/// Digits in a row that a format string may have: more would pad to gigabytes.
const MAX_WIDTH_DIGITS: usize = 4;

/// Why there is no text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The template itself refused, in these words.
    Raised(String),
    /// It took too much time or memory.
    TooMuch,
    /// It failed.
    Broken(String),
}

/// A compiled template.
#[derive(Clone, Debug)]
pub(crate) struct Template {
    environment: Environment<'static>,
}

impl Template {
    /// Compiles the source as Hugging Face does: blocks trimmed, nothing escaped, Python's methods on values.
    pub(crate) fn new(source: &str) -> Result<Self, String> {
        if source.len() > MAX_SOURCE {
            return Err(format!("it is larger than {MAX_SOURCE} bytes"));
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let syntax = syntax.map_err(|error| error.to_string())?;
        environment.set_syntax(syntax.clone());
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(method);
        environment.remove_filter("format");
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", raise_exception);
        // In Python a string is both.
        environment.add_test("sequence", |value: &Value| {
            matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
        });
        environment.add_test("iterable", |value: &Value| {
            matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Iterable)
        });
        environment.set_formatter(|out, state, value| match float_text(value) {
            Some(text) => Ok(out.write_str(&text)?),
            None => escape_formatter(out, state, value),
        });
        environment.add_filter("string", |value: &Value| {
            float_text(value).map_or_else(|| Value::from(value.to_string()), Value::from)
        });
        // Jinja's lexer does that.
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let source = sums::bounded(&without_generation_tags(&source), NAME, syntax)?;
        sums::install(&mut environment);
        environment.add_template_owned(NAME, source).map_err(|error| error.to_string())?;
        Ok(Self { environment })
    }

    /// The variables that it reads and does not set, functions left out.
    pub(crate) fn arguments(&self) -> impl Iterator<Item = String> + use<> {
        let read = self.environment.get_template(NAME).map(|template| template.undeclared_variables(false));
        let functions: Vec<String> = self
            .environment
            .globals()
            .map(|(name, _)| name.to_owned())
            .chain(["strftime_now".to_owned()])
            .collect();
        read.into_iter().flatten().filter(move |name| !functions.contains(name))
    }

    /// Renders, with `fuel` for instructions and memory, on a thread whose stack bears whatever that buys. `date`, as
    /// `YYYY-MM-DD`, is today.
    pub(crate) fn render(&self, context: Value, fuel: u64, date: Option<&str>) -> Result<String, Failure> {
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel));
        let date = date.and_then(Date::parse);
        environment.add_function("strftime_now", move |format: &str| {
            date.map_or_else(String::new, |date| date.format(format))
        });
        let stack = (fuel.saturating_mul(STACK_PER_FUEL)).clamp(MIN_STACK, MAX_STACK);
        std::thread::scope(|scope| {
            let render = move || -> Result<String, Error> { environment.get_template(NAME)?.render(context) };
            std::thread::Builder::new()
                .name("template".to_owned())
                .stack_size(usize::try_from(stack).unwrap_or(usize::MAX))
                .spawn_scoped(scope, render)
                .map_err(|error| Failure::Broken(format!("no thread to render in: {error}")))?
                .join()
                .map_err(|_| Failure::Broken("the template engine failed".to_owned()))?
                .map_err(|error| failure(&error))
        })
    }
}

/// A float as Python writes it.
fn float_text(value: &Value) -> Option<String> {
    let is_float = value.kind() == ValueKind::Number && !value.is_integer();
    is_float.then(|| f64::try_from(value.clone()).ok().map(str_of_float)).flatten()
}

/// What a template says when it refuses.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    let message = message.to_string();
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

fn failure(error: &Error) -> Failure {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(present) = cause {
        if let Some(Raised(message)) = present.downcast_ref() {
            return Failure::Raised(message.clone());
        }
        if present.downcast_ref::<Error>().is_some_and(|error| error.kind() == ErrorKind::OutOfFuel) {
            return Failure::TooMuch;
        }
        cause = present.source();
    }
    Failure::Broken(error.to_string())
}

/// Python's methods, but for formatting to any width.
fn method(state: &mut State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if name == "format" && value.as_str().is_some_and(has_long_number) {
        return Err(Error::new(ErrorKind::InvalidOperation, "a format string has too large a number"));
    }
    pycompat::unknown_method_callback(state, value, name, args)
}

fn has_long_number(text: &str) -> bool {
    let mut digits = 0;
    text.chars().any(|c| {
        digits = if c.is_ascii_digit() { digits + 1 } else { 0 };
        digits > MAX_WIDTH_DIGITS
    })
}

/// Hugging Face's filter, which is `json.dumps` with text left as it is.
fn tojson(
    value: &Value,
    ensure_ascii: Option<bool>,
    indent: Option<Value>,
    separators: Option<Value>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let given: (Option<Value>, Option<Value>) = (kwargs.get("indent")?, kwargs.get("separators")?);
    let indent = match indent.or(given.0).filter(|indent| !indent.is_none()) {
        None => None,
        Some(text) if text.as_str().is_some() => text.as_str().map(str::to_owned),
        Some(width) => Some(" ".repeat(usize::try_from(i64::try_from(width)?.clamp(0, 32)).unwrap_or(0))),
    };
    let comma = if indent.is_some() { "," } else { ", " };
    let separators = match separators.or(given.1).filter(|given| !given.is_none()) {
        None => (comma.to_owned(), ": ".to_owned()),
        Some(pair) => {
            let part = |index| Ok::<_, Error>(pair.get_item_by_index(index)?.to_string());
            (part(0)?, part(1)?)
        }
    };
    let style = Style {
        ascii: ensure_ascii.or(kwargs.get("ensure_ascii")?).unwrap_or(false),
        indent,
        separators,
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    kwargs.assert_all_used()?;
    dump(value, &style)
}

/// `{% generation %}` marks what the assistant says, for training. Here it is a block that is always taken.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let body = tag.trim_start_matches(['-', '+']);
        let (signs, word) = (&tag[..tag.len() - body.len()], body.trim_start());
        let replaced =
            [("generation", "if true"), ("endgeneration", "endif")].into_iter().find_map(|(name, with)| {
                let behind = word.strip_prefix(name)?;
                behind.trim_start().trim_start_matches(['-', '+']).starts_with("%}").then_some((with, behind))
            });
        match replaced {
            Some((with, behind)) => {
                out.push_str(signs);
                out.push(' ');
                out.push_str(with);
                rest = behind;
            }
            None => rest = tag,
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests;
