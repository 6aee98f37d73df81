//! JSON Schemas as the TypeScript-like types that gpt-oss was trained on.
//!
//! The text is byte for byte that of openai-harmony 0.0.8, odd corners included: `anyOf`, `$ref`, `const` and whatever
//! else it does not know are `any`. Total: no schema is an error, and none recurses without bound.

use std::collections::HashSet;
use std::fmt::Write;

use serde_json::Value;

/// Deeper levels are `any`.
const MAX_DEPTH: usize = 32;

/// The type of a tool's arguments.
pub(super) fn argument_type(schema: &Value) -> String {
    type_of(schema, 0, 0)
}

/// `indent` is in spaces and applies to the lines after the first.
fn type_of(schema: &Value, indent: usize, depth: usize) -> String {
    if depth == MAX_DEPTH {
        return "any".to_owned();
    }
    if let Some(variants) = schema.get("oneOf").and_then(Value::as_array) {
        return union(variants, indent, depth);
    }
    match schema.get("type") {
        Some(Value::Array(types)) => {
            let names: Vec<&str> = types
                .iter()
                .filter_map(Value::as_str)
                .map(|name| if name == "integer" { "number" } else { name })
                .collect();
            if names.is_empty() { "any".to_owned() } else { names.join(" | ") }
        }
        Some(Value::String(name)) => match name.as_str() {
            "object" => object(schema, indent, depth),
            "string" => string(schema),
            "number" | "integer" => "number".to_owned(),
            "boolean" => "boolean".to_owned(),
            "array" => match schema.get("items") {
                Some(items) => format!("{}[]", type_of(items, indent, depth + 1)),
                None => "Array<any>".to_owned(),
            },
            _ => "any".to_owned(),
        },
        _ => "any".to_owned(),
    }
}

/// `oneOf` anywhere but directly in a property.
fn union(variants: &[Value], indent: usize, depth: usize) -> String {
    let mut out = String::new();
    for variant in variants {
        let _ = write!(out, "\n{:indent$} | {}", "", nullable_type(variant, indent + 3, depth + 1));
        let mut comments: Vec<String> =
            text_of(variant, "description").map(str::to_owned).into_iter().collect();
        if let Some(default) = variant.get("default") {
            // Unlike everywhere else, an enum's default is quoted here.
            comments.push(format!(
                "default: {}",
                if is_enum(variant) { default.to_string() } else { quoted(default) }
            ));
        }
        push_trailing(&mut out, &comments);
    }
    out
}

fn string(schema: &Value) -> String {
    let choices: Vec<String> = schema
        .get("enum")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(|choice| format!("\"{choice}\""))
        .collect();
    if choices.is_empty() { "string".to_owned() } else { choices.join(" | ") }
}

fn object(schema: &Value, indent: usize, depth: usize) -> String {
    let mut out = String::new();
    if let Some(description) = text_of(schema, "description") {
        let _ = writeln!(out, "{:indent$}// {description}", "");
    }
    out.push_str("{\n");
    let required: HashSet<&str> = schema
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    for (name, property) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let key = if required.contains(name.as_str()) { name.clone() } else { format!("{name}?") };
        push_heading(&mut out, property, indent);
        if let Some(variants) = property.get("oneOf").and_then(Value::as_array) {
            push_union_property(&mut out, &key, property, variants, indent, depth);
        } else {
            let _ = write!(out, "{:indent$}{key}: {},", "", nullable_type(property, indent + 4, depth + 1));
            if property.get("oneOf").is_none()
                && let Some(default) = property.get("default")
            {
                let _ = write!(out, " // default: {}", default_of(property, default));
            }
            out.push('\n');
        }
    }
    let _ = write!(out, "{:indent$}}}", "");
    out
}

/// Comment lines above a property: title, description, examples.
fn push_heading(out: &mut String, property: &Value, indent: usize) {
    if let Some(title) = text_of(property, "title") {
        let _ = writeln!(out, "{0:indent$}// {title}\n{0:indent$}//", "");
    }
    if property.get("oneOf").is_none()
        && let Some(description) = text_of(property, "description")
    {
        let _ = writeln!(out, "{:indent$}// {description}", "");
    }
    if let Some(examples) = property.get("examples").and_then(Value::as_array).filter(|list| !list.is_empty())
    {
        let _ = writeln!(out, "{:indent$}// Examples:", "");
        for example in examples.iter().filter_map(Value::as_str) {
            let _ = writeln!(out, "{:indent$}// - \"{example}\"", "");
        }
    }
}

/// A property that is a `oneOf`: one line a variant, comments behind.
fn push_union_property(
    out: &mut String,
    key: &str,
    property: &Value,
    variants: &[Value],
    indent: usize,
    depth: usize,
) {
    let description = text_of(property, "description");
    // A description that only repeats the first variant's is left out.
    let repeated = variants.first().and_then(|first| text_of(first, "description")) == description;
    let above = description.filter(|_| !repeated);
    if let Some(description) = above {
        let _ = writeln!(out, "{:indent$}// {description}", "");
    }
    if let Some(default) = property.get("default") {
        let _ = writeln!(out, "{:indent$}// default: {}", "", default_of(property, default));
    }
    let _ = writeln!(out, "{:indent$}{key}:", "");
    for (i, variant) in variants.iter().enumerate() {
        let _ = write!(out, "{:indent$} | {}", "", nullable_type(variant, indent + 3, depth + 1));
        let mut comments = Vec::new();
        if !(i == 0 && above.is_some())
            && let Some(text) = text_of(variant, "description")
            && Some(text) != description
        {
            comments.push(text.to_owned());
        }
        if let Some(default) = variant.get("default") {
            comments.push(format!("default: {}", default_of(variant, default)));
        }
        push_trailing(out, &comments);
        out.push('\n');
    }
    let _ = writeln!(out, "{:indent$},", "");
}

fn nullable_type(schema: &Value, indent: usize, depth: usize) -> String {
    let mut text = type_of(schema, indent, depth);
    if schema.get("nullable").and_then(Value::as_bool) == Some(true) && !text.contains("null") {
        text.push_str(" | null");
    }
    text
}

fn push_trailing(out: &mut String, comments: &[String]) {
    if !comments.is_empty() {
        let _ = write!(out, " // {}", comments.join(" "));
    }
}

fn text_of<'a>(schema: &'a Value, field: &str) -> Option<&'a str> {
    schema.get(field).and_then(Value::as_str)
}

fn is_enum(schema: &Value) -> bool {
    schema.get("enum").and_then(Value::as_array).is_some_and(|choices| !choices.is_empty())
}

/// A string in quotes, unescaped; anything else as JSON.
fn quoted(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), |text| format!("\"{text}\""))
}

/// As [`quoted`], but an enum's string is bare.
fn default_of(schema: &Value, default: &Value) -> String {
    match default {
        Value::String(text) if is_enum(schema) => text.clone(),
        other => quoted(other),
    }
}
