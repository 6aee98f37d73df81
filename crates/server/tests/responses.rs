//! `/v1/responses`: what answers look like, whole and streamed, and what requests may ask for.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use common::responses::{joined, text, without_ids};
use common::{Setup, merged};
use proptest::prelude::*;
use serde_json::{Value, json};

const THINK: &str = "<|channel|>analysis<|message|>Let me think.<|end|><|start|>assistant";

fn call(name: &str, arguments: &str) -> String {
    format!("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>")
}

fn says(text: &str) -> String {
    format!("{THINK}<|channel|>final<|message|>{text}<|return|>")
}

fn request(extra: Value) -> Value {
    merged(json!({"input": "hi"}), extra)
}

fn tool(name: &str) -> Value {
    json!({"type": "function", "name": name, "description": "d", "parameters": {"type": "object", "properties": {}}})
}

fn scripts() -> Vec<String> {
    vec![
        "<|channel|>final<|message|>Hello, world!<|return|>".to_owned(),
        says("Grüße 日本語 🦀"),
        format!("{THINK}{}", call("get_weather", r#"{"city":"Zürich","days":[1,2]}"#)),
        format!("{THINK}<|channel|>commentary<|message|>I will look.<|end|><|start|>assistant{}", call("f", "{}")),
        format!("{THINK}{}", call("f", "not json ]")),
        "<|channel|>final<|message|>".to_owned(),
        "<|channel|>analysis<|message|>cut off in tho".to_owned(),
        "<|channel|>commentary to=functions.f<|message|>{\"a\":".to_owned(),
        "no header at all<|return|>".to_owned(),
        "<|channel|>final<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|><|start|>assistant<|channel|>final<|message|>c<|return|>".to_owned(),
        "<|return|>".to_owned(),
    ]
}

/// RSP-02, RSP-03, RSP-04: over odd answers and options, the events of a stream add up to its final object, whose ids are theirs,
/// and that object says what a whole answer says.
#[tokio::test]
async fn streamed_equals_whole_over_scripts_and_options() {
    let options = [
        json!({}),
        json!({"top_logprobs": 2, "include": ["reasoning.encrypted_content", "message.output_text.logprobs"]}),
        json!({"max_output_tokens": 9}),
        json!({"tool_choice": "none"}),
        json!({"parallel_tool_calls": false, "store": false}),
        json!({"stop": "o, w"}),
    ];
    let mut kinds = std::collections::BTreeSet::new();
    for script in scripts() {
        let server = Setup::new(&[&script]).start();
        for extra in &options {
            let whole = server.respond(&request(extra.clone())).await;
            assert_eq!(whole.status, 200, "{}", whole.text);
            let whole = whole.json();
            let streamed =
                joined(&server.respond(&merged(request(extra.clone()), json!({"stream": true}))).await);
            assert_eq!(without_ids(&whole), without_ids(&streamed), "{script} {extra}");
            for field in ["usage", "status", "incomplete_details", "model", "text", "tools"] {
                assert_eq!(whole[field], streamed[field], "{script} {extra}");
            }
            for item in whole["output"].as_array().unwrap() {
                kinds.insert(item["type"].as_str().unwrap().to_owned());
            }
        }
    }
    assert_eq!(kinds.into_iter().collect::<Vec<_>>(), ["function_call", "message", "reasoning"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// RSP-02, RSP-03, RSP-04: whatever the model writes.
    #[test]
    fn streamed_equals_whole_over_random_ids(
        ids in prop::collection::vec(prop_oneof![3 => 0u32..260, 2 => any::<prop::sample::Index>().prop_map(|i| {
            let specials: Vec<u32> = common::tokenizer().special_tokens().map(|(_, id)| id).collect();
            *i.get(&specials)
        })], 0..40),
        stop in prop::option::of("[a-e]{1,2}"),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let server = Setup::ids(vec![ids.clone()]).start();
            let body = json!({"input": "hi", "stop": stop, "top_logprobs": 1});
            let whole = server.respond(&body).await.json();
            let streamed = joined(&server.respond(&merged(body, json!({"stream": true}))).await);
            assert_eq!(without_ids(&whole), without_ids(&streamed), "{ids:?}");
            assert_eq!(whole["status"], streamed["status"]);
            assert!(!whole["output"].to_string().contains("<|"), "markup is shown");
        });
    }
}

#[tokio::test]
async fn hermes_answers_are_items_too() {
    let read = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"path\": \"/a\"}}\n</tool_call>";
    let server =
        Setup::hermes(&[&format!("<think>\nHm.\n</think>\n\nLet me look.\n{read}\n{read}<|im_end|>")])
            .start();
    let body = request(json!({"tools": [tool("f")]}));
    let whole = server.respond(&body).await.json();
    let streamed = joined(&server.respond(&merged(body, json!({"stream": true}))).await);
    assert_eq!(without_ids(&whole), without_ids(&streamed));
    let kinds: Vec<&str> =
        whole["output"].as_array().unwrap().iter().map(|item| item["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["reasoning", "message", "function_call", "function_call"]);
    assert_ne!(whole["output"][2]["call_id"], whole["output"][3]["call_id"]);
    assert_eq!(whole["output"][2]["arguments"], "{\"path\": \"/a\"}");
}

/// A conversation is the same prompt here as on the chat route, in every format.
#[tokio::test]
async fn the_prompt_is_that_of_the_chat_route() {
    let parameters = json!({"type": "object", "properties": {"q": {"type": "string"}}});
    let function = json!({"name": "f", "description": "d", "parameters": parameters});
    let chat = json!({
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "Let me see.", "reasoning": "Hm.", "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"q\": \"x\"}"}}
            ]},
            {"role": "tool", "tool_call_id": "c", "content": "found"},
            {"role": "assistant", "content": "It is x."},
            {"role": "user", "content": "and?"},
        ],
        "tools": [{"type": "function", "function": function}],
        "reasoning_effort": "high",
    });
    let responses = json!({
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": "hi"},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "Let me see."}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{\"q\": \"x\"}"},
            {"type": "function_call_output", "call_id": "c", "output": "found"},
            {"role": "assistant", "content": "It is x."},
            {"role": "user", "content": [{"type": "input_text", "text": "and?"}]},
        ],
        "tools": [merged(json!({"type": "function"}), function)],
        "reasoning": {"effort": "high"},
    });
    for server in [Setup::new(&[&says("x")]).start(), Setup::hermes(&["x<|im_end|>"]).start()] {
        let one = server.chat(&chat).await.json();
        let other = server.respond(&responses).await.json();
        assert_eq!(one["usage"]["prompt_tokens"], other["usage"]["input_tokens"], "{one} {other}");
    }
}

#[tokio::test]
async fn a_response_says_what_was_asked() {
    let server = Setup::new(&[&says("Hello")]).start();
    let one = server.respond(&request(json!({}))).await.json();
    assert_eq!(one["object"], "response");
    assert_eq!(one["status"], "completed");
    assert!(one["completed_at"].as_u64().unwrap() >= one["created_at"].as_u64().unwrap());
    for (field, value) in [
        ("background", json!(false)),
        ("error", Value::Null),
        ("incomplete_details", Value::Null),
        ("instructions", Value::Null),
        ("max_output_tokens", Value::Null),
        ("metadata", json!({})),
        ("model", json!("scripted")),
        ("parallel_tool_calls", json!(true)),
        ("previous_response_id", Value::Null),
        ("reasoning", json!({"effort": null, "summary": null})),
        ("service_tier", json!("default")),
        ("store", json!(true)),
        ("text", json!({"format": {"type": "text"}, "verbosity": "medium"})),
        ("tool_choice", json!("auto")),
        ("tools", json!([])),
        ("top_logprobs", json!(0)),
        ("truncation", json!("disabled")),
    ] {
        assert_eq!(one[field], value, "{field}");
    }
    assert_eq!(one["output"][0]["content"], json!([{"type": "reasoning_text", "text": "Let me think."}]));
    assert_eq!(one["output"][0]["summary"], json!([]));
    let content = json!([{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}]);
    assert_eq!(one["output"][1]["content"], content);
    assert_eq!(one["output"][1]["phase"], "final_answer");
    let usage = &one["usage"];
    assert_eq!(usage["input_tokens_details"]["cached_tokens"], 0);
    assert_eq!(
        usage["output_tokens_details"]["reasoning_tokens"],
        server.tokenizer.encode("Let me think.").len()
    );
    let sum = usage["input_tokens"].as_u64().unwrap() + usage["output_tokens"].as_u64().unwrap();
    assert_eq!(usage["total_tokens"], sum);

    let asked = json!({
        "model": "org/other", "instructions": "Be brief.", "max_output_tokens": 100, "metadata": {"a": "b"}, "temperature": 0.5,
        "parallel_tool_calls": false, "reasoning": {"effort": "high", "summary": "auto"}, "store": false, "user": "u",
        "tool_choice": {"type": "function", "name": "f"}, "tools": [tool("f")], "top_p": 0.25, "truncation": "auto",
        "text": {"format": {"type": "json_object"}}, "service_tier": "auto", "prompt_cache_key": "k", "safety_identifier": "s",
        "max_tool_calls": 3, "presence_penalty": 0.5, "frequency_penalty": 0.25,
    });
    let one = server.respond(&request(asked.clone())).await.json();
    for (field, value) in asked.as_object().unwrap() {
        let value = match field.as_str() {
            "tools" => json!([merged(tool("f"), json!({"strict": false}))]),
            "text" => json!({"format": {"type": "json_object"}, "verbosity": "medium"}),
            "service_tier" => json!("default"),
            _ => value.clone(),
        };
        assert_eq!(one[field], value, "{field}");
    }
}

#[tokio::test]
async fn a_cut_answer_is_incomplete() {
    let server = Setup::new(&[&says("Hello, world, and more")]).start();
    let body = request(json!({"max_output_tokens": 22, "stream": true}));
    let response = joined(&server.respond(&body).await);
    assert_eq!(response["status"], "incomplete");
    assert_eq!(response["incomplete_details"], json!({"reason": "max_output_tokens"}));
    assert_eq!(response["completed_at"], Value::Null);
    let last = response["output"].as_array().unwrap().last().unwrap();
    assert_eq!(last["status"], "incomplete");
    assert_eq!(response["usage"]["output_tokens"], 22);
}

#[tokio::test]
async fn log_probabilities_come_when_asked_for() {
    let server = Setup::new(&[&says("Hello")]).start();
    let entries =
        |response: &Value| response["output"][1]["content"][0]["logprobs"].as_array().unwrap().clone();
    for (extra, top) in [
        (json!({"include": ["message.output_text.logprobs"]}), 0),
        (json!({"top_logprobs": 3}), 1),
        (json!({"include": ["message.output_text.logprobs"], "top_logprobs": 1}), 1),
    ] {
        let entries = entries(&server.respond(&request(extra)).await.json());
        assert_eq!(entries.len(), server.tokenizer.encode("Hello").len());
        // The script has one candidate a token.
        assert!(entries.iter().all(|entry| entry["top_logprobs"].as_array().unwrap().len() == top));
        let said: Vec<u8> = entries
            .iter()
            .flat_map(|entry| entry["bytes"].as_array().unwrap())
            .map(|byte| u8::try_from(byte.as_u64().unwrap()).unwrap())
            .collect();
        assert_eq!(said, b"Hello");
    }
    assert!(entries(&server.respond(&request(json!({}))).await.json()).is_empty());
}

/// RSP-05: tools of types that are not run here are passed over, and the functions among them work.
#[tokio::test]
async fn tools_of_other_types_are_passed_over() {
    let server = Setup::new(&[&call("f", "{}")]).start();
    let tools = json!([
        {"type": "web_search_preview"}, {"type": "custom", "name": "patch"}, tool("f"), {"type": "mcp", "server_label": "x"},
        {"type": "local_shell"}
    ]);
    let choice = json!({"type": "allowed_tools", "mode": "required", "tools": [{"type": "mcp", "server_label": "x"}, {"type": "function", "name": "f"}]});
    for choice in [json!("auto"), json!("required"), choice, json!({"type": "function", "name": "f"})] {
        let answer = server.respond(&request(json!({"tools": tools, "tool_choice": choice}))).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let response = answer.json();
        assert_eq!(response["output"][0]["name"], "f");
        assert_eq!(response["tools"].as_array().unwrap().len(), 1);
        assert_eq!(response["tool_choice"], choice);
    }
}

/// The prompt of a request, by its count of tokens; the same text makes the same count.
async fn prompt(body: Value) -> u64 {
    let server = Setup::new(&[&says("x")]).start();
    let answer = server.respond(&body).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.json()["usage"]["input_tokens"].as_u64().unwrap()
}

/// RSP-09: every item that we emit is accepted back, also as clients change it on the way, and says the same.
#[tokio::test]
async fn what_was_emitted_is_accepted_back() {
    let script = format!("{THINK}{}", call("f", r#"{"a":"Zürich"}"#));
    let server = Setup::new(&[&script, &says("done")]).start();
    let include = json!(["reasoning.encrypted_content"]);
    let first = json!({"input": "hi", "tools": [tool("f")], "include": include, "store": false});
    let one = server.respond(&first).await.json();
    let output = one["output"].as_array().unwrap().clone();
    assert_eq!(output.len(), 2);
    let call_id = output[1]["call_id"].clone();
    let with = |output: Vec<Value>, result: Value| {
        let mut input = vec![json!({"role": "user", "content": "hi"})];
        input.extend(output);
        input.push(json!({"type": "function_call_output", "call_id": call_id, "output": result}));
        merged(first.clone(), json!({"input": input}))
    };
    let whole = prompt(with(output.clone(), json!("r"))).await;
    // As Codex sends reasoning: sealed alone.
    let mut sealed = output.clone();
    sealed[0].as_object_mut().unwrap().remove("content");
    sealed[0].as_object_mut().unwrap().remove("id");
    assert_eq!(prompt(with(sealed.clone(), json!("r"))).await, whole);
    let parts = json!([{"type": "input_text", "text": "r"}]);
    assert_eq!(prompt(with(output.clone(), parts)).await, whole);
    // With the nulls that SDKs write.
    let mut nulls = output.clone();
    nulls[0]["encrypted_content"] = Value::Null;
    nulls[0]["status"] = Value::Null;
    nulls[1]["status"] = Value::Null;
    assert_eq!(prompt(with(nulls, json!("r"))).await, whole);
    // Without reasoning the prompt is shorter: it was there.
    assert!(prompt(with(output[1..].to_vec(), json!("r"))).await < whole);
    // What another server encrypted is passed over.
    let mut foreign = sealed;
    foreign[0]["encrypted_content"] = json!("gAAAAABm");
    assert_eq!(prompt(with(foreign, json!("r"))).await, prompt(with(output[1..].to_vec(), json!("r"))).await);

    let two = Setup::new(&[&says("Hello")]).start();
    let logprobs = json!({"include": ["message.output_text.logprobs"], "input": "hi"});
    let said = two.respond(&logprobs).await.json()["output"][1].clone();
    let mut null = said.clone();
    null["content"][0]["logprobs"] = Value::Null;
    null["content"][0]["annotations"] = Value::Null;
    let again = |item: Value| json!({"input": [{"role": "user", "content": "hi"}, item, {"role": "user", "content": "on"}]});
    let easy = prompt(again(json!({"role": "assistant", "content": "Hello"}))).await;
    assert_eq!(prompt(again(said)).await, easy);
    assert_eq!(prompt(again(null)).await, easy);
}

#[tokio::test]
async fn forced_calls_and_formats_are_enforced() {
    // A script that does not obey: the guide leaves it no other way.
    let server = Setup::new(&[&call("f", "{}")]).start();
    let response =
        server.respond(&request(json!({"tools": [tool("f")], "tool_choice": "none"}))).await.json();
    assert!(response["output"].as_array().unwrap().iter().all(|item| item["type"] != "function_call"));
    let schema = json!({"type": "object", "properties": {}, "additionalProperties": false});
    for format in [
        json!({"type": "json_schema", "name": "n", "schema": schema, "strict": true}),
        json!({"type": "json_object"}),
        json!({"type": "text"}),
    ] {
        let server = Setup::new(&["<|channel|>final<|message|>{}<|return|>"]).start();
        let response = server.respond(&request(json!({"text": {"format": format}}))).await.json();
        assert_eq!(text(&response), "{}");
        assert_eq!(response["text"]["format"]["type"], format["type"]);
    }
}

#[tokio::test]
async fn refusals_name_the_field() {
    let server = Setup::new(&[&says("x")]).start();
    let image = json!([{"role": "user", "content": [{"type": "input_image", "image_url": "http://x"}]}]);
    let cases = [
        (json!({"input": null}), "input"),
        (json!({"input": []}), "input"),
        (json!({"input": 3}), "input"),
        (json!({"input": [3]}), "input[0]"),
        (json!({"input": image}), "input[0].content[0]"),
        (json!({"input": [{"type": "function_call_output", "call_id": "nope", "output": "x"}]}), "input[0]"),
        (json!({"include": ["x"]}), "include[0]"),
        (json!({"metadata": {"a": 1}}), "metadata"),
        (json!({"metadata": {"a".repeat(65): "b"}}), "metadata"),
        (json!({"reasoning": {"effort": "much"}}), "reasoning.effort"),
        (json!({"reasoning": {"summary": "long"}}), "reasoning.summary"),
        (json!({"text": {"format": {"type": "xml"}}}), "text.format.type"),
        (json!({"text": {"format": {"type": "json_schema", "schema": 1}}}), "text.format.schema"),
        (json!({"text": {"verbosity": "low"}}), "text.verbosity"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].name"),
        (json!({"tools": [{"name": "f"}]}), "tools[0].type"),
        (json!({"tools": [{"type": "function", "name": "f", "parameters": 1}]}), "tools[0].parameters"),
        (
            json!({"tools": [{"type": "mcp"}, {"type": "function", "name": "f", "parameters": {"type": "banana"}, "strict": true}], "tool_choice": "required"}),
            "tools[1].parameters",
        ),
        (json!({"tools": [{"type": "mcp"}], "tool_choice": "required"}), "tool_choice"),
        (json!({"tool_choice": {"type": "web_search_preview"}}), "tool_choice"),
        (json!({"top_logprobs": 1000}), "top_logprobs"),
        (json!({"max_output_tokens": 0}), "max_output_tokens"),
        (json!({"temperature": -1}), "temperature"),
        (json!({"truncation": "middle"}), "truncation"),
        (json!({"service_tier": "gold"}), "service_tier"),
        (json!({"background": true, "store": false}), "background"),
        (json!({"conversation": "conv_1"}), "conversation"),
        (json!({"prompt": {"id": "p"}}), "prompt"),
        (json!({"messages": []}), "messages"),
        (json!({"max_tokens": 4}), "max_tokens"),
        (json!({"response_format": {"type": "json_object"}}), "response_format"),
        (json!({"chat_template": "x"}), "chat_template"),
        (json!({"chat_template_kwargs": {"chat_template": "x"}}), "chat_template_kwargs"),
        (json!({"chat_template_kwargs": {"tokenize": false}}), "chat_template_kwargs"),
        (json!({"instructions": 1}), "instructions"),
        (json!({"input": "x ".repeat(common::CONTEXT)}), "input"),
    ];
    for (extra, param) in cases {
        let answer = server.respond(&request(extra.clone())).await;
        assert_eq!(answer.status, 400, "{extra}: {}", answer.text);
        assert_eq!(answer.error()["param"], param, "{extra}: {}", answer.text);
    }
    let unknown = server.respond(&request(json!({"model": "none"}))).await;
    assert_eq!(unknown.status, 404);
    let compact = server.post("/v1/responses/compact", &request(json!({}))).await;
    assert_eq!((compact.status.as_u16(), compact.error()["code"].clone()), (400, json!("unsupported_path")));
}
