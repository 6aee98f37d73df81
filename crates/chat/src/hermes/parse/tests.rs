//! Work is linear in the answer, whatever the model writes.

use super::HermesParser;
use crate::hermes::HermesTokens;
use crate::testing::qwen_tokenizer;
use crate::work;
use crate::{End, ParserOptions, StreamParser};

/// Characters looked at and deltas made while parsing `unit`, `times` times, behind `head`.
fn cost(head: &str, unit: &str, times: usize, thinking: bool) -> usize {
    let tokenizer = qwen_tokenizer();
    let tokens = HermesTokens::new(&tokenizer).unwrap();
    let mut ids = tokenizer.encode_with_control(head);
    let unit = tokenizer.encode_with_control(unit);
    (0..times).for_each(|_| ids.extend(&unit));
    let mut parser =
        HermesParser::new(tokenizer, tokens, ParserOptions { thinking, ..ParserOptions::default() });
    let mut deltas = Vec::new();
    work::take();
    ids.iter().for_each(|id| {
        parser.push(*id, &mut deltas);
    });
    parser.finish(End::Stop, &mut deltas);
    work::take() + deltas.len()
}

#[test]
fn twice_the_answer_is_twice_the_work() {
    let call = "<tool_call>\n{\"name\": \"f\", \"arguments\": ";
    let whole = "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>\n";
    for (head, unit) in [
        ("", "a<"),
        ("", "<tool_"),
        ("", "<tool_call>"),
        ("", "</tool_call>"),
        ("", "<think>"),
        ("", "</think>"),
        ("", "\n"),
        ("", " "),
        ("", whole),
        ("", call),
        ("", "<tool_call>{\"name\": \"f\"</tool_call>"),
        ("<tool_call>{", "\"a\": 1, "),
        ("<tool_call>{\"", "a"),
        ("<tool_call>{\"arguments\": ", "[{"),
        (call, "{"),
        (call, "[1,"),
        (call, "{\""),
        (call, "]"),
        ("<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": [1}", "}"),
        ("<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"", "\n"),
        ("<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"", "\n</tool_call"),
        ("<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"", "\\u12"),
        ("<tool_call>{\"name\": \"f\", \"arguments\": \"", "{\\\""),
        (whole, "}"),
        (whole, " \n"),
    ] {
        for thinking in [false, true] {
            let (once, twice) = (cost(head, unit, 2_000, thinking), cost(head, unit, 4_000, thinking));
            assert!(
                twice <= 2 * once + once / 8 + 2_000,
                "{head} ({unit})* {thinking}: {once}, then {twice}"
            );
        }
    }
}

#[test]
fn nesting_is_no_recursion() {
    let depth = 200_000;
    let tokenizer = qwen_tokenizer();
    let tokens = HermesTokens::new(&tokenizer).unwrap();
    let body = "[".repeat(depth) + &"]".repeat(depth);
    let text = format!("<tool_call>{{\"name\": \"f\", \"arguments\": {body}}}</tool_call><|im_end|>");
    let ids = tokenizer.encode_with_control(&text);
    let mut parser = HermesParser::new(tokenizer, tokens, ParserOptions::default());
    let mut deltas = Vec::new();
    ids.iter().for_each(|id| {
        parser.push(*id, &mut deltas);
    });
    let outcome = parser.finish(End::Stop, &mut deltas);
    assert_eq!(outcome.recoveries, Vec::<&str>::new());
}
