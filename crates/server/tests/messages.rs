//! `/v1/messages`: answers whole and streamed.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use common::messages::{FINAL, PATH, THINK, both, call, events, request, tools};
use common::{Server, Setup, whole};
use proptest::prelude::*;
use serde_json::{Value, json};

#[tokio::test]
async fn an_answer_has_its_blocks_in_order_and_its_counts() {
    let script = format!(
        "{THINK}<|channel|>commentary<|message|>I will look.<|end|><|start|>assistant{}",
        call("search", r#"{"query":"é", "n": 1.0}"#)
    );
    let server = Setup::new(&[&script]).start();
    let body = request(json!({"tools": tools(&["search"])}));
    let raw = server.post(PATH, &body).await;
    assert!(raw.text.contains(r#""input":{"query":"é", "n": 1.0}"#), "arguments are the model's bytes");
    let message = both(&server, body.clone()).await;
    let signature = message["content"][0]["signature"].clone();
    assert!(!signature.as_str().unwrap().is_empty());
    let count = server.post(&format!("{PATH}/count_tokens"), &body).await.json();
    assert_eq!(
        message["content"],
        json!([
            {"type": "thinking", "thinking": "Let me think.", "signature": signature},
            {"type": "text", "text": "I will look.", "citations": null},
            {"type": "tool_use", "id": null, "name": "search", "input": {"query": "é", "n": 1.0}},
        ])
    );
    assert_eq!(message["stop_reason"], "tool_use");
    assert_eq!(message["stop_sequence"], Value::Null);
    assert_eq!((&message["type"], &message["role"]), (&json!("message"), &json!("assistant")));
    assert_eq!(message["model"], "scripted");
    let usage = &message["usage"];
    assert_eq!(count, json!({"input_tokens": usage["input_tokens"]}), "the count is the prompt's");
    assert_eq!(usage["cache_read_input_tokens"], 0);
    assert_eq!(usage["output_tokens"], server.tokenizer.encode_with_control(&script).len());
    assert!(usage["output_tokens_details"]["thinking_tokens"].as_u64().unwrap() > 0);
}

#[tokio::test]
async fn each_way_to_end_has_its_reason() {
    let begun = common::tokenizer().encode_with_control("<|channel|>final<|message|>Hello,").len();
    let cases = [
        (FINAL.to_owned(), json!({}), "end_turn", Value::Null, "Hello, world!"),
        (FINAL.to_owned(), json!({"stop_sequences": ["zz", "o, w"]}), "stop_sequence", json!("o, w"), "Hell"),
        (FINAL.to_owned(), json!({"max_tokens": begun}), "max_tokens", Value::Null, "Hello,"),
        (call("f", "{}"), json!({}), "tool_use", Value::Null, ""),
        // A stop sequence is looked for in the text alone.
        (
            format!("{THINK}{FINAL}"),
            json!({"stop_sequences": ["think"]}),
            "end_turn",
            Value::Null,
            "Hello, world!",
        ),
        (call("f", r#"{"think":1}"#), json!({"stop_sequences": ["think"]}), "tool_use", Value::Null, ""),
    ];
    for (script, extra, reason, sequence, text) in cases {
        let server = Setup::new(&[&script]).start();
        let message = both(&server, request(extra)).await;
        assert_eq!((message["stop_reason"].as_str(), &message["stop_sequence"]), (Some(reason), &sequence));
        let content = message["content"].as_array().unwrap();
        let said = content.iter().find(|block| block["type"] == "text").map(|block| block["text"].clone());
        assert_eq!(said.unwrap_or_default().as_str().unwrap_or_default(), text, "{script}");
    }
}

/// What the blocks of a message say, put together by kind: thinking, text, and name and `input` of calls.
fn by_kind(message: &Value) -> (String, String, Vec<(String, Value)>) {
    let (mut thinking, mut text, mut calls) = (String::new(), String::new(), Vec::new());
    for block in message["content"].as_array().unwrap() {
        match block["type"].as_str().unwrap() {
            "thinking" => thinking.push_str(block["thinking"].as_str().unwrap()),
            "text" => text.push_str(block["text"].as_str().unwrap()),
            _ => calls.push((block["name"].as_str().unwrap().to_owned(), block["input"].clone())),
        }
    }
    (thinking, text, calls)
}

/// The arguments of a call as `input` has them.
fn as_input(arguments: &str) -> Value {
    match serde_json::from_str(arguments) {
        _ if arguments.trim_ascii().is_empty() => json!({}),
        Ok(object @ Value::Object(_)) => object,
        _ => json!({"INVALID_JSON": arguments}),
    }
}

/// A message, whole and streamed, says what the chat route says of the same tokens.
async fn says_what_chat_says(server: &Server, extra: Value) {
    let message = both(server, request(extra.clone())).await;
    let (thinking, text, calls) = by_kind(&message);
    assert!(!format!("{thinking}{text}").contains("<|"), "markup is shown: {message}");
    let body = json!({"messages": [{"role": "user", "content": "hi"}], "stop": extra["stop_sequences"], "max_tokens": 512});
    let chat = server.chat(&body).await.json();
    let chat = whole(&chat["choices"][0]);
    assert_eq!(thinking, chat.reasoning.unwrap_or_default());
    assert_eq!(text, chat.content.unwrap_or_default());
    let expected: Vec<_> = chat.calls.into_iter().map(|(name, text)| (name, as_input(&text))).collect();
    assert_eq!(calls, expected);
    let reason = match chat.stop_reason.as_str() {
        Some(_) => "stop_sequence",
        None => match chat.finish_reason.unwrap().as_str() {
            "tool_calls" => "tool_use",
            "length" => "max_tokens",
            _ => "end_turn",
        },
    };
    assert_eq!(message["stop_reason"], reason);
    assert_eq!(message["stop_sequence"], chat.stop_reason);
}

fn ids(setup: &Setup) -> impl Strategy<Value = Vec<u32>> + use<> {
    let specials: Vec<u32> = setup.tokenizer.special_tokens().map(|(_, id)| id).collect();
    let special = any::<prop::sample::Index>().prop_map(move |index| *index.get(&specials));
    prop::collection::vec(prop_oneof![3 => 0u32..260, 2 => special], 0..40)
}

fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// HAR-01, HAR-02 and OAI-02, for this API: whatever the tokens are, streamed and whole answers are one, and nothing is lost.
    #[test]
    fn any_tokens_are_one_message_streamed_and_whole(
        ids in ids(&Setup::ids(Vec::new())),
        stop in prop::option::of("[a-e]{1,2}"),
    ) {
        let server = Setup::ids(vec![ids]).start();
        run(says_what_chat_says(&server, json!({"stop_sequences": stop.map(|stop| vec![stop])})));
    }

    /// The same of calls that are cut and broken anywhere.
    #[test]
    fn any_arguments_are_an_object_and_not_lost(arguments in r#"[ \{\}\[\]",:a1\\n]{0,12}|\{"a":[0-9]{1,30}\}"#, ends: bool) {
        let mut script = format!("{THINK}{}", call("f", &arguments));
        if !ends {
            script.truncate(script.len() - "<|call|>".len());
        }
        let server = Setup::new(&[&script]).start();
        run(says_what_chat_says(&server, json!({})));
    }

    #[test]
    fn any_tokens_in_the_hermes_format_are_one_message(ids in ids(&Setup::hermes(&[]))) {
        let setup = Setup { lines: vec![ids], ..Setup::hermes(&[]) };
        let server = setup.start();
        run(async {
            let message = both(&server, request(json!({"tools": tools(&["f"])}))).await;
            let (thinking, text, _) = by_kind(&message);
            assert!(!format!("{thinking}{text}").contains("<|"), "{message}");
        });
    }
}

#[tokio::test]
async fn blocks_keep_the_order_in_which_they_were_written() {
    let script = format!(
        "{THINK}<|channel|>commentary<|message|>First.<|end|><|start|>assistant{THINK}{}<|start|>assistant{}",
        call("a", r#"{"n":1}"#).replace("<|call|>", "<|end|>"),
        call("b", "")
    );
    let server = Setup::new(&[&script]).start();
    let message = both(&server, request(json!({}))).await;
    let kinds: Vec<&Value> =
        message["content"].as_array().unwrap().iter().map(|block| &block["type"]).collect();
    assert_eq!(json!(kinds), json!(["thinking", "text", "thinking", "tool_use", "tool_use"]));
    assert_eq!(message["content"][4]["input"], json!({}));
    let one = json!({"tool_choice": {"type": "auto", "disable_parallel_tool_use": true}, "tools": tools(&["a", "b"])});
    let message = both(&server, request(one)).await;
    assert_eq!(by_kind(&message).2, [("a".to_owned(), json!({"n": 1}))]);
    assert_eq!(message["stop_reason"], "tool_use");
    let none = json!({"tool_choice": {"type": "none"}});
    let (_, text, calls) = by_kind(&both(&server, request(none)).await);
    assert!(calls.is_empty() && text.contains(r#"{"n":1}"#), "{text}");
}

#[tokio::test]
async fn an_eager_tools_arguments_are_passed_on_as_they_come() {
    let broken = r#"{"a": "x y z", query"#;
    let server = Setup::new(&[&call("f", broken)]).start();
    for eager in [true, false] {
        let mut offered = tools(&["f"]);
        offered[0]["eager_input_streaming"] = json!(eager);
        let body = request(json!({"tools": offered, "stream": true}));
        let answer = server.post(PATH, &body).await;
        let parts = events(&answer);
        let parts: Vec<&str> = parts.iter().filter_map(|e| e["delta"]["partial_json"].as_str()).collect();
        if eager {
            assert_eq!(parts.concat(), broken);
        } else {
            assert_eq!(parts.len(), 1, "held back until it is known to be an object");
            assert_eq!(serde_json::from_str::<Value>(parts[0]).unwrap(), json!({"INVALID_JSON": broken}));
        }
    }
}
