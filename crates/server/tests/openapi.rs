//! The document of the API: every route, every field, and nothing that is not so.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use axum::body::Body;
use axum::http::Request;
use common::{CONTEXT, Server, Setup};
use serde_json::{Value, json};

async fn document(server: &Server) -> Value {
    let answer = server.get("/openapi.json").await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    answer.json()
}

/// Every `$ref` below a value.
fn references(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            found.extend(map.get("$ref").and_then(Value::as_str).map(str::to_owned));
            map.values().for_each(|value| references(value, found));
        }
        Value::Array(list) => list.iter().for_each(|value| references(value, found)),
        _ => {}
    }
}

#[tokio::test]
async fn every_method_of_every_path_is_told() {
    let server = Setup::new(&["<|return|>"]).start();
    let document = document(&server).await;
    assert_eq!(document["openapi"], "3.1.0");
    let paths = document["paths"].as_object().unwrap();
    assert!(paths.len() >= 12);
    for (path, operations) in paths {
        for method in ["GET", "POST", "PUT", "PATCH", "DELETE"] {
            let request = Request::builder().method(method).uri(path.replace("{name}", "scripted"));
            let answer = server.send(request.body(Body::empty()).unwrap()).await;
            let told = operations.get(method.to_lowercase());
            assert_eq!(answer.status == 405, told.is_none(), "{method} {path}: {}", answer.status);
            if let Some(operation) = told {
                let status = answer.status.as_str();
                assert!(operation["responses"].get(status).is_some(), "{method} {path}: {status}");
            }
        }
    }
}

#[tokio::test]
async fn every_reference_leads_somewhere_and_nothing_is_left_over() {
    let server = Setup::new(&["<|return|>"]).start();
    let document = document(&server).await;
    let mut found = Vec::new();
    references(&document, &mut found);
    for reference in &found {
        let pointer = reference.strip_prefix('#').unwrap();
        assert!(document.pointer(pointer).is_some(), "{reference}");
    }
    for name in document["components"]["schemas"].as_object().unwrap().keys() {
        let reference = format!("#/components/schemas/{name}");
        assert!(found.contains(&reference), "{name} is used nowhere");
    }
}

/// What an operator sets stands in the document.
#[tokio::test]
async fn limits_are_those_of_the_operator() {
    let mut setup = Setup::new(&["<|return|>"]);
    let limits = &mut setup.server.limits;
    (limits.max_n, limits.max_stop_strings, limits.max_stop_bytes) = (3, 5, 77);
    (limits.max_stop_token_ids, limits.max_logit_bias) = (11, 13);
    (limits.max_logprobs, limits.max_prompts) = (2, 17);
    let document = document(&setup.start()).await;
    let schemas = &document["components"]["schemas"];
    for (place, limit) in [
        ("/ChatRequest/properties/n/maximum", 3),
        ("/ChatRequest/properties/stop/anyOf/0/maxLength", 77),
        ("/ChatRequest/properties/stop/anyOf/1/items/maxLength", 77),
        ("/ChatRequest/properties/stop/anyOf/1/maxItems", 5),
        ("/ChatRequest/properties/stop_token_ids/maxItems", 11),
        ("/ChatRequest/properties/logit_bias/maxProperties", 13),
        ("/ChatRequest/properties/top_logprobs/maximum", 2),
        ("/CompletionRequest/properties/n/maximum", 3),
        ("/CompletionRequest/properties/best_of/maximum", 3),
        ("/CompletionRequest/properties/stop/anyOf/1/maxItems", 5),
        ("/CompletionRequest/properties/logprobs/maximum", 2),
        ("/ResponseRequest/properties/top_logprobs/maximum", 2),
        ("/CompletionRequest/properties/prompt/anyOf/1/maxItems", 17),
        ("/CompletionRequest/properties/prompt/anyOf/3/maxItems", 17),
    ] {
        assert_eq!(schemas.pointer(place), Some(&json!(limit)), "{place}");
    }
}

#[tokio::test]
async fn bounds_are_those_of_the_server() {
    let mut setup = Setup::new(&["<|return|>"]);
    setup.server.api_keys = ctxserve_server::ApiKeys::new(["k"]);
    let server = setup.start();
    let request = Request::get("/openapi.json").header("authorization", "Bearer k").body(Body::empty());
    let document = server.send(request.unwrap()).await.json();
    let schemas = &document["components"]["schemas"];
    assert_eq!(schemas["ModelName"]["enum"], json!(["scripted", "org/other"]));
    assert_eq!(schemas["TokenId"]["maximum"], server.tokenizer.len() - 1);
    assert_eq!(schemas["TokenIds"]["maxItems"], CONTEXT);
    assert_eq!(document["security"], json!([{"key": []}]));
    let chat = &schemas["ChatRequest"];
    assert_eq!(chat["required"], json!(["messages"]));
    let fields = &chat["properties"];
    assert_eq!(fields["n"]["maximum"], 128);
    assert_eq!(fields["max_tokens"]["maximum"], u64::MAX);
    assert_eq!(fields["audio"], json!({"type": "null"}));
    assert_eq!(fields["priority"], json!({"enum": [0.0, null]}));
    let text = &schemas["CompletionRequest"]["properties"];
    assert_eq!(text["suffix"], json!({"enum": ["", null]}));
    assert!(text.get("audio").is_none());
}
