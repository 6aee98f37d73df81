//! Requests to `/v1/messages`, and its answers put together as clients do.

use serde_json::{Value, json};

use super::{Answer, Server, merged};

pub(crate) const PATH: &str = "/v1/messages";
pub(crate) const THINK: &str = "<|channel|>analysis<|message|>Let me think.<|end|><|start|>assistant";
pub(crate) const FINAL: &str = "<|channel|>final<|message|>Hello, world!<|return|>";

pub(crate) fn call(name: &str, arguments: &str) -> String {
    format!("<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>")
}

pub(crate) fn request(extra: Value) -> Value {
    let base =
        json!({"model": "scripted", "max_tokens": 512, "messages": [{"role": "user", "content": "hi"}]});
    merged(base, extra)
}

pub(crate) fn tools(names: &[&str]) -> Value {
    let tool = |name| json!({"name": name, "description": "d", "input_schema": {"type": "object"}});
    names.iter().map(tool).collect()
}

/// The error of Anthropic's envelope.
pub(crate) fn error(answer: &Answer) -> (u16, String, String) {
    let value = answer.json();
    assert_eq!(value["type"], "error", "{}", answer.text);
    assert_eq!(value["request_id"], answer.headers["request-id"].to_str().unwrap());
    let keys: Vec<&String> = value["error"].as_object().unwrap().keys().collect();
    assert_eq!(keys, ["type", "message"]);
    let text = |key: &str| value["error"][key].as_str().unwrap().to_owned();
    (answer.status.as_u16(), text("type"), text("message"))
}

/// Name and data of every event, pings left out.
pub(crate) fn events(answer: &Answer) -> Vec<Value> {
    assert_eq!(answer.headers["content-type"], "text/event-stream", "{}", answer.text);
    let mut found = Vec::new();
    for frame in answer.text.split("\n\n").filter(|frame| !frame.is_empty()) {
        let (name, data) = frame.split_once('\n').unwrap();
        let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(data["type"], name.strip_prefix("event: ").unwrap(), "{frame}");
        if data["type"] != "ping" {
            found.push(data);
        }
    }
    found
}

/// Puts a stream together as the SDK does, checking the order of its events.
pub(crate) fn join(events: &[Value]) -> Value {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let mut message = events[0]["message"].clone();
    assert_eq!(events[0]["type"], "message_start");
    assert_eq!(message["content"], json!([]));
    let (mut open, mut json_text) = (None, String::new());
    let mut blocks: Vec<Value> = Vec::new();
    let end = events.len() - 2;
    for event in &events[1..end] {
        let index = usize::try_from(event["index"].as_u64().unwrap()).unwrap();
        match text(&event["type"]).as_str() {
            "content_block_start" => {
                assert_eq!((open, index), (None, blocks.len()), "blocks follow one another");
                open = Some(index);
                json_text.clear();
                blocks.push(event["content_block"].clone());
            }
            "content_block_delta" => {
                assert_eq!(open, Some(index));
                let (delta, block) = (&event["delta"], &mut blocks[index]);
                let (kind, key) = match text(&delta["type"]).as_str() {
                    "text_delta" => ("text", "text"),
                    "thinking_delta" => ("thinking", "thinking"),
                    "signature_delta" => ("thinking", "signature"),
                    "input_json_delta" => {
                        json_text.push_str(delta["partial_json"].as_str().unwrap());
                        continue;
                    }
                    other => panic!("{other}"),
                };
                assert_eq!(block["type"], kind);
                let grown = text(&block[key]) + &text(&delta[key]);
                block[key] = grown.into();
            }
            "content_block_stop" => {
                assert_eq!(open.take(), Some(index));
                if blocks[index]["type"] == "tool_use" {
                    assert_eq!(blocks[index]["input"], json!({}));
                    blocks[index]["input"] = serde_json::from_str(&json_text).unwrap();
                }
            }
            other => panic!("{other}"),
        }
    }
    assert_eq!(open, None);
    assert_eq!(events[end]["type"], "message_delta");
    assert_eq!(events[end + 1], json!({"type": "message_stop"}));
    message["content"] = blocks.into();
    for (key, value) in events[end]["delta"].as_object().unwrap() {
        message[key] = value.clone();
    }
    message["usage"] = events[end]["usage"].clone();
    message
}

/// Without what differs from answer to answer.
pub(crate) fn settled(mut message: Value) -> Value {
    assert!(message["id"].as_str().unwrap().starts_with("msg_"));
    message["id"] = Value::Null;
    for block in message["content"].as_array_mut().unwrap() {
        if block["type"] == "tool_use" {
            assert!(block["id"].as_str().unwrap().len() > 20);
            block["id"] = Value::Null;
        }
    }
    message
}

/// Asks twice, whole and streamed, of a server that says the same each time; they must agree.
pub(crate) async fn both(server: &Server, body: Value) -> Value {
    let answer = server.post(PATH, &body).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    let streamed = server.post(PATH, &merged(body.clone(), json!({"stream": true}))).await;
    let whole = settled(answer.json());
    assert_eq!(whole, settled(join(&events(&streamed))), "{body}");
    whole
}
