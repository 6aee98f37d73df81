//! Streamed answers: their shape, and that they say what whole answers say.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use common::{Joined, Server, Setup, join, merged, request, whole};
use proptest::prelude::*;
use serde_json::{Value, json};

const THINK: &str = "<|channel|>analysis<|message|>Let me think.<|end|><|start|>assistant";

fn scripts() -> Vec<String> {
    let call = |name: &str, arguments: &str| {
        format!("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>")
    };
    vec![
        "<|channel|>final<|message|>Hello, world!<|return|>".to_owned(),
        format!("{THINK}<|channel|>final<|message|>Grüße 日本語 🦀<|return|>"),
        format!("{THINK}{}", call("get_weather", r#"{"city":"Zürich","days":[1,2]}"#)),
        format!(
            "{THINK}<|channel|>commentary<|message|>I will look.<|end|><|start|>assistant{}",
            call("f", "{}")
        ),
        format!("{THINK}{}", call("f", "not json ]")),
        "<|channel|>final<|message|>".to_owned(),
        "<|channel|>analysis<|message|>cut off in tho".to_owned(),
        "<|channel|>commentary to=functions.f<|message|>{\"a\":".to_owned(),
        "no header at all<|return|>".to_owned(),
        "<|channel|>final<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>"
            .to_owned(),
        "<|channel|><|channel|>final<|constrain|>json<|message|>{\"x\": 1}<|return|>".to_owned(),
        "<|return|>".to_owned(),
    ]
}

/// Ids of calls differ from answer to answer.
fn without_ids(joined: Joined) -> Joined {
    assert!(joined.call_ids.iter().all(|id| id.starts_with("call_") && id.len() > 20));
    Joined { call_ids: Vec::new(), ..joined }
}

/// Asks twice, whole and streamed, with a server that says the same each time.
async fn both(server: &Server, body: Value) -> (Joined, Joined, Value, Vec<Value>) {
    let answer = server.chat(&body).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let one = answer.json();
    let streamed = merged(body, json!({"stream": true, "stream_options": {"include_usage": true}}));
    let frames = server.chat(&streamed).await.frames();
    (without_ids(whole(&one["choices"][0])), without_ids(join(&frames, 0)), one, frames)
}

/// OAI-01, OAI-02, OAI-03, OAI-04.
#[tokio::test]
async fn streamed_equals_whole_over_scripts_and_options() {
    let options = [
        json!({}),
        json!({"logprobs": true, "top_logprobs": 1, "return_token_ids": true}),
        json!({"stop": ["o, w", "zz"]}),
        json!({"stop": "b", "include_stop_str_in_output": true}),
        json!({"max_tokens": 7}),
        json!({"tool_choice": "none"}),
        json!({"parallel_tool_calls": false}),
        json!({"include_reasoning": false}),
    ];
    let mut calls = 0;
    for script in scripts() {
        let server = Setup::new(&[&script]).start();
        for extra in &options {
            let (whole, streamed, one, frames) = both(&server, request(extra.clone())).await;
            assert_eq!(whole, streamed, "{script} {extra}");
            assert_eq!(one["usage"], frames.last().unwrap()["usage"], "{script} {extra}");
            calls += whole.calls.len();
        }
    }
    assert!(calls >= 20, "the scripts call: {calls}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// HAR-01, HAR-03, OAI-02, OAI-03: whatever the model says.
    #[test]
    fn streamed_equals_whole_over_random_ids(
        ids in prop::collection::vec(prop_oneof![3 => 0u32..260, 2 => any::<prop::sample::Index>().prop_map(|i| {
            let tokenizer = common::tokenizer();
            let specials: Vec<u32> = tokenizer.special_tokens().map(|(_, id)| id).collect();
            *i.get(&specials)
        })], 0..40),
        stop in prop::option::of("[a-e]{1,2}"),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let server = Setup::ids(vec![ids.clone()]).start();
            let extra = json!({"stop": stop, "logprobs": true, "return_token_ids": true});
            let (whole, streamed, ..) = both(&server, request(extra)).await;
            assert_eq!(whole, streamed, "{ids:?}");
            assert!(!format!("{:?}{:?}", whole.content, whole.reasoning).contains("<|"), "markup is shown");
        });
    }
}

/// OAI-04.
#[tokio::test]
async fn frames_have_the_shape_that_clients_expect() {
    let script = format!("{THINK}<|channel|>final<|message|>Hi<|return|>");
    let server = Setup::new(&[&script]).start();
    let answer = server.chat(&request(json!({"stream": true}))).await;
    assert!(answer.text.ends_with("data: [DONE]\n\n"));
    let frames = answer.frames();
    for frame in &frames {
        assert_eq!(frame["object"], "chat.completion.chunk");
        assert_eq!(frame["model"], "scripted");
        assert_eq!(frame["id"], frames[0]["id"]);
        assert!(frame["id"].as_str().unwrap().starts_with("chatcmpl-"));
        assert!(frame.get("usage").is_none(), "usage was not asked for");
        assert_eq!(frame["choices"].as_array().unwrap().len(), 1);
    }
    let joined = join(&frames, 0);
    assert_eq!(joined.content.as_deref(), Some("Hi"));
    assert_eq!(joined.reasoning.as_deref(), Some("Let me think."));
    assert_eq!(joined.finish_reason.as_deref(), Some("stop"));
    let last = frames.last().unwrap();
    assert_eq!(last["choices"][0]["delta"], json!({}));
}

/// OAI-05.
#[tokio::test]
async fn usage_comes_last_and_null_before() {
    let server = Setup::new(&["<|channel|>final<|message|>Hi<|return|>"]).start();
    for path in ["/v1/chat/completions", "/v1/completions"] {
        let body =
            request(json!({"prompt": "hi", "stream": true, "stream_options": {"include_usage": true}}));
        let mut frames = server.post(path, &body).await.frames();
        let last = frames.pop().unwrap();
        assert_eq!(last["choices"], json!([]));
        assert!(last["usage"]["total_tokens"].as_u64().unwrap() > 0);
        assert!(!frames.is_empty());
        assert!(frames.iter().all(|frame| frame["usage"].is_null() && frame.get("usage").is_some()));
        // `stream_options` without the wish is no wish.
        let body = request(json!({"prompt": "hi", "stream": true, "stream_options": {}}));
        assert!(server.post(path, &body).await.frames().iter().all(|frame| frame.get("usage").is_none()));
        let every = json!({"include_usage": true, "continuous_usage_stats": true});
        let body = request(json!({"prompt": "hi", "stream": true, "stream_options": every}));
        let frames = server.post(path, &body).await.frames();
        let counts: Vec<u64> =
            frames.iter().map(|f| f["usage"]["completion_tokens"].as_u64().unwrap()).collect();
        assert!(counts.is_sorted() && counts.first() < counts.last(), "{counts:?}");
    }
}

/// OAI-01.
#[tokio::test]
async fn calls_stream_name_first_and_then_arguments() {
    let arguments = r#"{"city": "Zürich", "note": "a \"b\" {c"}"#;
    let script = format!("<|channel|>commentary to=functions.get_weather<|message|>{arguments}<|call|>");
    let server = Setup::new(&[&script]).start();
    let tools = json!([{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]);
    let frames = server.chat(&request(json!({"stream": true, "tools": tools}))).await.frames();
    let joined = join(&frames, 0);
    assert_eq!(joined.calls, [("get_weather".to_owned(), arguments.to_owned())]);
    assert_eq!(joined.finish_reason.as_deref(), Some("tool_calls"));
    assert_eq!(joined.content, None);
}

#[tokio::test]
async fn ids_are_returned_when_asked_for() {
    let script = format!("{THINK}<|channel|>final<|message|>Hi<|return|>");
    let server = Setup::new(&[&script]).start();
    let generated = json!(server.tokenizer.encode_with_control(&script));
    let messages = json!({"messages": [{"role": "user", "content": "hi"}]});
    let prompt = server.post("/tokenize", &messages).await.json()["tokens"].clone();

    let one = server.chat(&request(json!({"return_token_ids": true}))).await.json();
    assert_eq!(one["prompt_token_ids"], prompt);
    assert_eq!(one["choices"][0]["token_ids"], generated);
    let plain = server.chat(&request(json!({}))).await.json();
    assert!(plain.get("prompt_token_ids").is_none() && plain["choices"][0].get("token_ids").is_none());

    let frames = server.chat(&request(json!({"return_token_ids": true, "stream": true}))).await.frames();
    assert_eq!(frames[0]["prompt_token_ids"], prompt);
    assert!(frames[1..].iter().all(|frame| frame.get("prompt_token_ids").is_none()));
    assert_eq!(json!(join(&frames, 0).token_ids), generated);

    let body = json!({"prompt": prompt, "return_token_ids": true, "max_tokens": 100});
    let text = server.complete(&body).await.json();
    assert_eq!(text["choices"][0]["prompt_token_ids"], prompt);
    assert_eq!(text["choices"][0]["token_ids"], generated);
    let frames = server.complete(&merged(body, json!({"stream": true}))).await.frames();
    assert_eq!(frames[0]["choices"][0]["prompt_token_ids"], prompt);
    let ids: Vec<Value> = frames
        .iter()
        .flat_map(|frame| frame["choices"][0]["token_ids"].as_array().unwrap().clone())
        .collect();
    assert_eq!(json!(ids), generated);
}

/// OAI-14.
#[tokio::test]
async fn choices_do_not_mix() {
    let scripts = scripts();
    let lines: Vec<&str> = scripts[..4].iter().map(String::as_str).collect();
    let server = Setup::new(&lines).start();
    let one = server.chat(&request(json!({"n": 4}))).await.json();
    let frames = server.chat(&request(json!({"n": 4, "stream": true}))).await.frames();
    for (index, line) in lines.iter().enumerate() {
        let alone = Setup::new(&[line]).start().chat(&request(json!({}))).await.json();
        let expected = without_ids(whole(&alone["choices"][0]));
        assert_eq!(without_ids(whole(&one["choices"][index])), expected);
        assert_eq!(without_ids(join(&frames, index)), expected);
    }
}
