//! Whatever JSON stands in whatever field, the answer is a success or a 4xx in the envelope.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use common::{Setup, merged};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

const FIELDS: &[&str] = &[
    "model",
    "messages",
    "prompt",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "reasoning_effort",
    "n",
    "best_of",
    "chat_template_kwargs",
    "logprobs",
    "top_logprobs",
    "max_tokens",
    "max_completion_tokens",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "seed",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "stream",
    "stream_options",
    "echo",
    "ignore_eos",
    "return_token_ids",
    "tokens",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "response_format",
    "functions",
    "suffix",
    "include_reasoning",
    "add_generation_prompt",
    "return_token_strs",
    "user",
    "unknown",
    "input",
    "instructions",
    "previous_response_id",
    "reasoning",
    "text",
    "include",
    "metadata",
    "store",
    "background",
    "truncation",
    "service_tier",
    "max_output_tokens",
];

const KEYS: &[&str] = &[
    "role",
    "content",
    "type",
    "text",
    "name",
    "function",
    "parameters",
    "properties",
    "id",
    "arguments",
    "tool_calls",
    "tool_call_id",
    "include_usage",
    "anyOf",
    "enum",
    "default",
    "items",
    "required",
    "description",
    "$ref",
    "1",
    "call_id",
    "output",
    "encrypted_content",
    "format",
    "schema",
    "effort",
];

const WORDS: &[&str] = &[
    "",
    "user",
    "assistant",
    "system",
    "tool",
    "developer",
    "function",
    "auto",
    "none",
    "required",
    "text",
    "string",
    "object",
    "array",
    "<|end|>",
    "<|start|>assistant",
    "low",
    "\u{0}",
    "日本🦀",
    "-1",
    "scripted",
    "call_1",
    "#",
    "message",
    "reasoning",
    "function_call",
    "function_call_output",
    "item_reference",
    "input_text",
    "json_schema",
];

fn any_json() -> impl Strategy<Value = Value> {
    let word = || prop::sample::select(WORDS).prop_map(str::to_owned);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-3i64..300).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        word().prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 5, move |inner| {
        let keys = prop_oneof![4 => prop::sample::select(KEYS).prop_map(str::to_owned), 1 => word()];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::vec((keys, inner), 0..5).prop_map(|list| Value::from(Map::from_iter(list))),
        ]
    })
}

/// OAI-07, OAI-18: whatever stands in whatever field.
#[test]
fn no_json_is_a_server_error() {
    no_json_fails(Setup::new(&["<|channel|>final<|message|>ok<|return|>"]));
}

#[test]
fn nor_is_any_with_the_hermes_format() {
    no_json_fails(Setup::hermes(&["<tool_call>{\"name\": \"f\"}</tool_call>ok<|im_end|>"]));
}

fn no_json_fails(setup: Setup) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let server = runtime.block_on(async { setup.start() });
    let messages = json!([{"role": "user", "content": "hi"}]);
    let bases = [
        ("/v1/chat/completions", json!({"messages": messages, "max_tokens": 3})),
        ("/v1/completions", json!({"prompt": "hi", "max_tokens": 3})),
        ("/v1/responses", json!({"input": "hi", "max_output_tokens": 3})),
        ("/v1/responses", json!({"input": messages, "max_output_tokens": 3})),
        ("/tokenize", json!({"messages": messages})),
        ("/detokenize", json!({"tokens": [1]})),
    ];
    let field = (prop::sample::select(FIELDS), any_json());
    let case = (prop::sample::select(bases.to_vec()), prop::collection::vec(field, 1..4));
    let config = ProptestConfig { cases: 1500, ..ProptestConfig::default() };
    proptest!(config, |(((route, base), fields) in case)| {
        let extra: Map<String, Value> = fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let body = merged(base, Value::from(extra));
        let answer = runtime.block_on(server.post(route, &body));
        prop_assert!(answer.status.as_u16() < 500, "{} {}: {}", route, body, answer.text);
        if !answer.status.is_success() {
            answer.error();
        }
    });
    assert_eq!(runtime.block_on(server.get("/health")).status, 200);
}
