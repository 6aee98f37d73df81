//! Work is linear in the answer, whatever the model writes.

use std::sync::Arc;

use super::HarmonyParser;
use crate::harmony::HarmonyTokens;
use crate::testing::demo_tokenizer;
use crate::work;
use crate::{End, ParserOptions, StreamParser};

/// Bytes looked at and bytes made while parsing `unit`, `times` times, behind `head`.
fn cost(head: &str, unit: &str, times: usize) -> usize {
    let tokenizer = demo_tokenizer();
    let tokens = HarmonyTokens::new(&tokenizer).unwrap();
    let mut ids = tokenizer.encode_with_control(head);
    let unit = tokenizer.encode_with_control(unit);
    (0..times).for_each(|_| ids.extend(&unit));
    let mut parser = HarmonyParser::new(Arc::clone(&tokenizer), tokens, ParserOptions::default());
    let mut deltas = Vec::new();
    work::take();
    ids.iter().for_each(|id| {
        parser.push(*id, &mut deltas);
    });
    parser.finish(End::Cut, &mut deltas);
    work::take() + deltas.len()
}

#[test]
fn twice_the_answer_is_twice_the_work() {
    let call = "<|channel|>commentary to=functions.x json<|message|>";
    for (head, unit) in [
        ("", "<|channel|>"),
        ("", "<|start|>"),
        ("", "<|constrain|>"),
        ("", "<|start|>assistant"),
        ("<|start|>", "final"),
        ("", "assistant"),
        ("", "final"),
        ("", "to="),
        ("", " to=functions.x"),
        ("", "assistant commentary "),
        ("<|channel|>", "??"),
        ("<|channel|>commentary", " json"),
        ("<|channel|>final<|message|>", "a<|channel|>"),
        ("<|channel|>final<|message|>", "<|channel|>final<|message|>"),
        ("", "<|end|>assistant"),
        ("", "<|end|>assistantassistantfinal<|start|>"),
        ("<|message|>", "text "),
        (call, "{"),
        (call, "x{"),
        (call, "x{a}"),
        (call, "{\""),
        (call, "\\u"),
        ("<|channel|>commentary to=functions.x json<|message|>{\"", "\\u12"),
        ("<|channel|>commentary to=functions.x json<|message|>{\"", "\n"),
        ("<|channel|>commentary to=functions.x json<|message|>", "[1]"),
        ("<|channel|>commentary to=functions.x json<|message|>[", "[],"),
        (call, "{}<|start|>assistant<|channel|>commentary to=functions.x json<|message|>"),
    ] {
        // The shorter is longer than any header can be.
        let (once, twice) = (cost(head, unit, 2_000), cost(head, unit, 4_000));
        assert!(twice <= 2 * once + once / 8 + 2_000, "{head} ({unit})*: {once}, then {twice}");
    }
}

#[test]
fn nesting_is_no_recursion() {
    let depth = 200_000;
    let tokenizer = demo_tokenizer();
    let tokens = HarmonyTokens::new(&tokenizer).unwrap();
    let mut parser = HarmonyParser::new(Arc::clone(&tokenizer), tokens, ParserOptions::default());
    let body = "[".repeat(depth) + &"]".repeat(depth);
    let mut ids = tokenizer.encode_with_control("<|channel|>commentary to=functions.x json<|message|>");
    ids.extend(tokenizer.encode(&body));
    ids.extend(tokenizer.encode_with_control("<|call|>"));
    let mut deltas = Vec::new();
    ids.iter().for_each(|id| {
        parser.push(*id, &mut deltas);
    });
    let outcome = parser.finish(End::Stop, &mut deltas);
    assert_eq!(outcome.recoveries, Vec::<&str>::new());
}
