//! `/v1/messages`: answers whole and streamed.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use common::Setup;
use common::messages::{FINAL, PATH, THINK, both, call, request, tools};
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
