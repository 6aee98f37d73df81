//! A server on a scripted model, called without a socket; and a few ways to read what it says.
#![allow(dead_code, reason = "each test file uses its own part")]

pub(crate) mod messages;
pub(crate) mod responses;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Method, Request, StatusCode};
use ctxserve_chat::{PromptFiles, Tokenizer, demo_tokenizer_json, formats};
use ctxserve_core::TokenId;
use ctxserve_engine::{Engine, EngineConfig, EngineHandle, Runner, ScriptedRunner};
use ctxserve_server::{PromptDate, ServerConfig, ServerState, router};
use serde_json::Value;
use tower::ServiceExt;

pub(crate) const CONTEXT: usize = 2048;

/// How a test server differs from the usual one.
pub(crate) struct Setup {
    pub(crate) lines: Vec<Vec<TokenId>>,
    pub(crate) pace: Duration,
    pub(crate) engine: EngineConfig,
    pub(crate) server: ServerConfig,
    pub(crate) context: usize,
    pub(crate) format: &'static str,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) files: PromptFiles,
}

impl Setup {
    /// As [`Setup::new`], with the hermes format.
    pub(crate) fn hermes(script: &[&str]) -> Self {
        let json = include_bytes!("../../../chat/tests/data/qwen/tokenizer.json");
        let tokenizer = Arc::new(Tokenizer::from_bytes(json).unwrap());
        let lines = script.iter().map(|line| tokenizer.encode_with_control(line)).collect();
        Self { format: "hermes", tokenizer, ..Self::ids(lines) }
    }

    /// Answers are the lines of `script`, with control tokens spelled out.
    pub(crate) fn new(script: &[&str]) -> Self {
        let tokenizer = tokenizer();
        Self::ids(script.iter().map(|line| tokenizer.encode_with_control(line)).collect())
    }

    pub(crate) fn ids(lines: Vec<Vec<TokenId>>) -> Self {
        let server = ServerConfig {
            served_model_names: vec!["scripted".to_owned(), "org/other".to_owned()],
            prompt_date: PromptDate::Fixed("2026-05-12".to_owned()),
            ..ServerConfig::default()
        };
        Self {
            lines,
            pace: Duration::ZERO,
            // Who asks twice would find the first one's prompt, and usages could not be compared; `prefix.rs` turns it on.
            engine: EngineConfig { prefix_caching: false, ..EngineConfig::default() },
            server,
            context: CONTEXT,
            format: "harmony",
            tokenizer: tokenizer(),
            files: PromptFiles::default(),
        }
    }

    pub(crate) fn start(self) -> Server {
        let (lines, context) = (self.lines.clone(), self.context);
        let runner = ScriptedRunner::new(self.tokenizer.len(), context, lines).with_pace(self.pace);
        self.start_with(Box::new(runner))
    }

    /// With another model in place of the script.
    pub(crate) fn start_with(self, runner: Box<dyn Runner>) -> Server {
        let tokenizer = self.tokenizer;
        let engine = Engine::start(runner, self.engine).unwrap();
        let format = formats::open(self.format, Arc::clone(&tokenizer), &self.files).unwrap();
        let state = ServerState::new(engine.clone(), Arc::clone(&tokenizer), format, self.server).unwrap();
        Server { app: router(state.clone()), state, engine, tokenizer }
    }
}

pub(crate) fn tokenizer() -> Arc<Tokenizer> {
    Arc::new(Tokenizer::from_bytes(demo_tokenizer_json()).unwrap())
}

pub(crate) struct Server {
    pub(crate) app: Router,
    pub(crate) state: ServerState,
    pub(crate) engine: EngineHandle,
    pub(crate) tokenizer: Arc<Tokenizer>,
}

/// A whole response.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {}", self.text))
    }

    /// The envelope's `error`, checked to have its four fields.
    pub(crate) fn error(&self) -> Value {
        let value = self.json();
        let error = value["error"].as_object().unwrap_or_else(|| panic!("no envelope: {}", self.text));
        for field in ["message", "type", "param", "code"] {
            assert!(error.contains_key(field), "{field} is missing: {}", self.text);
        }
        assert!(!self.status.is_success());
        value["error"].clone()
    }

    /// Data of every frame of an event stream but the last, which is `[DONE]`.
    pub(crate) fn frames(&self) -> Vec<Value> {
        assert_eq!(self.headers["content-type"], "text/event-stream", "{}", self.text);
        let mut data: Vec<&str> = self.text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", self.text);
        data.into_iter().map(|frame| serde_json::from_str(frame).unwrap()).collect()
    }
}

impl Server {
    pub(crate) async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.app.clone().oneshot(request).await.unwrap();
        let (head, body) = response.into_parts();
        let bytes = to_bytes(body, usize::MAX).await.unwrap();
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        Answer { status: head.status, headers: head.headers, text }
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(path).body(Body::empty()).unwrap()).await
    }

    pub(crate) async fn raw(&self, path: &str, body: impl Into<Body>) -> Answer {
        let request = Request::builder().method(Method::POST).uri(path);
        let request = request.header("content-type", "application/json").body(body.into()).unwrap();
        self.send(request).await
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.raw(path, body.to_string()).await
    }

    pub(crate) async fn chat(&self, body: &Value) -> Answer {
        self.post("/v1/chat/completions", body).await
    }

    pub(crate) async fn complete(&self, body: &Value) -> Answer {
        self.post("/v1/completions", body).await
    }

    pub(crate) async fn metrics(&self) -> String {
        self.get("/metrics").await.text
    }
}

/// `{"messages":[{"role":"user","content":"hi"}]}` with the fields of `extra`.
pub(crate) fn request(extra: Value) -> Value {
    merged(serde_json::json!({"messages": [{"role": "user", "content": "hi"}]}), extra)
}

/// `base` with the fields of `extra`.
pub(crate) fn merged(mut base: Value, extra: Value) -> Value {
    let fields = base.as_object_mut().unwrap();
    for (key, value) in extra.as_object().unwrap() {
        fields.insert(key.clone(), value.clone());
    }
    base
}

/// One choice put together from its frames.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Joined {
    pub(crate) content: Option<String>,
    pub(crate) reasoning: Option<String>,
    /// Name and arguments.
    pub(crate) calls: Vec<(String, String)>,
    pub(crate) call_ids: Vec<String>,
    pub(crate) finish_reason: Option<String>,
    pub(crate) stop_reason: Value,
    pub(crate) logprobs: Vec<Value>,
    pub(crate) token_ids: Vec<Value>,
}

/// Puts choice `index` of a chat stream together as clients do, checking the rules of OAI-01 and OAI-04.
pub(crate) fn join(frames: &[Value], index: usize) -> Joined {
    let mut joined = Joined::default();
    let mut first = true;
    for frame in frames {
        let Some(choice) = frame["choices"].as_array().unwrap().iter().find(|c| c["index"] == index) else {
            continue;
        };
        assert!(joined.finish_reason.is_none(), "a frame after the finish reason");
        let delta = choice["delta"].as_object().unwrap();
        assert_eq!(delta.contains_key("role"), first, "role is in the first frame alone");
        if first {
            assert_eq!(delta["role"], "assistant");
            assert_eq!(delta["content"], "");
        } else if let Some(text) = delta.get("content") {
            joined.content.get_or_insert_default().push_str(text.as_str().unwrap());
        }
        first = false;
        assert_eq!(delta.get("reasoning"), delta.get("reasoning_content"));
        if let Some(text) = delta.get("reasoning") {
            joined.reasoning.get_or_insert_default().push_str(text.as_str().unwrap());
        }
        for call in delta.get("tool_calls").into_iter().flat_map(|calls| calls.as_array().unwrap()) {
            let at = usize::try_from(call["index"].as_u64().unwrap()).unwrap();
            let function = call["function"].as_object().unwrap();
            if at == joined.calls.len() {
                assert_eq!(call["type"], "function");
                joined.call_ids.push(call["id"].as_str().unwrap().to_owned());
                joined.calls.push((function["name"].as_str().unwrap().to_owned(), String::new()));
            } else {
                let keys: Vec<&str> = call.as_object().unwrap().keys().map(String::as_str).collect();
                assert_eq!(keys, ["index", "function"], "later deltas omit id and type");
                assert!(!function.contains_key("name"));
            }
            joined.calls[at].1.push_str(function["arguments"].as_str().unwrap());
        }
        if let Some(entries) = choice["logprobs"]["content"].as_array() {
            joined.logprobs.extend(entries.iter().cloned());
        }
        if let Some(ids) = choice["token_ids"].as_array() {
            joined.token_ids.extend(ids.iter().cloned());
        }
        joined.finish_reason = choice["finish_reason"].as_str().map(str::to_owned);
        if joined.finish_reason.is_some() {
            joined.stop_reason = choice["stop_reason"].clone();
        }
    }
    joined
}

/// The same of a whole answer's choice.
pub(crate) fn whole(choice: &Value) -> Joined {
    let message = &choice["message"];
    assert_eq!(message["reasoning"], message["reasoning_content"]);
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let calls = list(&message["tool_calls"]);
    Joined {
        content: text(&message["content"]),
        reasoning: text(&message["reasoning"]),
        calls: calls
            .iter()
            .map(|c| (text(&c["function"]["name"]).unwrap(), text(&c["function"]["arguments"]).unwrap()))
            .collect(),
        call_ids: calls.iter().map(|c| text(&c["id"]).unwrap()).collect(),
        finish_reason: text(&choice["finish_reason"]),
        stop_reason: choice["stop_reason"].clone(),
        logprobs: list(&choice["logprobs"]["content"]),
        token_ids: list(&choice["token_ids"]),
    }
}

/// Waits, without a bound on time, until `holds`.
pub(crate) async fn eventually(mut holds: impl FnMut() -> bool) {
    while !holds() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
