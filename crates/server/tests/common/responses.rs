//! Responses put together from their events, with what holds for every stream checked on the way.

use serde_json::{Value, json};

use super::{Answer, Server};

impl Server {
    pub(crate) async fn respond(&self, body: &Value) -> Answer {
        self.post("/v1/responses", body).await
    }
}

/// The final object of a stream, checked to be what its events say: RSP-02, RSP-03 and RSP-04.
pub(crate) fn joined(answer: &Answer) -> Value {
    let events = answer.frames();
    let names: Vec<&str> = answer.text.lines().filter_map(|line| line.strip_prefix("event: ")).collect();
    let kinds: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(names, kinds, "each event has its type for a name");
    let numbers: Vec<u64> = events.iter().map(|event| event["sequence_number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..events.len() as u64).collect::<Vec<_>>(), "numbers have no gaps");
    assert_eq!(kinds[0], "response.created");
    assert!(kinds[1..3].contains(&"response.in_progress"));
    let mut items: Vec<Value> = Vec::new();
    let mut done: Vec<bool> = Vec::new();
    let mut part = None;
    for event in &events {
        let kind = event["type"].as_str().unwrap();
        let at = event["output_index"].as_u64().map(|at| usize::try_from(at).unwrap());
        if kind == "response.output_item.added" {
            assert_eq!(at, Some(items.len()));
            assert!(done.iter().all(|done| *done), "one item grows at a time");
            assert_eq!(event["item"]["status"], "in_progress");
            items.push(event["item"].clone());
            done.push(false);
            continue;
        }
        let Some(at) = at else { continue };
        assert!(!done[at], "{kind} after its item was done");
        let item = &mut items[at];
        if let Some(id) = event.get("item_id") {
            assert_eq!(*id, item["id"]);
        }
        match kind {
            "response.content_part.added" => {
                assert!(part.is_none());
                assert_eq!(event["content_index"], item["content"].as_array().unwrap().len());
                part = Some(event["part"].clone());
            }
            "response.output_text.delta" | "response.reasoning_text.delta" => {
                let part = part.as_mut().unwrap();
                let text = format!("{}{}", part["text"].as_str().unwrap(), event["delta"].as_str().unwrap());
                part["text"] = text.into();
                if let Some(list) = event["logprobs"].as_array() {
                    part["logprobs"].as_array_mut().unwrap().extend(list.iter().cloned());
                }
            }
            "response.output_text.done" => {
                let part = part.as_ref().unwrap();
                assert_eq!((&part["text"], &part["logprobs"]), (&event["text"], &event["logprobs"]));
            }
            "response.reasoning_text.done" => assert_eq!(part.as_ref().unwrap()["text"], event["text"]),
            "response.content_part.done" => {
                let part = part.take().unwrap();
                assert_eq!(part, event["part"]);
                item["content"].as_array_mut().unwrap().push(part);
            }
            "response.function_call_arguments.delta" => {
                let text =
                    format!("{}{}", item["arguments"].as_str().unwrap(), event["delta"].as_str().unwrap());
                item["arguments"] = text.into();
            }
            "response.function_call_arguments.done" => {
                assert_eq!((&item["arguments"], &item["name"]), (&event["arguments"], &event["name"]));
            }
            "response.output_item.done" => {
                assert!(part.is_none());
                done[at] = true;
                for field in ["status", "phase", "encrypted_content"] {
                    if let Some(value) = event["item"].get(field) {
                        item[field] = value.clone();
                    }
                }
                assert_eq!(*item, event["item"]);
            }
            other => panic!("an unknown event: {other}"),
        }
    }
    assert!(done.iter().all(|done| *done), "every item is done");
    let last = events.last().unwrap();
    let response = last["response"].clone();
    let expected = match response["status"].as_str().unwrap() {
        "completed" => "response.completed",
        "failed" => "response.failed",
        _ => "response.incomplete",
    };
    assert_eq!(last["type"], expected);
    assert_eq!(response["output"], Value::Array(items));
    for event in &events {
        if let Some(other) = event.get("response") {
            assert_eq!((&other["id"], &other["created_at"]), (&response["id"], &response["created_at"]));
        }
    }
    response
}

/// The output without what differs from answer to answer.
pub(crate) fn without_ids(response: &Value) -> Value {
    let mut output = response["output"].clone();
    for item in output.as_array_mut().unwrap() {
        for field in ["id", "call_id"] {
            if item.get(field).is_some() {
                assert!(item[field].as_str().unwrap().len() > 20);
                item[field] = json!("");
            }
        }
    }
    output
}

/// The text for the user.
pub(crate) fn text(response: &Value) -> String {
    let items = response["output"].as_array().unwrap().iter().filter(|item| item["type"] == "message");
    items
        .flat_map(|item| item["content"].as_array().unwrap())
        .map(|part| part["text"].as_str().unwrap())
        .collect()
}
