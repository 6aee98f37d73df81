//! Everything around generation: errors of HTTP, keys, limits, probes, metrics, tokenize.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use common::{CONTEXT, Setup, eventually, request};
use ctxserve_engine::EngineConfig;
use ctxserve_server::ApiKeys;
use serde_json::{Value, json};

const FINAL: &str = "<|channel|>final<|message|>ok<|return|>";

/// OAI-07.
#[tokio::test]
async fn every_refusal_is_in_the_envelope() {
    let server = Setup::new(&[FINAL]).start();
    let post = |path: &str, kind: &str, body: Vec<u8>| {
        Request::post(path).header("content-type", kind).body(Body::from(body)).unwrap()
    };
    let chat = "/v1/chat/completions";
    let deep = format!("{{\"messages\":{}{}}}", "[".repeat(1_000_000), "]".repeat(1_000_000));
    let rows = [
        (Request::get("/nowhere").body(Body::empty()).unwrap(), 404, "unknown_url"),
        (Request::get(chat).body(Body::empty()).unwrap(), 405, "method_not_allowed"),
        (
            Request::builder().method("BREW").uri("/health").body(Body::empty()).unwrap(),
            405,
            "method_not_allowed",
        ),
        (Request::get("/v1/models/none").body(Body::empty()).unwrap(), 404, "model_not_found"),
        (post(chat, "application/json", b"{".to_vec()), 400, "invalid_json"),
        (post(chat, "application/json", b"".to_vec()), 400, "invalid_json"),
        (post(chat, "application/json", b"[]".to_vec()), 400, "invalid_json"),
        (post(chat, "application/json", b"null".to_vec()), 400, "invalid_json"),
        (post(chat, "application/json", b"{\"messages\":\"\xff\"}".to_vec()), 400, "invalid_json"),
        (post(chat, "application/json", b"{\"a\":1} {}".to_vec()), 400, "invalid_json"),
        (post(chat, "application/json", deep.into_bytes()), 400, "invalid_json"),
        (post(chat, "text/plain", b"{}".to_vec()), 415, "unsupported_media_type"),
        (post(chat, "application/json", vec![b' '; (32 << 20) + 1]), 413, "request_too_large"),
        (post("/tokenize", "application/json", b"{}".to_vec()), 400, "invalid_value"),
        (post("/detokenize", "application/json", b"{}".to_vec()), 400, "invalid_value"),
    ];
    for (request, status, code) in rows {
        let shown = format!("{} {}", request.method(), request.uri());
        let answer = server.send(request).await;
        assert_eq!(answer.status.as_u16(), status, "{shown}: {}", answer.text);
        assert_eq!(answer.error()["code"], code, "{shown}");
    }
}

#[tokio::test]
async fn keys_guard_everything_but_the_probes() {
    let mut setup = Setup::new(&[FINAL]);
    setup.server.api_keys = ApiKeys::new(["first", "second"]);
    let server = setup.start();
    let ask = |path: &str, header: Option<&str>| {
        let mut request = Request::get(path);
        if let Some(value) = header {
            request = request.header("authorization", value);
        }
        request.body(Body::empty()).unwrap()
    };
    for path in ["/v1/models", "/metrics", "/version", "/nowhere", "/tokenize"] {
        for header in
            [None, Some("Bearer wrong"), Some("Bearer "), Some("Basic first"), Some("first"), Some("")]
        {
            let answer = server.send(ask(path, header)).await;
            assert_eq!(answer.status, 401, "{path} {header:?}");
            assert_eq!(answer.error()["code"], "invalid_api_key");
            assert_eq!(answer.headers["www-authenticate"], "Bearer");
        }
    }
    for header in ["Bearer first", "Bearer second", "bearer first"] {
        assert_eq!(server.send(ask("/v1/models", Some(header))).await.status, 200);
    }
    assert_eq!(server.get("/health").await.status, 200);
}

#[tokio::test]
async fn request_ids_are_echoed_clean_and_made_when_absent() {
    let server = Setup::new(&[FINAL]).start();
    let ask = |id: &str| Request::get("/version").header("x-request-id", id).body(Body::empty()).unwrap();
    assert_eq!(server.send(ask("abc-1")).await.headers["x-request-id"], "abc-1");
    assert_eq!(server.send(ask("a b;<c>")).await.headers["x-request-id"], "abc");
    let made = server.get("/version").await.headers["x-request-id"].clone();
    assert_ne!(made, server.get("/version").await.headers["x-request-id"]);
    assert!(!server.get("/version").await.headers.contains_key("access-control-allow-origin"));
}

#[tokio::test]
async fn models_version_and_probes() {
    let server = Setup::new(&[FINAL]).start();
    let models = server.get("/v1/models").await.json();
    assert_eq!(models["object"], "list");
    let names: Vec<_> = models["data"].as_array().unwrap().iter().map(|m| m["id"].clone()).collect();
    assert_eq!(json!(names), json!(["scripted", "org/other"]));
    assert_eq!(models["data"][0]["max_model_len"], CONTEXT);
    assert_eq!(server.get("/v1/models/org/other").await.json()["id"], "org/other");
    assert!(server.get("/version").await.json()["version"].is_string());
    assert_eq!(server.get("/ping").await.status, 200);
    assert_eq!(server.get("/load").await.json()["server_load"], 0);
}

#[tokio::test]
async fn tokenize_and_detokenize_are_inverse_and_bounded() {
    let server = Setup::new(&[FINAL]).start();
    let text = "héllo <|end|> 日本";
    let body = json!({"prompt": text, "return_token_strs": true, "add_special_tokens": true});
    let answer = server.post("/tokenize", &body).await.json();
    assert_eq!(
        answer["tokens"],
        json!(server.tokenizer.encode(text)),
        "text that spells a control token is text"
    );
    assert_eq!(answer["count"], answer["tokens"].as_array().unwrap().len());
    assert_eq!(answer["count"], answer["token_strs"].as_array().unwrap().len());
    assert_eq!(answer["max_model_len"], CONTEXT);
    let back = server.post("/detokenize", &json!({"tokens": answer["tokens"]})).await.json();
    assert_eq!(back["prompt"], text);
    let plain = server.post("/tokenize", &json!({"prompt": text})).await.json();
    assert_eq!(plain["token_strs"], Value::Null);

    let control = server.tokenizer.encode_with_control("<|start|>user");
    let shown = server.post("/detokenize", &json!({"tokens": control})).await.json();
    assert_eq!(shown["prompt"], "<|start|>user");
    for tokens in [json!([u32::MAX]), json!([-1]), json!(vec![1; CONTEXT + 1]), json!("x")] {
        let answer = server.post("/detokenize", &json!({"tokens": tokens})).await;
        assert_eq!(answer.status, 400);
        assert_eq!(answer.error()["param"], "tokens");
    }
    let unknown = server.post("/tokenize", &json!({"prompt": "a", "model": "nope"})).await;
    assert_eq!(unknown.status, 404);
}

#[tokio::test]
async fn tokenized_messages_are_the_prompt() {
    let server = Setup::new(&[FINAL]).start();
    let messages = json!([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]);
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let body = json!({"messages": messages, "tools": tools, "reasoning_effort": "low"});
    let tokens = server.post("/tokenize", &body).await.json();
    let mut ask = body.clone();
    ask["return_token_ids"] = json!(true);
    let chat = server.chat(&ask).await.json();
    assert_eq!(chat["prompt_token_ids"], tokens["tokens"]);
    assert_eq!(chat["usage"]["prompt_tokens"], tokens["count"]);
    // Without the opening of the assistant's turn the prompt is a proper prefix.
    let mut closed = body;
    closed["add_generation_prompt"] = json!(false);
    let closed = server.post("/tokenize", &closed).await.json()["tokens"].clone();
    let opening = server.tokenizer.encode_with_control("<|start|>assistant");
    let mut joined = closed.as_array().unwrap().clone();
    joined.extend(opening.into_iter().map(Value::from));
    assert_eq!(json!(joined), tokens["tokens"]);
}

/// An answer that takes a while: one token a step, each step slow.
fn slow(engine: EngineConfig) -> Setup {
    let mut setup = Setup::new(&[&format!("<|channel|>final<|message|>{}", "x y ".repeat(400))]);
    setup.pace = Duration::from_millis(3);
    setup.engine = engine;
    setup
}

/// OPS-16.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_is_429_with_retry_after() {
    let engine = EngineConfig { max_num_seqs: 1, max_queued_requests: 1, ..EngineConfig::default() };
    let server = slow(engine).start();
    let app = server.app.clone();
    let ask = || {
        let body = request(json!({})).to_string();
        Request::post("/v1/chat/completions")
            .header("content-type", "application/json")
            .body(Body::from(body))
            .unwrap()
    };
    let busy: Vec<_> = (0..2).map(|_| tokio::spawn(tower::ServiceExt::oneshot(app.clone(), ask()))).collect();
    eventually(|| {
        let snapshot = server.engine.snapshot();
        snapshot.running + snapshot.waiting == 2
    })
    .await;
    let answer = server.send(ask()).await;
    assert_eq!(answer.status, 429);
    assert_eq!(answer.error()["code"], "rate_limit_exceeded");
    assert!(answer.headers["retry-after"].to_str().unwrap().parse::<u64>().unwrap() >= 1);
    let metrics = server.metrics().await;
    assert!(metrics.contains("reason=\"max_num_queued_reqs\"} 1"), "{metrics}");
    // More than could ever fit is the request's own fault.
    let never = server.chat(&request(json!({"n": 3}))).await;
    assert_eq!((never.status.as_u16(), never.error()["param"].as_str()), (400, Some("n")));
    // Dropping the handlers, as a disconnect does, frees their places.
    for task in &busy {
        task.abort();
    }
    eventually(|| {
        let snapshot = server.engine.snapshot();
        snapshot.running + snapshot.waiting == 0 && snapshot.used_pages.iter().all(|&pages| pages == 0)
    })
    .await;
    assert_eq!(server.engine.snapshot().aborted, 2);
    assert!(server.metrics().await.contains("finished_reason=\"abort\"} 2"));
}

/// OAI-04: an error frame ends it.
#[tokio::test(flavor = "multi_thread")]
async fn an_aborted_stream_ends_with_an_error_frame() {
    let server = slow(EngineConfig::default()).start();
    let engine = server.engine.clone();
    let aborting = async {
        eventually(|| engine.snapshot().generation_tokens > 3).await;
        engine.abort_all();
    };
    let streamed = request(json!({"stream": true}));
    let (answer, ()) = tokio::join!(server.chat(&streamed), aborting);
    let frames = answer.frames();
    let error = &frames.last().unwrap()["error"];
    assert_eq!(error["code"], "service_unavailable", "{}", answer.text);
    assert!(frames.iter().all(|frame| frame["choices"][0]["finish_reason"].is_null()));
}

/// OPS-21.
#[tokio::test]
async fn a_draining_server_says_so() {
    let server = Setup::new(&[FINAL]).start();
    server.engine.drain();
    assert_eq!(server.get("/health").await.status, 503);
    assert_eq!(server.get("/health").await.error()["code"], "service_unavailable");
    assert_eq!(server.chat(&request(json!({}))).await.status, 503);
    assert_eq!(server.get("/metrics").await.status, 200);
}

/// OAI-15: comments until something can be seen.
#[tokio::test(flavor = "multi_thread")]
async fn a_quiet_stream_sends_comments() {
    let mut setup = slow(EngineConfig::default());
    setup.pace = Duration::from_millis(30);
    setup.server.keep_alive = Duration::from_millis(2);
    let server = setup.start();
    let answer = server.chat(&request(json!({"stream": true, "max_tokens": 4}))).await;
    let comment = answer.text.find(": keep-alive\n\n").expect("a comment");
    assert!(comment < answer.text.find("data: ").unwrap(), "comments precede the first token");
    answer.frames();
}

/// OPS-22.
#[tokio::test]
async fn metrics_have_vllm_names_and_no_labels_from_clients() {
    let server = Setup::new(&["<|channel|>final x<|channel|>final<|message|>ok<|return|>"]).start();
    let series = |text: &str| text.lines().filter(|line| !line.starts_with('#')).count();
    assert_eq!(server.chat(&request(json!({}))).await.status, 200);
    let text = server.metrics().await;
    for name in [
        "vllm:num_requests_running{",
        "vllm:num_requests_waiting{",
        "vllm:kv_cache_usage_perc{",
        "vllm:prompt_tokens_total{",
        "vllm:generation_tokens_total{",
        "vllm:num_preemptions_total{",
        "vllm:request_success_total{",
        "vllm:time_to_first_token_seconds_bucket{",
        "vllm:inter_token_latency_seconds_bucket{",
        "vllm:e2e_request_latency_seconds_bucket{",
        "vllm:request_queue_time_seconds_bucket{",
        "vllm:cache_config_info{",
        "ctxserve:http_responses_total{",
        "ctxserve:parser_recoveries_total{",
    ] {
        assert!(text.contains(name), "{name} is missing:\n{text}");
    }
    assert!(text.contains("model_name=\"scripted\""));
    let before = series(&server.metrics().await);
    for i in 0..200 {
        let method = format!("M{i}");
        let odd =
            Request::builder().method(method.as_str()).uri(format!("/p{i}")).body(Body::empty()).unwrap();
        server.send(odd).await;
        server.chat(&request(json!({"model": format!("m{i}"), "user": format!("u{i}")}))).await;
    }
    assert_eq!(series(&server.metrics().await), before);
}
