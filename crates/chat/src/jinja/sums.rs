//! Lists that `+` makes, charged to the fuel of a rendering.
//!
//! The engine joins lists without copying them, for free, until joins are nested deeply; then it copies. A list that is
//! added to itself thirty times is copied whole before anything asks how long it is. So every `L + R` of a template is compiled
//! as `(L + R)|FILTER`, and the filter charges for a list's length as soon as it is joined. A filter, because templates can
//! hide functions behind variables of the same name.

use minijinja::machinery::parse;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, filters};
use serde_json::Value as Json;

const FILTER: &str = "joined";
/// Elements of a list for a unit of fuel: the engine takes as much for lists that it copies.
const PER_FUEL: u64 = 2;

/// Makes an environment charge for what [`bounded`] has marked, and refuse what would go round it.
pub(super) fn install(environment: &mut Environment<'_>) {
    environment.add_filter(FILTER, joined);
    // Jinja has no such filter, and it joins lists likewise.
    environment.remove_filter("chain");
    environment.add_filter("sum", sum);
}

/// The source with every addition marked.
///
/// # Errors
/// A source that is no template, in the engine's words.
pub(super) fn bounded(source: &str, name: &str, syntax: SyntaxConfig) -> Result<String, String> {
    let tree = parse(source, name, syntax).map_err(|error| error.to_string())?;
    let tree = serde_json::to_value(&tree).map_err(|error| error.to_string())?;
    let mut spans = Vec::new();
    additions(&tree, &mut spans);
    // Outer ones begin before inner ones, or at the same place and end later.
    spans.sort_by_key(|&(start, end)| (start, std::cmp::Reverse(end)));
    let mut out = String::with_capacity(source.len() + spans.len() * (FILTER.len() + 3));
    let (mut at, mut open) = (0, Vec::new());
    let copy = |out: &mut String, from: &mut usize, to: usize| {
        let part = source.get(*from..to).ok_or("an addition has no place in the source")?;
        out.push_str(part);
        *from = to;
        Ok::<_, String>(())
    };
    for (start, end) in spans {
        while let Some(&last) = open.last().filter(|&&last| last <= start) {
            copy(&mut out, &mut at, last)?;
            out.push_str(&format!(")|{FILTER}"));
            open.pop();
        }
        copy(&mut out, &mut at, start)?;
        out.push('(');
        open.push(end);
    }
    while let Some(last) = open.pop() {
        copy(&mut out, &mut at, last)?;
        out.push_str(&format!(")|{FILTER}"));
    }
    copy(&mut out, &mut at, source.len())?;
    Ok(out)
}

/// The places of all additions of a syntax tree.
fn additions(tree: &Json, spans: &mut Vec<(usize, usize)>) {
    match tree {
        Json::Array(items) => items.iter().for_each(|item| additions(item, spans)),
        Json::Object(fields) => {
            if fields.get("expr").is_some_and(|kind| kind == "BinOp") {
                let offset = |key: &str| {
                    let offset = fields.get("inner")?.get(1)?.get(key)?.as_u64()?;
                    usize::try_from(offset).ok()
                };
                let adds = fields.get("inner").and_then(|inner| inner.get(0)?.get("op"));
                if adds.is_some_and(|op| op == "Add") {
                    spans.extend(offset("start_offset").zip(offset("end_offset")));
                }
            }
            fields.values().for_each(|value| additions(value, spans));
        }
        _ => {}
    }
}

/// Passes a sum on. A list is charged for.
fn joined(state: &State<'_, '_>, value: Value) -> Result<Value, Error> {
    if matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
        let what = "a list whose length is not known cannot be added to another";
        let len = value.len().ok_or_else(|| Error::new(ErrorKind::InvalidOperation, what))?;
        state.consume_fuel(len as u64 / PER_FUEL + 1)?;
    }
    Ok(value)
}

/// The engine's, of numbers: lists and strings would grow in it without being charged for.
fn sum(
    state: &State<'_, '_>,
    values: Value,
    attribute: Option<&str>,
    start: Option<Value>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let named: Option<Value> = kwargs.get("start")?;
    if start.iter().chain(&named).any(|start| !start.is_number() && !start.is_none()) {
        return Err(Error::new(ErrorKind::InvalidOperation, "only numbers can be summed"));
    }
    filters::sum(state, values, attribute, start, kwargs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marked(source: &str) -> String {
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().unwrap();
        bounded(source, "test", syntax).unwrap()
    }

    #[test]
    fn every_addition_is_marked_and_nothing_else() {
        for (source, expected) in [
            ("é + 1 {{ 'a + b' }} {# {{ a + b }} #}{% raw %}{{ a + b }}{% endraw %}", None),
            ("{{ a ~ b * c - d }}{{ -1 }}{%+ if a %}{%+ endif %}", None),
            ("é {{ a+b }} z", Some("é {{ (a+b)|joined }} z")),
            ("{{- a + b + c -}}", Some("{{- ((a + b)|joined + c)|joined -}}")),
            ("{{ a + (b + c) * 2 }}", Some("{{ (a + ((b + c)|joined) * 2)|joined }}")),
            (
                "{{ -a + b ~ 'é' if c + d else [e + f][0 + 1:] }}",
                Some("{{ (-a + b ~ 'é')|joined if (c + d)|joined else [(e + f)|joined][(0 + 1)|joined:] }}"),
            ),
            (
                "{% set n.x = m['a' + b]\n + f(x, y=1 + 2)|upper %}",
                Some("{% set n.x = (m[('a' + b)|joined]\n + f(x, y=(1 + 2)|joined)|upper)|joined %}"),
            ),
            (
                "{% for i in a + b if i + 1 %}\n{% macro f(x=1 + 2) %}{{ x+x }}{% endmacro %}{% endfor %}",
                Some(
                    "{% for i in (a + b)|joined if (i + 1)|joined %}\n{% macro f(x=(1 + 2)|joined) %}{{ (x+x)|joined }}{% endmacro %}{% endfor %}",
                ),
            ),
        ] {
            assert_eq!(marked(source), expected.unwrap_or(source));
        }
    }
}
