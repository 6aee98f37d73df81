//! What clients may send to hurt: the grammar rows of the security matrix. Each is refused, or bounded, and quick.

use std::time::{Duration, Instant};

use ctxserve_chat::guide::{CallRule, Demands, Fault, Grammar, Guides};
use ctxserve_chat::testing::demo_tokenizer;
use serde_json::{Value, json};

use crate::common::{Bench, Random, tool};

/// Far above what any of these takes, far below what would be a stall.
const SOON: Duration = Duration::from_secs(20);

/// Compiles and, if that works, follows for a while: neither may take long, and neither may take the process down.
fn survives(guides: &Guides, grammar: &Grammar) -> bool {
    let start = Instant::now();
    let bench = Bench::new("harmony");
    let compiled = guides.plain(grammar, &[2]);
    if let Ok(mut guide) = guides.plain(grammar, &[2]) {
        let mut random = Random(7);
        for _ in 0..30 {
            let Ok(allowed) = guide.allowed() else { break };
            if guide.accept(bench.pick(&allowed, &mut random)).is_err() {
                break;
            }
        }
    }
    assert!(start.elapsed() < SOON, "{:?} for {}", start.elapsed(), &format!("{grammar:?}")[..60]);
    compiled.is_ok()
}

fn json_of(schema: Value) -> Grammar {
    Grammar::Json { schema, strict: false }
}

/// CVE-2026-55574, PYSEC-2026-3933: expressions that explode.
#[test]
fn regular_expressions_that_explode() {
    let guides = Guides::new(demo_tokenizer());
    let (huge, classes) = ("(a{1,9999}){1,9999}".to_owned(), r"[\pL\pN]{1000}".repeat(20));
    let many = format!("({})*", (0..2000).map(|i| format!("w{i}x")).collect::<Vec<_>>().join("|"));
    for text in
        ["(a+)+b", "(a|aa)+$", "(.*a){50}", "((a{0,99}){0,99}){0,99}", "(x+x+)+y", &huge, &classes, &many]
    {
        survives(&guides, &Grammar::Regex(text.to_owned()));
        survives(&guides, &json_of(json!({"type": "string", "pattern": text})));
        let key = json!({"type": "object", "patternProperties": {text: {"type": "string"}}});
        survives(&guides, &json_of(key));
    }
}

/// CVE-2026-25048, CVE-2025-57809: depth that overflows a stack.
#[test]
fn depth() {
    let guides = Guides::new(demo_tokenizer());
    for depth in [100, 1000, 10_000] {
        let nested = format!("{}a{}", "(".repeat(depth), ")".repeat(depth));
        assert!(!survives(&guides, &Grammar::Regex(nested.clone())), "{depth}");
        assert!(!survives(&guides, &Grammar::Lark(format!("start: {nested}"))));
        survives(&guides, &Grammar::Lark(format!("start: {}\"a\"", "~".repeat(depth))));
        survives(&guides, &Grammar::Regex(format!("a{}", "{1}".repeat(depth))));
        survives(&guides, &Grammar::Regex("a|".repeat(depth)));
        survives(&guides, &Grammar::Lark(format!("start: {}", "\"a\" | ".repeat(depth))));
    }
    let mut deep = json!({"type": "string"});
    for _ in 0..60 {
        deep = json!({"type": "object", "properties": {"a": deep}});
    }
    assert!(!survives(&guides, &json_of(deep)));
    let chain: serde_json::Map<_, _> = (0..1000)
        .map(|i| (format!("d{i}"), json!({"$ref": format!("#/$defs/d{}", i + 1)})))
        .chain([("d1000".to_owned(), json!({"type": "null"}))])
        .collect();
    survives(&guides, &json_of(json!({"$ref": "#/$defs/d0", "$defs": chain})));
}

/// References that go round in circles.
#[test]
fn circular_references() {
    let guides = Guides::new(demo_tokenizer());
    for schema in [
        json!({"$ref": "#"}),
        json!({"allOf": [{"$ref": "#"}]}),
        json!({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}),
        json!({"oneOf": [{"$ref": "#"}]}),
        json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
        json!({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}, {"type": "object"}]}, "b": {"allOf": [{"$ref": "#/$defs/a"}]}}}),
        json!({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"], "additionalProperties": false}),
        json!({"not": {"$ref": "#"}}),
        json!({"type": "array", "items": {"$ref": "#"}, "minItems": 1}),
        json!({"$ref": "#/nowhere"}),
        json!({"$ref": "http://127.0.0.1:9/schema.json"}),
        json!({"$ref": "file:///etc/passwd"}),
    ] {
        survives(&guides, &json_of(schema));
    }
    for grammar in [
        "start: start",
        "start: a\na: b\nb: a",
        "start: start start | \"x\"",
        "start: a*\na: \"\"?",
        "start: %json {\"$ref\": \"#\"}",
    ] {
        survives(&guides, &Grammar::Lark(grammar.to_owned()));
    }
}

/// CVE-2025-58446: sizes.
#[test]
fn size() {
    let guides = Guides::new(demo_tokenizer());
    let members: Vec<String> = (0..100_000).map(|i| format!("member {i}")).collect();
    assert!(!survives(&guides, &json_of(json!({"enum": members}))));
    survives(&guides, &json_of(json!({"enum": &members[..10_000]})));
    assert!(!survives(&guides, &Grammar::Choice(members)));
    let huge = 4_000_000_000_u64;
    for schema in [
        json!({"type": "string", "minLength": huge}),
        json!({"type": "string", "maxLength": huge}),
        json!({"type": "array", "minItems": huge}),
        json!({"type": "array", "items": {"type": "string"}, "maxItems": 1_000_000}),
        json!({"type": "object", "minProperties": huge}),
        json!({"type": "integer", "minimum": -1e300, "maximum": 1e300}),
        json!({"type": "number", "multipleOf": 1e-300}),
        json!({"type": "integer", "multipleOf": 0}),
        json!({"type": "number", "minimum": 0.1, "maximum": 0.100_000_000_1}),
    ] {
        survives(&guides, &json_of(schema));
    }
    let properties: serde_json::Map<_, _> =
        (0..3000).map(|i| (format!("property{i}"), json!({"type": "string", "maxLength": 5000}))).collect();
    survives(&guides, &json_of(json!({"type": "object", "properties": properties})));
    let any: Vec<Value> = (0..500)
        .map(|i| json!({"type": "object", "properties": {format!("p{i}"): {"type": "string"}}}))
        .collect();
    survives(&guides, &json_of(json!({"anyOf": any})));
    survives(&guides, &json_of(json!({"allOf": any})));
    survives(&guides, &json_of(json!({"oneOf": any})));
}

/// CVE-2026-105757: values that are empty, and what matches nothing.
#[test]
fn emptiness() {
    let guides = Guides::new(demo_tokenizer());
    for bad in [
        Grammar::Regex(String::new()),
        Grammar::Regex("(".to_owned()),
        Grammar::Regex("a(?=b)".to_owned()),
        Grammar::Regex("a\\\\\\".to_owned()),
        Grammar::Lark(" \n".to_owned()),
        Grammar::Lark("root ::= x".to_owned()),
        Grammar::Lark("start: undefined_rule".to_owned()),
        Grammar::Choice(vec![]),
        Grammar::Choice(vec![String::new()]),
        json_of(json!(null)),
        json_of(json!("string")),
        json_of(json!([])),
        json_of(json!(false)),
        json_of(json!({"type": "integer", "minimum": 5, "maximum": 4})),
        json_of(json!({"enum": []})),
    ] {
        let error = guides.plain(&bad, &[2]).expect_err(&format!("{bad:?}"));
        assert!(error.fault == Fault::Content && !error.what.is_empty() && error.what.len() < 600, "{error}");
        assert!(!error.what.contains("backtrace") && !error.what.contains("panic"), "{bad:?}: {error}");
    }
    // One that works, behind all those.
    assert!(survives(&guides, &json_of(json!({}))) && survives(&guides, &json_of(json!(true))));
}

/// GHSA-vrq3-r879-7m65: every keyword with every wrong type. An error or not, never worse.
#[test]
fn keywords_of_wrong_types() {
    let guides = Guides::new(demo_tokenizer());
    let keywords = [
        "type",
        "properties",
        "required",
        "additionalProperties",
        "items",
        "prefixItems",
        "minItems",
        "maxItems",
        "enum",
        "const",
        "pattern",
        "format",
        "minLength",
        "maxLength",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "multipleOf",
        "anyOf",
        "oneOf",
        "allOf",
        "not",
        "if",
        "then",
        "$ref",
        "$defs",
        "definitions",
        "patternProperties",
        "propertyNames",
        "minProperties",
        "x-guidance",
        "$schema",
        "$id",
        "default",
        "title",
    ];
    let values = [
        json!(null),
        json!(true),
        json!(-1),
        json!(1e308),
        json!(""),
        json!("("),
        json!([]),
        json!([1]),
        json!({}),
        json!({"a": 1}),
        json!([[]]),
    ];
    let bench = Bench::new("harmony");
    for keyword in keywords {
        for value in &values {
            let grammar = json_of(json!({keyword: value}));
            let _ = guides.plain(&grammar, &[2]);
            let tools = vec![tool("f", json!({keyword: value}), true)];
            let demands = Demands { tools, calls: CallRule::Required, ..Demands::default() };
            if let Err(error) = bench.format.guide(&guides, &demands, &[]) {
                assert_eq!(error.fault, Fault::Tool(0), "{keyword} {value}");
            }
        }
    }
}
