//! `/v1/messages`: what becomes of requests, prompts and errors.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use common::messages::{FINAL, PATH, THINK, call, error, events, request, tools};
use common::{Server, Setup, eventually, merged};
use ctxserve_backend::{Batch, DeviceError, KvPlan, SampleError, Sampled};
use ctxserve_core::{TokenId, limits};
use ctxserve_engine::{EngineConfig, Runner, RunnerInfo, ScriptedRunner};
use ctxserve_server::ServerConfig;
use serde_json::{Value, json};

const COUNT: &str = "/v1/messages/count_tokens";

fn post(path: &str, headers: &[(&str, &str)], body: &Value) -> Request<Body> {
    let mut request = Request::post(path).header("content-type", "application/json");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(Body::from(body.to_string())).unwrap()
}

/// A model that keeps what it reads.
struct Reader {
    script: ScriptedRunner,
    read: Arc<Mutex<Vec<TokenId>>>,
}

impl Runner for Reader {
    fn info(&self) -> &RunnerInfo {
        self.script.info()
    }

    fn allocate(&mut self, plan: &KvPlan) -> Result<(), DeviceError> {
        self.script.allocate(plan)
    }

    fn launch(&mut self, batch: &Batch) -> Result<(), DeviceError> {
        self.read.lock().unwrap().extend(&batch.tokens);
        self.script.launch(batch)
    }

    fn collect(&mut self) -> Result<Vec<Result<Sampled, SampleError>>, DeviceError> {
        self.script.collect()
    }
}

/// A server, and what its model has read.
struct Reading {
    server: Server,
    read: Arc<Mutex<Vec<TokenId>>>,
}

impl Reading {
    fn start(setup: Setup) -> Self {
        let read = Arc::default();
        let script = ScriptedRunner::new(setup.tokenizer.len(), setup.context, setup.lines.clone());
        let server = setup.start_with(Box::new(Reader { script, read: Arc::clone(&read) }));
        Self { server, read }
    }

    /// The prompt that the model is given, control tokens shown. Its length is what the answer and the count say.
    async fn prompt(&self, body: &Value) -> String {
        self.prompt_of(&merged(body.clone(), json!({"max_tokens": 1})).to_string()).await
    }

    /// Of a body that asks for one token, as it is written.
    async fn prompt_of(&self, body: &str) -> String {
        self.read.lock().unwrap().clear();
        let answer = self.server.raw(PATH, body.to_owned()).await;
        assert_eq!(answer.status, 200, "{}", answer.text);
        let usage = &answer.json()["usage"];
        let count = self.server.raw(COUNT, body.to_owned()).await.json();
        assert_eq!(count, json!({"input_tokens": usage["input_tokens"]}), "{body}");
        let read = self.read.lock().unwrap();
        assert_eq!(json!(read.len()), usage["input_tokens"], "nothing but the prompt is read for one token");
        self.server.tokenizer.decode(&read, false)
    }
}

fn said(messages: Value) -> Value {
    request(json!({"messages": messages}))
}

#[tokio::test]
async fn every_block_of_a_conversation_reaches_the_prompt() {
    let reading = Reading::start(Setup::new(&[FINAL]));
    let body = request(json!({
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=abc;"},
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": " Be kind."},
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Look "}, {"type": "text", "text": "here."}]},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "Where?", "signature": "anything"},
                {"type": "redacted_thinking", "data": "EqQB"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "search", "input": {"query":"a","n":1.5}},
                {"type": "tool_use", "id": "toolu_2", "name": "read", "input": {}},
            ]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": "found",
                 "cache_control": {"type": "ephemeral"}},
                {"type": "tool_result", "tool_use_id": "toolu_2", "is_error": true, "content": [
                    {"type": "text", "text": "no "}, {"type": "text", "text": "file"}]},
                {"type": "text", "text": "Go on."},
            ]},
        ],
        "tools": tools(&["search", "read"]),
        "max_tokens": 1,
    }));
    let prompt = reading.prompt_of(&body.to_string().replace("\"n\":1.5", "\"n\": 1.50")).await;
    let instructions = prompt.split_once("# Instructions").unwrap().1;
    assert!(instructions.trim_start().starts_with("Be brief. Be kind.\n"), "{prompt}");
    assert!(!prompt.contains("cch="), "{prompt}");
    assert!(prompt.contains("type search = ") && prompt.contains("type read = "), "{prompt}");
    let said = &prompt[prompt.find("<|start|>user").unwrap()..];
    let expected = concat!(
        "<|start|>user<|message|>Look here.<|end|>",
        "<|start|>assistant<|channel|>analysis<|message|>Where?<|end|>",
        "<|start|>assistant<|channel|>commentary<|message|>I look.<|end|>",
        "<|start|>assistant to=functions.search<|channel|>commentary <|constrain|>json<|message|>",
        "{\"query\":\"a\",\"n\": 1.50}<|call|>",
        "<|start|>assistant to=functions.read<|channel|>commentary <|constrain|>json<|message|>{}<|call|>",
        "<|start|>functions.search to=assistant<|channel|>commentary<|message|>found<|end|>",
        "<|start|>functions.read to=assistant<|channel|>commentary<|message|>Error: no file<|end|>",
        "<|start|>user<|message|>Go on.<|end|>",
        "<|start|>assistant"
    );
    assert_eq!(said, expected);
}

/// The blocks of an answer are taken back, whatever the model wrote into them.
#[tokio::test]
async fn blocks_of_an_answer_come_back_as_the_model_wrote_them() {
    let broken = format!("{THINK}{}", call("f", "query: a"));
    for (display, script) in [("summarized", &broken), ("omitted", &broken)] {
        let reading = Reading::start(Setup::new(&[script]));
        let thinking = json!({"type": "adaptive", "display": display});
        let answer = reading.server.post(PATH, &request(json!({"thinking": thinking}))).await.json();
        let shown = answer["content"][0]["thinking"].as_str().unwrap();
        assert_eq!(shown, if display == "omitted" { "" } else { "Let me think." });
        let call = &answer["content"][1];
        assert_eq!(call["input"], json!({"INVALID_JSON": "query: a"}));
        let result = json!([{"type": "tool_result", "tool_use_id": call["id"]}]);
        let body = said(json!([
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": answer["content"]},
            {"role": "user", "content": result},
        ]));
        let prompt = reading.prompt(&body).await;
        assert!(prompt.contains("<|channel|>analysis<|message|>Let me think.<|end|>"), "{prompt}");
        assert!(prompt.contains("<|constrain|>json<|message|>query: a<|call|>"), "{prompt}");
        assert!(prompt.ends_with("<|channel|>commentary<|message|><|end|><|start|>assistant"), "{prompt}");
    }
}

#[tokio::test]
async fn thinking_is_mapped_to_effort() {
    let reading = Reading::start(Setup::new(&[&format!("{THINK}{FINAL}")]));
    let budget = |tokens: u64| json!({"thinking": {"type": "enabled", "budget_tokens": tokens}});
    let effort = |effort: &str| json!({"output_config": {"effort": effort}});
    let cases = [
        (json!({}), "medium"),
        (json!({"thinking": {"type": "adaptive"}}), "medium"),
        (json!({"thinking": {"type": "disabled"}}), "low"),
        (budget(1024), "low"),
        (budget(4096), "low"),
        (budget(4097), "medium"),
        (budget(16_384), "medium"),
        (budget(16_385), "high"),
        (budget(u64::MAX), "high"),
        (effort("low"), "low"),
        (effort("max"), "high"),
        (merged(budget(1024), effort("high")), "high"),
        (merged(json!({"thinking": {"type": "adaptive"}}), effort("low")), "low"),
    ];
    for (extra, level) in cases {
        let prompt = reading.prompt(&request(extra.clone())).await;
        assert!(prompt.contains(&format!("Reasoning: {level}")), "{extra}: {prompt}");
    }
    let disabled = request(json!({"thinking": {"type": "disabled"}}));
    let content = reading.server.post(PATH, &disabled).await.json()["content"].clone();
    assert_eq!(content, json!([{"type": "text", "text": "Hello, world!", "citations": null}]));
}

#[tokio::test]
async fn tools_that_are_not_ours_are_skipped() {
    let reading = Reading::start(Setup::new(&[FINAL]));
    let mut offered = tools(&["search"]);
    offered.as_array_mut().unwrap().insert(0, json!({"type": "web_search_20250305", "name": "web_search"}));
    offered.as_array_mut().unwrap().push(json!({"type": "bash_20250124", "name": "bash"}));
    let prompt = reading.prompt(&request(json!({"tools": offered}))).await;
    assert!(prompt.contains("type search = ") && !prompt.contains("web_search") && !prompt.contains("bash"));
    // Errors count tools as the client does.
    offered[1]["input_schema"] = json!([]);
    let (status, _, message) = error(&reading.server.post(PATH, &request(json!({"tools": offered}))).await);
    assert_eq!(status, 400);
    assert!(message.contains("tools[1].input_schema"), "{message}");
}

#[tokio::test]
async fn a_wrong_request_is_a_400_that_names_the_part() {
    let server = Setup::new(&[FINAL]).start();
    let image = json!({"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/a.png"}});
    let block = |block: Value| json!({"messages": [{"role": "user", "content": [block]}]});
    let assistant = |block: Value| json!({"messages": [{"role": "assistant", "content": [block]}, {"role": "user", "content": "x"}]});
    let orphan = json!({"type": "tool_result", "tool_use_id": "nobody", "content": "x"});
    let cases = [
        (json!({"max_tokens": null}), "max_tokens"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": -1}), "max_tokens"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": null}), "messages"),
        (json!({"messages": [{"role": "tool", "content": "x"}]}), "messages[0].role"),
        (json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": []}]}), "messages[0].content"),
        (json!({"messages": [{"role": "user", "content": 1}]}), "messages[0].content"),
        (block(image.clone()), "messages[0].content[0]"),
        (block(json!({"type": "document", "source": {}})), "messages[0].content[0]"),
        (block(json!({"type": "tool_use", "id": "a", "name": "f", "input": {}})), "messages[0].content[0]"),
        (block(json!({"type": "text"})), "messages[0].content[0].text"),
        (block(json!({"text": "x"})), "messages[0].content[0]"),
        (block(json!({"type": "tool_result"})), "messages[0].content[0].tool_use_id"),
        (
            block(json!({"type": "tool_result", "tool_use_id": "a", "content": [image]})),
            "messages[0].content[0].content[0]",
        ),
        // HAR-17: a result that answers no call.
        (merged(json!({"system": "s"}), block(orphan)), "messages[0]"),
        (
            assistant(json!({"type": "tool_use", "id": "a", "name": "", "input": {}})),
            "messages[0].content[0].name",
        ),
        (assistant(json!({"type": "tool_use", "name": "f", "input": {}})), "messages[0].content[0].id"),
        (
            assistant(json!({"type": "server_tool_use", "id": "a", "name": "f", "input": {}})),
            "messages[0].content[0]",
        ),
        (
            json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
            "messages",
        ),
        (json!({"system": [{"type": "image"}]}), "system[0]"),
        (json!({"system": 3}), "system"),
        (json!({"temperature": 3}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"top_k": -2}), "top_k"),
        (json!({"stop_sequences": [""]}), "stop_sequences"),
        (json!({"stop_sequences": vec!["~"; limits::MAX_STOP_STRINGS + 1]}), "stop_sequences"),
        (json!({"stop_sequences": "a"}), "stop_sequences"),
        (json!({"tools": [{"name": "a b", "input_schema": {}}]}), "tools[0].name"),
        (json!({"tools": [{"name": "f", "input_schema": 1}]}), "tools[0].input_schema"),
        (json!({"tools": vec![json!({"name": "f", "input_schema": {}}); 1025]}), "tools"),
        (json!({"tool_choice": {"type": "any"}}), "tool_choice"),
        (json!({"tool_choice": {"type": "tool"}, "tools": tools(&["f"])}), "tool_choice.name"),
        (json!({"tool_choice": {"type": "tool", "name": "g"}, "tools": tools(&["f"])}), "tool_choice"),
        (json!({"tool_choice": {"type": "some"}}), "tool_choice.type"),
        (json!({"tool_choice": "auto"}), "tool_choice"),
        (json!({"thinking": {"type": "sometimes"}}), "thinking.type"),
        (json!({"thinking": {"type": "adaptive", "display": "all"}}), "thinking.display"),
        (json!({"thinking": {"type": "enabled", "budget_tokens": -1}}), "thinking"),
        (json!({"output_config": {"effort": "huge"}}), "output_config.effort"),
        (json!({"output_config": {"format": {"type": "text"}}}), "output_config.format.type"),
        (json!({"output_config": {"format": {"type": "json_schema"}}}), "output_config.format.schema"),
        (
            json!({"output_format": {"type": "json_schema", "schema": {"type": "nothing"}}}),
            "output_format.schema",
        ),
        (json!({"container": "c"}), "container"),
        (json!({"mcp_servers": [{"type": "url"}]}), "mcp_servers"),
        (json!({"cache_salt": "x"}), "cache_salt"),
        (json!({"chat_template": "x"}), "chat_template"),
        (json!({"chat_template_kwargs": {"chat_template": "x"}}), "chat_template_kwargs"),
    ];
    for (extra, part) in cases {
        let (status, kind, message) = error(&server.post(PATH, &request(extra.clone())).await);
        assert_eq!((status, kind.as_str()), (400, "invalid_request_error"), "{extra}: {message}");
        assert!(message.contains(part), "{extra}: {message}");
    }
    for text in ["", "[1]", "{", "{\"messages\":\"\\ud800\"}"] {
        assert_eq!(error(&server.raw(PATH, text).await).0, 400, "{text}");
    }
    let deep = format!("{{\"system\":{}{}}}", "[".repeat(100_000), "]".repeat(100_000));
    assert_eq!(error(&server.raw(PATH, deep).await).0, 400);
}

#[tokio::test]
async fn fields_of_anthropics_service_are_accepted_and_unknown_ones_ignored() {
    let server = Setup::new(&[FINAL]).start();
    let extra = json!({
        "metadata": {"user_id": "u"}, "service_tier": "auto", "cache_control": {"type": "ephemeral"},
        "inference_geo": "us", "speed": "fast", "container": null, "mcp_servers": [],
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "temperature": 1.0, "top_p": 0.9, "top_k": 5, "something_new": [{}],
    });
    let headers = [("anthropic-version", "2023-06-01"), ("anthropic-beta", "a,b")];
    let answer = server.send(post(&format!("{PATH}?beta=true"), &headers, &request(extra))).await;
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert_eq!(answer.json()["content"][0]["text"], "Hello, world!");
}

#[tokio::test]
async fn every_error_has_anthropics_envelope() {
    let mut setup = Setup::new(&[FINAL]);
    setup.server = ServerConfig {
        api_keys: ctxserve_server::ApiKeys::new(["first", "second"]),
        limits: ctxserve_server::limits::Limits { max_body_bytes: 4096, ..Default::default() },
        ..setup.server
    };
    let server = setup.start();
    let key = ("x-api-key", "first");
    let body = request(json!({}));
    for path in [PATH, COUNT, "/v1/messages/batches"] {
        for headers in [
            &[][..],
            &[("x-api-key", "wrong")],
            &[("x-api-key", "")],
            &[("x-api-key", "Bearer first")],
            &[("authorization", "Bearer wrong")],
            &[("authorization", "first")],
        ] {
            let answer = server.send(post(path, headers, &body)).await;
            let (status, kind, _) = error(&answer);
            assert_eq!((status, kind.as_str()), (401, "authentication_error"), "{path} {headers:?}");
        }
    }
    for headers in [
        &[key][..],
        &[("x-api-key", "second")],
        &[("authorization", "Bearer first")],
        // Clients that are given both send both.
        &[("authorization", "Bearer none"), key],
    ] {
        assert_eq!(server.send(post(COUNT, headers, &body)).await.status, 200, "{headers:?}");
    }
    let unknown = server.send(post(PATH, &[key], &request(json!({"model": "claude-x"})))).await;
    let (status, kind, message) = error(&unknown);
    assert_eq!((status, kind.as_str()), (404, "not_found_error"));
    assert!(message.contains("claude-x"), "{message}");
    assert_eq!(error(&server.send(post("/v1/messages/batches", &[key], &body)).await).0, 404);
    let large = request(json!({"system": "x".repeat(5000)}));
    let (status, kind, _) = error(&server.send(post(PATH, &[key], &large)).await);
    assert_eq!((status, kind.as_str()), (413, "request_too_large"));
    let get = Request::get(PATH).header("x-api-key", "first").body(Body::empty()).unwrap();
    assert_eq!(error(&server.send(get).await).0, 405);
    let form = Request::post(PATH).header("x-api-key", "first").header("content-type", "text/plain");
    assert_eq!(error(&server.send(form.body(Body::from("{}")).unwrap()).await).0, 415);
    // The code by which the SDK knows to send the whole conversation.
    let threaded = request(json!({"thread": {"type": "create"}}));
    let answer = server.send(post(PATH, &[key], &threaded)).await;
    assert_eq!(answer.status, 400);
    assert_eq!(answer.json()["error"]["details"], json!({"error_code": "thread_unsupported_request"}));
    // Other routes keep theirs.
    assert_eq!(
        server.send(post("/v1/chat/completions", &[key], &json!({}))).await.error()["code"],
        "invalid_value"
    );
    assert_eq!(server.send(post("/v1/messagesX", &[key], &body)).await.error()["code"], "unknown_url");
}

/// OAI-08 and OAI-09, for this API: clients look for these words to know that they should shorten the conversation.
#[tokio::test]
async fn a_prompt_beyond_the_context_says_so_and_max_tokens_beyond_it_is_cut() {
    let server = Setup::new(&[FINAL]).start();
    let body = request(json!({"system": "word ".repeat(3000)}));
    let count = server.post(COUNT, &body).await.json()["input_tokens"].clone();
    let (status, kind, message) = error(&server.post(PATH, &body).await);
    assert_eq!((status, kind.as_str()), (400, "invalid_request_error"));
    assert_eq!(message, format!("prompt is too long: {count} tokens > {} maximum", common::CONTEXT));
    let cut = server.post(PATH, &request(json!({"max_tokens": u64::MAX}))).await;
    assert_eq!(cut.json()["stop_reason"], "end_turn");
}

/// An answer that takes a while.
fn slow() -> Setup {
    let mut setup = Setup::new(&[&format!("<|channel|>final<|message|>{}", "x y ".repeat(400))]);
    setup.pace = Duration::from_millis(3);
    setup.engine = EngineConfig { max_num_seqs: 1, max_queued_requests: 1, ..EngineConfig::default() };
    setup
}

/// OPS-13 and OPS-16, for this API.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_is_429_and_a_client_that_goes_away_frees_its_place() {
    let server = slow().start();
    let ask = |stream: bool| post(PATH, &[], &request(json!({"stream": stream})));
    let app = server.app.clone();
    let busy: Vec<_> = [true, false]
        .map(|stream| {
            let asked = tower::ServiceExt::oneshot(app.clone(), ask(stream));
            tokio::spawn(async move {
                let body = asked.await.unwrap().into_body();
                axum::body::to_bytes(body, usize::MAX).await
            })
        })
        .into();
    eventually(|| {
        let snapshot = server.engine.snapshot();
        snapshot.running + snapshot.waiting == 2
    })
    .await;
    let answer = server.send(ask(true)).await;
    let (status, kind, _) = error(&answer);
    assert_eq!((status, kind.as_str()), (429, "rate_limit_error"));
    assert!(answer.headers["retry-after"].to_str().unwrap().parse::<u64>().unwrap() >= 1);
    for task in &busy {
        task.abort();
    }
    eventually(|| {
        let snapshot = server.engine.snapshot();
        snapshot.running + snapshot.waiting == 0 && snapshot.used_pages.iter().all(|&pages| pages == 0)
    })
    .await;
    assert_eq!(server.engine.snapshot().aborted, 2);
}

/// OAI-04, for this API: a stream that fails ends with an error event.
#[tokio::test(flavor = "multi_thread")]
async fn a_failing_stream_ends_with_an_error_event() {
    let server = slow().start();
    let engine = server.engine.clone();
    let aborting = async {
        eventually(|| engine.snapshot().generation_tokens > 3).await;
        engine.abort_all();
    };
    let body = request(json!({"stream": true}));
    let (answer, ()) = tokio::join!(server.post(PATH, &body), aborting);
    let events = events(&answer);
    let last = events.last().unwrap();
    assert_eq!(last["type"], "error");
    assert_eq!(last["error"]["type"], "overloaded_error");
    assert_eq!(last["request_id"], answer.headers["request-id"].to_str().unwrap());
    assert_eq!(events[0]["type"], "message_start");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_stream_is_kept_alive_by_pings() {
    let mut setup = slow();
    setup.pace = Duration::from_millis(40);
    setup.server.keep_alive = Duration::from_millis(2);
    let server = setup.start();
    let answer = server.post(PATH, &request(json!({"stream": true, "max_tokens": 5}))).await;
    assert!(answer.text.contains("event: ping\ndata: {\"type\":\"ping\"}\n\n"), "{}", answer.text);
    assert_eq!(events(&answer).last().unwrap()["type"], "message_stop");
}
