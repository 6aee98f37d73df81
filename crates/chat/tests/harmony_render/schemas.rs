//! Tool schemas, against the reference's TypeScript.

use ctxserve_chat::testing::o200k_tokenizer;
use ctxserve_chat::{Conversation, FunctionTool};
use openai_harmony::chat::ToolDescription;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{agree, oracle, render, system, tool, user};

pub(super) fn described(tool: &FunctionTool) -> ToolDescription {
    ToolDescription::new(
        tool.name.as_str(),
        tool.description.clone().unwrap_or_default(),
        tool.parameters.clone(),
    )
}

#[track_caller]
fn agree_on(tools: Vec<FunctionTool>) {
    let reference =
        [system(), oracle::developer(None, tools.iter().map(described).collect()), oracle::user("Hi")];
    agree(&Conversation { messages: vec![user("Hi")], tools, ..Conversation::default() }, &reference);
}

#[test]
fn descriptions_and_empty_parameters() {
    agree_on(vec![
        tool("bare", None, None),
        tool("empty_description", Some(""), None),
        tool("lines", Some("First line.\nSecond line.\n\n  Fourth, indented.\r\nFifth."), None),
        tool("no_properties", Some("x"), Some(json!({ "type": "object", "properties": {} }))),
        tool("no_properties_at_all", None, Some(json!({ "type": "object" }))),
        tool("no_type", None, Some(json!({ "properties": { "a": { "type": "string" } } }))),
        tool("not_an_object", None, Some(json!({ "type": "string" }))),
        tool("a_boolean_schema", None, Some(json!(true))),
        tool("ns.dotted-name", Some("Dots and dashes."), Some(json!({}))),
    ]);
}

/// HAR-20.
#[test]
fn every_keyword() {
    let schema = json!({
        "type": "object",
        "description": "All of it.",
        "properties": {
            "plain": { "type": "string", "description": "A string" },
            "multi_line": { "type": "string", "description": "First\nsecond" },
            "count": { "type": "integer", "default": 3 },
            "ratio": { "type": "number", "default": 0.5, "nullable": true },
            "on": { "type": "boolean", "default": false },
            "kind": { "type": "string", "enum": ["a", "b"], "default": "a" },
            "mixed_enum": { "type": "string", "enum": ["a", 1, null], "default": null },
            "empty_enum": { "type": "string", "enum": [], "default": "x" },
            "numbers_only_enum": { "type": "string", "enum": [1, 2] },
            "untyped_enum": { "enum": ["a", "b"], "default": "b" },
            "text_default": { "type": "string", "default": "say \"hi\"\\" },
            "null_default": { "type": ["number", "null"], "default": null },
            "array_default": { "type": "array", "items": { "type": "string" }, "default": ["x", 1, { "k": 1.0 }] },
            "list": { "type": "array" },
            "strings": { "type": "array", "items": { "type": "string", "enum": ["p", "q"] } },
            "matrix": { "type": "array", "items": { "type": "array", "items": { "type": "integer" } } },
            "types": { "type": ["string", "integer", "boolean", "null"] },
            "no_types": { "type": [] },
            "odd_types": { "type": [1, { "a": 2 }] },
            "odd_type": { "type": 7 },
            "null_type": { "type": "null" },
            "unknown_type": { "type": "date" },
            "any": { "description": "No type" },
            "any_of": { "anyOf": [{ "type": "string" }, { "type": "null" }], "default": null },
            "all_of": { "allOf": [{ "type": "string" }] },
            "reference": { "$ref": "#/$defs/point" },
            "constant": { "const": 1 },
            "yes": true,
            "nothing": null,
            "titled": { "type": "string", "title": "Title", "description": "With a title", "examples": ["x", 3, "y"] },
            "examples_without_strings": { "type": "number", "examples": [1, 2] },
            "no_examples": { "type": "string", "examples": [] },
            "nested": {
                "type": "object",
                "description": "An object",
                "properties": {
                    "deep": {
                        "type": "object",
                        "properties": { "x": { "type": "number", "description": "Deep" } },
                        "required": ["x"],
                    },
                    "flag": { "type": "boolean", "title": "Flag" },
                },
                "required": ["flag", 1, "absent"],
                "nullable": true,
            },
            "objects": {
                "type": "array",
                "items": { "type": "object", "properties": { "a": { "type": "string", "default": "z" } } },
            },
            "nullable_null": { "type": ["string", "null"], "nullable": true },
            "名前": { "type": "string", "description": "説明 🦀" },
        },
        "required": ["plain", "nested", "objects"],
        "additionalProperties": false,
        "$defs": { "point": { "type": "object", "properties": { "x": { "type": "number" } } } },
    });
    agree_on(vec![tool("everything", Some("Every keyword."), Some(schema))]);
}

/// The odd indentation is what Context-1 was trained on.
#[test]
fn a_tool_of_context_1() {
    let schema = json!({
        "type": "object",
        "properties": { "tool_calls": { "type": "array", "items": {
            "type": "object",
            "properties": { "tool_name": { "type": "string" }, "parameters": { "type": "object" } },
            "required": ["tool_name", "parameters"],
        } } },
        "required": ["tool_calls"],
    });
    let tools = vec![tool("multi_tool_use", Some("Calls several."), Some(schema))];
    agree_on(tools.clone());
    let ids = render(&Conversation { messages: vec![user("Hi")], tools, ..Conversation::default() }).unwrap();
    let expected = "// Calls several.\ntype multi_tool_use = (_: {\ntool_calls: {\n    tool_name: string,\n    \
                    parameters: {\n        },\n    }[],\n}) => any;\n\n} // namespace functions";
    let text = o200k_tokenizer().decode(&ids, true);
    assert!(text.contains(expected), "{text}");
}

/// HAR-20.
#[test]
fn one_of() {
    let variants = json!([
        { "type": "string", "description": "A name", "default": "x" },
        { "type": "string", "enum": ["a", "b"], "description": "A choice", "default": "a" },
        { "type": "number", "nullable": true, "default": 2 },
        { "type": "object", "description": "An object", "properties": { "k": { "type": "string" } }, "required": ["k"] },
        { "type": "array", "items": { "oneOf": [{ "type": "string" }, { "type": "integer", "description": "i" }] } },
        { "oneOf": [{ "type": "boolean" }, { "type": "null" }] },
        {},
    ]);
    agree_on(vec![
        tool("at_the_top", None, Some(json!({ "oneOf": variants.clone() }))),
        tool("empty", None, Some(json!({ "oneOf": [] }))),
        tool("odd", None, Some(json!({ "oneOf": 3 }))),
        tool(
            "in_properties",
            None,
            Some(json!({ "type": "object", "properties": {
                "described": { "description": "Outer", "oneOf": variants.clone(), "default": "d" },
                "repeated": { "description": "A name", "oneOf": variants.clone(), "default": 1, "title": "T", "examples": ["e"] },
                "undescribed": { "oneOf": variants.clone(), "enum": ["d"], "default": "d" },
                "empty": { "oneOf": [], "description": "Nothing" },
                "odd": { "oneOf": "x", "type": "string", "description": "Odd", "default": "d" },
                "in_items": { "type": "array", "items": { "oneOf": variants } },
            }, "required": ["described"] })),
        ),
    ]);
}

#[test]
fn a_schema_without_end_is_cut() {
    let mut schema = json!({ "type": "string" });
    for _ in 0..500 {
        schema = json!({ "type": "object", "properties": { "a": schema } });
    }
    let conversation = Conversation {
        messages: vec![user("Hi")],
        tools: vec![tool("deep", None, Some(schema))],
        ..Conversation::default()
    };
    let text = o200k_tokenizer().decode(&render(&conversation).unwrap(), true);
    assert!(text.contains("a?: any,"), "{text}");
}

fn schema() -> impl Strategy<Value = Value> {
    let word = prop_oneof![
        Just("a"),
        Just("Text with \"quotes\""),
        Just("null"),
        Just("one\ntwo"),
        Just("日本"),
        Just("")
    ];
    let word = word.prop_map(Value::from);
    let scalar =
        prop_oneof![word.clone(), Just(json!(1)), Just(json!(2.5)), Just(json!(null)), Just(json!(true))];
    let kind = prop_oneof![
        4 => prop_oneof![Just("string"), Just("number"), Just("integer"), Just("boolean"), Just("null"), Just("array"), Just("object")]
            .prop_map(Value::from),
        1 => prop::collection::vec(prop_oneof![Just("string"), Just("integer"), Just("null")], 0..3).prop_map(Value::from),
        1 => scalar.clone(),
    ];
    let annotations = (
        prop::option::of(kind),
        prop::option::of(word.clone()),
        prop::option::weighted(0.2, word),
        prop::option::weighted(0.3, scalar.clone()),
        prop::option::weighted(0.2, prop::collection::vec(scalar.clone(), 0..3).prop_map(Value::from)),
        prop::option::weighted(0.2, prop::collection::vec(scalar, 0..3).prop_map(Value::from)),
        prop::option::weighted(0.2, any::<bool>().prop_map(Value::from)),
    );
    let plain = annotations.prop_map(|(kind, description, title, default, examples, choices, nullable)| {
        let fields = [
            ("type", kind),
            ("description", description),
            ("title", title),
            ("default", default),
            ("examples", examples),
            ("enum", choices),
            ("nullable", nullable),
        ];
        Value::Object(fields.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect())
    });
    plain.clone().prop_recursive(4, 24, 4, move |inner| {
        let with = |key: &'static str, value: BoxedStrategy<Value>| {
            (plain.clone(), value).prop_map(move |(mut schema, value)| {
                schema[key] = value;
                schema
            })
        };
        let list = prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from).boxed();
        let properties = prop::collection::vec(("[a-c]", inner.clone()), 0..4)
            .prop_map(|fields| Value::Object(fields.into_iter().collect()))
            .boxed();
        prop_oneof![
            1 => with("oneOf", list),
            1 => with("items", inner.boxed()),
            3 => with("properties", properties).prop_map(|mut schema| {
                schema["type"] = json!("object");
                schema["required"] = json!(["a"]);
                schema
            }),
        ]
    })
}

proptest! {
    /// HAR-20: whatever schema.
    #[test]
    fn any_schema(schema in schema(), description in "[a-z \n]{0,20}") {
        agree_on(vec![tool("f", Some(&description), Some(schema))]);
    }
}
