//! `/v1/responses`: what is stored, what goes on from it, what runs in the background, and what fails.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use std::time::Duration;

use axum::body::Body;
use axum::http::{Method, Request};
use common::responses::{joined, text};
use common::{Answer, Server, Setup, eventually, merged};
use serde_json::{Value, json};

const THINK: &str = "<|channel|>analysis<|message|>Let me think.<|end|><|start|>assistant";

fn call(arguments: &str) -> String {
    format!("{THINK}<|channel|>commentary to=functions.f <|constrain|>json<|message|>{arguments}<|call|>")
}

fn says(text: &str) -> String {
    format!("<|channel|>final<|message|>{text}<|return|>")
}

fn tools() -> Value {
    json!([{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}])
}

async fn created(server: &Server, body: Value) -> Value {
    let answer = server.respond(&body).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.json()
}

async fn send(server: &Server, method: Method, path: &str) -> Answer {
    server.send(Request::builder().method(method).uri(path).body(Body::empty()).unwrap()).await
}

fn path(response: &Value, rest: &str) -> String {
    format!("/v1/responses/{}{rest}", response["id"].as_str().unwrap())
}

/// RSP-07: going on from a response is the prompt of sending all of it again: calls, outputs and reasoning, not the instructions.
#[tokio::test]
async fn going_on_equals_sending_everything_again() {
    let script = call(r#"{"a":1}"#);
    let server = Setup::new(&[&script, &says("done"), &says("more")]).start();
    let first = created(
        &server,
        json!({"input": "hi", "instructions": "Only now, and this is long.", "tools": tools()}),
    )
    .await;
    let call_id = first["output"][1]["call_id"].clone();
    let result = json!({"type": "function_call_output", "call_id": call_id, "output": "r"});
    let on = json!({"previous_response_id": first["id"], "input": [result], "tools": tools()});
    let second = created(&server, on).await;
    let mut input = vec![json!({"role": "user", "content": "hi"})];
    input.extend(first["output"].as_array().unwrap().clone());
    input.push(result.clone());
    let again = created(&server, json!({"input": input, "tools": tools(), "store": false})).await;
    assert_eq!(second["usage"]["input_tokens"], again["usage"]["input_tokens"]);
    // The call's id brings back the reasoning that was left out; without either it would be another prompt.
    let known = json!({"input": [input[0], input[2], result], "tools": tools(), "store": false});
    assert_eq!(created(&server, known).await["usage"]["input_tokens"], again["usage"]["input_tokens"]);
    let (mut made, mut its) = (input[2].clone(), result.clone());
    made["call_id"] = json!("another");
    its["call_id"] = json!("another");
    let bare = json!({"input": [input[0], made, its], "tools": tools(), "store": false});
    assert_ne!(created(&server, bare).await["usage"]["input_tokens"], again["usage"]["input_tokens"]);
    let third = json!({"previous_response_id": second["id"], "input": "and?", "tools": tools()});
    assert!(
        created(&server, third).await["usage"]["input_tokens"].as_u64()
            > second["usage"]["input_tokens"].as_u64()
    );
    // References stand for the items themselves, also when they come from elsewhere.
    let references: Vec<Value> = first["output"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| json!({"type": "item_reference", "id": item["id"]}))
        .collect();
    let mut referring = vec![json!({"role": "user", "content": "hi"})];
    referring.extend(references);
    referring.push(result);
    let referred = created(&server, json!({"input": referring, "tools": tools()})).await;
    assert_eq!(referred["usage"]["input_tokens"], again["usage"]["input_tokens"]);
}

/// RSP-08
#[tokio::test]
async fn what_is_not_there_is_a_404() {
    let server = Setup::new(&[&says("x")]).start();
    let one = created(&server, json!({"input": "hi", "store": false})).await;
    for id in [one["id"].as_str().unwrap(), "resp_none", ""] {
        let answer = server.respond(&json!({"input": "hi", "previous_response_id": id})).await;
        assert_eq!(answer.status, 404);
        assert_eq!(answer.error()["param"], "previous_response_id");
        assert_eq!(answer.error()["code"], "previous_response_not_found");
    }
    let reference = json!({"input": [{"type": "item_reference", "id": "msg_none"}]});
    let answer = server.respond(&reference).await;
    assert_eq!((answer.status.as_u16(), answer.error()["param"].clone()), (404, json!("input[0].id")));
    for (method, rest) in [
        (Method::GET, ""),
        (Method::DELETE, ""),
        (Method::POST, "/cancel"),
        (Method::GET, "/input_items"),
        (Method::GET, "?stream=true"),
    ] {
        let answer = send(&server, method, &path(&one, rest)).await;
        assert_eq!(
            (answer.status.as_u16(), answer.error()["code"].clone()),
            (404, json!("response_not_found"))
        );
    }
}

#[tokio::test]
async fn stored_responses_are_given_back_as_they_were() {
    let server = Setup::new(&[&says("one")]).start();
    for stream in [false, true] {
        let answer = server.respond(&json!({"input": "hi", "stream": stream, "metadata": {"k": "v"}})).await;
        let response = if stream { joined(&answer) } else { answer.json() };
        assert_eq!(server.get(&path(&response, "")).await.json(), response);
        assert_eq!(server.get(&path(&response, "?stream=true")).await.error()["param"], "stream");
        let cancel = send(&server, Method::POST, &path(&response, "/cancel")).await;
        assert_eq!(cancel.status, 400);
        let deleted = send(&server, Method::DELETE, &path(&response, "")).await;
        assert_eq!(deleted.json(), json!({"id": response["id"], "object": "response", "deleted": true}));
        assert_eq!(server.get(&path(&response, "")).await.status, 404);
    }
}

#[tokio::test]
async fn input_items_are_listed_by_the_page() {
    let server = Setup::new(&[&says("one")]).start();
    let input = json!([
        {"role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "input_text", "text": "u"}], "id": "msg_mine"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "o"},
        {"role": "assistant", "content": "a"},
    ]);
    let response = created(&server, json!({"input": input})).await;
    let (server, response) = (&server, &response);
    let list = |query: &'static str| async move {
        let answer = server.get(&path(response, &format!("/input_items{query}"))).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json()
    };
    let all = list("?order=asc").await;
    let data = all["data"].as_array().unwrap().clone();
    let kinds: Vec<&str> = data.iter().map(|item| item["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["message", "message", "function_call", "function_call_output", "message"]);
    assert!(data.iter().all(|item| !item["id"].as_str().unwrap().is_empty()));
    assert_eq!(data[0]["content"], json!([{"type": "input_text", "text": "d"}]));
    assert_eq!(data[1]["id"], "msg_mine");
    assert_eq!(data[4]["content"][0]["type"], "output_text");
    assert_eq!((&all["first_id"], &all["last_id"]), (&data[0]["id"], &data[4]["id"]));
    assert_eq!((&all["object"], &all["has_more"]), (&json!("list"), &json!(false)));
    let newest = list("?limit=2").await;
    assert_eq!(newest["data"], json!([data[4], data[3]]));
    assert_eq!(newest["has_more"], true);
    let after = list("?order=asc&after=msg_mine&limit=1").await;
    assert_eq!((&after["data"], &after["has_more"]), (&json!([data[2]]), &json!(true)));
    for (query, param) in [
        ("?limit=0", "limit"),
        ("?limit=101", "limit"),
        ("?limit=x", "limit"),
        ("?order=up", "order"),
        ("?after=x", "after"),
    ] {
        let answer = server.get(&path(response, &format!("/input_items{query}"))).await;
        assert_eq!((answer.status.as_u16(), answer.error()["param"].clone()), (400, json!(param)), "{query}");
    }
}

/// RSP-06: through the API: the oldest goes when a new one comes.
#[tokio::test]
async fn the_store_is_bounded() {
    let mut setup = Setup::new(&[&says("one")]);
    setup.server.limits.max_stored_responses = 2;
    let server = setup.start();
    let mut made = Vec::new();
    for _ in 0..3 {
        made.push(created(&server, json!({"input": "hi"})).await);
    }
    assert_eq!(server.get(&path(&made[0], "")).await.status, 404);
    for response in &made[1..] {
        assert_eq!(server.get(&path(response, "")).await.status, 200);
    }
    let mut setup = Setup::new(&[&says("one")]);
    setup.server.limits.max_stored_responses = 0;
    let server = setup.start();
    let one = created(&server, json!({"input": "hi"})).await;
    assert_eq!(one["store"], false);
    assert_eq!(server.get(&path(&one, "")).await.status, 404);
    let answer = server.respond(&json!({"input": "hi", "background": true})).await;
    assert_eq!(answer.error()["param"], "background");
}

async fn ended(server: &Server, response: &Value) -> Value {
    loop {
        let now = server.get(&path(response, "")).await.json();
        if now["completed_at"].is_number()
            || !matches!(now["status"].as_str(), Some("queued" | "in_progress"))
        {
            return now;
        }
        assert!(now["usage"].is_null());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

#[tokio::test]
async fn a_background_response_needs_no_listener() {
    let mut setup = Setup::new(&[&says("one two three")]);
    setup.pace = Duration::from_millis(2);
    let server = setup.start();
    let queued = created(&server, json!({"input": "hi", "background": true})).await;
    assert_eq!((&queued["status"], &queued["output"]), (&json!("queued"), &json!([])));
    let early = server.respond(&json!({"input": "hi", "previous_response_id": queued["id"]})).await;
    assert_eq!((early.status.as_u16(), early.error()["param"].clone()), (400, json!("previous_response_id")));
    let done = ended(&server, &queued).await;
    assert_eq!((done["status"].clone(), text(&done)), (json!("completed"), "one two three".to_owned()));
    assert_eq!(done["id"], queued["id"]);
    let on = created(&server, json!({"input": "hi", "previous_response_id": queued["id"]})).await;
    assert!(on["usage"]["input_tokens"].as_u64() > done["usage"]["input_tokens"].as_u64());
    // Nobody asked for its events.
    assert_eq!(server.get(&path(&done, "?stream=true")).await.error()["param"], "stream");
}

#[tokio::test]
async fn a_background_stream_can_be_followed_again_from_anywhere() {
    let server = Setup::new(&[&format!("{THINK}{}", says("one two three"))]).start();
    let answer = server.respond(&json!({"input": "hi", "background": true, "stream": true})).await;
    let response = joined(&answer);
    assert_eq!(response["status"], "completed");
    assert_eq!(answer.frames()[1]["type"], "response.queued");
    let again = server.get(&path(&response, "?stream=true")).await;
    assert_eq!(again.frames(), answer.frames());
    for after in [0, 4, answer.frames().len() - 1, 1_000_000] {
        let rest = server.get(&path(&response, &format!("?stream=true&starting_after={after}"))).await;
        assert_eq!(rest.frames(), answer.frames().get(after + 1..).unwrap_or_default());
    }
    let wrong = server.get(&path(&response, "?stream=true&starting_after=-1")).await;
    assert_eq!(wrong.error()["param"], "starting_after");
}

#[tokio::test]
async fn a_background_response_can_be_cancelled_and_deleted() {
    let mut setup = Setup::new(&[&says(&"word ".repeat(1000))]);
    setup.pace = Duration::from_millis(5);
    let server = setup.start();
    for delete in [false, true] {
        let running = created(&server, json!({"input": "hi", "background": true})).await;
        if delete {
            assert_eq!(send(&server, Method::DELETE, &path(&running, "")).await.status, 200);
            assert_eq!(server.get(&path(&running, "")).await.status, 404);
        } else {
            let cancelled = send(&server, Method::POST, &path(&running, "/cancel")).await.json();
            assert_eq!(cancelled["status"], "cancelled");
            assert_eq!(cancelled["completed_at"], Value::Null);
            let again = send(&server, Method::POST, &path(&running, "/cancel")).await;
            assert_eq!(again.json(), cancelled);
            assert_eq!(server.get(&path(&running, "")).await.json(), cancelled);
        }
        let engine = server.engine.clone();
        eventually(|| engine.snapshot().running == 0).await;
    }
}

#[tokio::test]
async fn a_response_belongs_to_its_key() {
    let mut setup = Setup::new(&[&says("one")]);
    setup.server.api_keys = ctxserve_server::ApiKeys::new(["a".to_owned(), "b".to_owned()]);
    let server = setup.start();
    let with = |key: &str, method: Method, path: &str, body: Value| {
        let request =
            Request::builder().method(method).uri(path).header("authorization", format!("Bearer {key}"));
        let request = request.header("content-type", "application/json");
        server.send(request.body(Body::from(body.to_string())).unwrap())
    };
    let made = with("a", Method::POST, "/v1/responses", json!({"input": "hi"})).await.json();
    let item = json!({"input": [{"type": "item_reference", "id": made["output"][0]["id"]}]});
    let on = json!({"input": "x", "previous_response_id": made["id"]});
    for (method, rest) in
        [(Method::GET, ""), (Method::GET, "/input_items"), (Method::POST, "/cancel"), (Method::DELETE, "")]
    {
        assert_eq!(with("b", method, &path(&made, rest), json!({})).await.status, 404);
    }
    for body in [&item, &on] {
        assert_eq!(with("b", Method::POST, "/v1/responses", body.clone()).await.status, 404);
        assert_eq!(with("a", Method::POST, "/v1/responses", body.clone()).await.status, 200);
    }
    assert_eq!(with("a", Method::GET, &path(&made, ""), json!({})).await.json(), made);
}

#[tokio::test]
async fn truncation_leaves_out_the_oldest() {
    let server = Setup::new(&[&says("ok")]).start();
    let mut input = Vec::new();
    for n in 0..40 {
        input.push(json!({"role": "user", "content": format!("Question {n}: {}", "word ".repeat(20))}));
        input.push(json!({"role": "assistant", "content": "Answer."}));
    }
    input.push(json!({"role": "user", "content": "The last."}));
    let body =
        |extra| merged(json!({"input": input, "instructions": "Always.", "max_output_tokens": 64}), extra);
    let refused = server.respond(&body(json!({}))).await;
    assert_eq!(
        (refused.status.as_u16(), refused.error()["code"].clone()),
        (400, json!("context_length_exceeded"))
    );
    let answer = created(&server, body(json!({"truncation": "auto"}))).await;
    let used = answer["usage"]["input_tokens"].as_u64().unwrap();
    let context = common::CONTEXT as u64;
    assert!(used <= context - 64 && used > context / 2, "{used}");
    // One message that is too long on its own stays an error.
    let long = json!({"input": "x ".repeat(common::CONTEXT), "truncation": "auto"});
    assert_eq!(server.respond(&long).await.error()["code"], "context_length_exceeded");
}

#[tokio::test]
async fn a_prompt_is_counted_as_it_would_be_used() {
    let server = Setup::new(&[&call("{}"), &says("done")]).start();
    let body = json!({"input": "hi", "instructions": "Be brief.", "tools": tools(), "reasoning": {"effort": "high"}});
    let first = created(&server, body.clone()).await;
    let count = server.post("/v1/responses/input_tokens", &body).await.json();
    let used = first["usage"]["input_tokens"].clone();
    assert_eq!(count, json!({"object": "response.input_tokens", "input_tokens": used}));
    let result =
        json!({"type": "function_call_output", "call_id": first["output"][1]["call_id"], "output": "r"});
    let on = json!({"input": [result], "previous_response_id": first["id"], "tools": tools()});
    let count = server.post("/v1/responses/input_tokens", &on).await.json();
    assert_eq!(count["input_tokens"], created(&server, on).await["usage"]["input_tokens"]);
    // Also one that is too long to be answered.
    let long = json!({"input": "x ".repeat(common::CONTEXT)});
    let count = server.post("/v1/responses/input_tokens", &long).await.json();
    assert!(count["input_tokens"].as_u64().unwrap() > common::CONTEXT as u64);
    let wrong = server.post("/v1/responses/input_tokens", &json!({"input": 1})).await;
    assert_eq!((wrong.status.as_u16(), wrong.error()["param"].clone()), (400, json!("input")));
}

#[tokio::test]
async fn a_failed_stream_says_so_and_ends() {
    let mut setup = Setup::new(&[&says(&"word ".repeat(1000))]);
    setup.pace = Duration::from_millis(5);
    let server = setup.start();
    let (engine, aborting) = (server.engine.clone(), server.engine.clone());
    let abort = tokio::spawn(async move {
        eventually(|| engine.snapshot().running > 0).await;
        aborting.abort_all();
    });
    let answer = server.respond(&json!({"input": "hi", "stream": true})).await;
    abort.await.unwrap();
    let events = answer.frames();
    let error = &events[events.len() - 2];
    assert_eq!(error["type"], "error");
    for field in ["code", "message", "param", "sequence_number"] {
        assert!(error.get(field).is_some(), "{field}");
    }
    let response = joined(&answer);
    assert_eq!((&response["status"], &response["error"]["code"]), (&json!("failed"), &json!("server_error")));
    assert_eq!(server.get(&path(&response, "")).await.json(), response);
}
