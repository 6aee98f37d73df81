//! The prefix cache as clients and operators see it.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use common::{Server, Setup, request};
use ctxserve_engine::EngineConfig;
use serde_json::{Value, json};

const FINAL: &str = "<|channel|>final<|message|>hello<|return|>";

fn start() -> Server {
    let mut setup = Setup::new(&[FINAL]);
    setup.engine = EngineConfig::default();
    setup.start()
}

fn cached(usage: &Value) -> u64 {
    usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

/// The value of the one series whose name and labels begin so.
fn value(metrics: &str, series: &str) -> f64 {
    let line = metrics.lines().find(|line| line.starts_with(series)).unwrap_or_else(|| panic!("{metrics}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

fn miss(metrics: &str, cause: &str) -> f64 {
    let line = metrics.lines().find(|line| {
        line.starts_with("ctxserve:prefix_cache_misses_total{")
            && line.contains(&format!("cause=\"{cause}\""))
    });
    line.unwrap_or_else(|| panic!("{metrics}")).rsplit(' ').next().unwrap().parse().unwrap()
}

/// OPS-10, OPS-12, OPS-22: what a prompt found is in its usage and in the metrics, and every miss has a cause there.
#[tokio::test]
async fn a_repeated_prompt_is_found() {
    let server = start();
    let first = server.chat(&request(json!({}))).await.json()["usage"].clone();
    let second = server.chat(&request(json!({}))).await.json()["usage"].clone();
    let prompt = first["prompt_tokens"].as_u64().unwrap();
    let whole = (prompt - 1) / 16 * 16;
    assert!(whole > 0, "the prompt is too short for this test");
    assert_eq!((cached(&first), cached(&second)), (0, whole));
    // Choices share one prompt: it is counted once, as it is in `prompt_tokens`.
    let three = server.chat(&request(json!({"n": 3}))).await.json()["usage"].clone();
    assert_eq!((three["prompt_tokens"].as_u64(), cached(&three)), (Some(prompt), whole));

    let metrics = server.metrics().await;
    assert_eq!(value(&metrics, "vllm:prefix_cache_queries_total{"), 5.0 * prompt as f64);
    assert_eq!(value(&metrics, "vllm:prefix_cache_hits_total{"), 4.0 * whole as f64);
    assert_eq!(value(&metrics, "vllm:gpu_prefix_cache_hits_total{"), 4.0 * whole as f64);
    assert_eq!((miss(&metrics, "new"), miss(&metrics, "reset")), (whole as f64, 0.0));
    assert_eq!(miss(&metrics, "tail"), 5.0 * (prompt - whole) as f64);
    assert!(value(&metrics, "ctxserve:prefix_cache_usage_perc{") > 0.0);
    assert_eq!(value(&metrics, "vllm:kv_cache_usage_perc{"), 0.0);
}

/// OPS-12: after a reset nothing is found, and the metrics say why.
#[tokio::test]
async fn a_reset_forgets_everything() {
    let server = start();
    server.chat(&request(json!({}))).await;
    let answer = server.post("/reset_prefix_cache", &json!({})).await;
    assert_eq!(answer.status, 200);
    assert_eq!(value(&server.metrics().await, "ctxserve:prefix_cache_usage_perc{"), 0.0);
    let usage = server.chat(&request(json!({}))).await.json()["usage"].clone();
    assert_eq!(cached(&usage), 0);
    assert!(miss(&server.metrics().await, "reset") > 0.0);
    assert_eq!(server.get("/reset_prefix_cache").await.status, 405);
}

/// Requests share a prefix with their own salt alone, on every route that takes one, and the metrics say why not.
#[tokio::test]
async fn salts_keep_prefixes_apart() {
    let server = start();
    let ask = async |body: Value| cached(&server.chat(&request(body)).await.json()["usage"]);
    assert_eq!(ask(json!({})).await, 0);
    assert_eq!(ask(json!({"cache_salt": "a"})).await, 0);
    assert_eq!(ask(json!({"cache_salt": "b"})).await, 0);
    assert!(miss(&server.metrics().await, "salt") > 0.0);
    let whole = ask(json!({"cache_salt": "a"})).await;
    assert!(whole > 0 && ask(json!({})).await == whole);
    let text = "x ".repeat(100);
    for (salt, found) in [("a", false), ("b", false), ("a", true)] {
        let body = json!({"model": "scripted", "prompt": text, "cache_salt": salt});
        let usage = server.post("/v1/completions", &body).await.json()["usage"].clone();
        assert_eq!(cached(&usage) > 0, found, "{salt}");
    }
}

#[tokio::test]
async fn it_can_be_turned_off() {
    let server = Setup::new(&[FINAL]).start();
    for _ in 0..2 {
        assert_eq!(cached(&server.chat(&request(json!({}))).await.json()["usage"]), 0);
    }
    let metrics = server.metrics().await;
    assert_eq!(value(&metrics, "vllm:prefix_cache_queries_total{"), 0.0);
    assert!(miss(&metrics, "disabled") > 0.0);
}
