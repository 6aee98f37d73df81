//! A device that fails, and a model that produces garbage: what clients are told.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use std::time::Duration;

use common::{CONTEXT, Server, Setup, eventually, request, tokenizer};
use ctxserve_backend::{Batch, DeviceError, KvPlan, SampleError, Sampled};
use ctxserve_engine::{EngineState, Runner, RunnerInfo, ScriptedRunner};
use ctxserve_server::serve;
use serde_json::json;
use tokio::net::TcpListener;

const LINE: &str = "<|channel|>final<|message|>one two three four five<|return|>";

/// Speaks `LINE` and goes wrong at one token of it.
struct Broken {
    script: ScriptedRunner,
    at: u64,
    device: bool,
    /// Of the step in flight: which sampling rows have reached `at`.
    reached: Vec<bool>,
}

impl Runner for Broken {
    fn info(&self) -> &RunnerInfo {
        self.script.info()
    }

    fn allocate(&mut self, plan: &KvPlan) -> Result<(), DeviceError> {
        self.script.allocate(plan)
    }

    fn launch(&mut self, batch: &Batch) -> Result<(), DeviceError> {
        self.reached = batch.sample_rows().map(|row| row.step >= self.at).collect();
        if self.device && self.reached.contains(&true) {
            return Err(DeviceError::new("attention", "illegal address"));
        }
        self.script.launch(batch)
    }

    fn collect(&mut self) -> Result<Vec<Result<Sampled, SampleError>>, DeviceError> {
        let answers = self.script.collect()?.into_iter().zip(std::mem::take(&mut self.reached));
        Ok(answers.map(|(answer, bad)| if bad { Err(SampleError::NonFinite) } else { answer }).collect())
    }
}

/// Never ends a step.
struct Hung(ScriptedRunner);

impl Runner for Hung {
    fn info(&self) -> &RunnerInfo {
        self.0.info()
    }

    fn allocate(&mut self, plan: &KvPlan) -> Result<(), DeviceError> {
        self.0.allocate(plan)
    }

    fn launch(&mut self, batch: &Batch) -> Result<(), DeviceError> {
        self.0.launch(batch)
    }

    fn collect(&mut self) -> Result<Vec<Result<Sampled, SampleError>>, DeviceError> {
        loop {
            std::thread::park();
        }
    }
}

fn post(extra: serde_json::Value) -> axum::http::Request<axum::body::Body> {
    let asked = axum::http::Request::post("/v1/chat/completions").header("content-type", "application/json");
    asked.body(axum::body::Body::from(request(extra).to_string())).unwrap()
}

fn broken(device: bool) -> Server {
    let tokenizer = tokenizer();
    let script = ScriptedRunner::new(tokenizer.len(), CONTEXT, vec![tokenizer.encode_with_control(LINE)]);
    Setup::new(&[]).start_with(Box::new(Broken { script, at: 5, device, reached: Vec::new() }))
}

/// KRN-03: NaN in logits.
#[tokio::test]
async fn garbage_fails_its_own_request_loudly() {
    let server = broken(false);
    let answer = server.chat(&request(json!({}))).await;
    assert_eq!(answer.status, 500);
    assert_eq!(answer.error()["type"], "server_error");
    let frames = server.chat(&request(json!({"stream": true}))).await.frames();
    assert_eq!(frames.last().unwrap()["error"]["code"], "internal_error");
    assert!(frames.len() > 1, "what was sound has been streamed");
    assert_eq!(server.get("/health").await.status, 200);
    assert_eq!(server.chat(&request(json!({"max_tokens": 4}))).await.status, 200);
    assert!(server.metrics().await.contains("finished_reason=\"error\"} 2"));
}

/// OAI-04, OPS-19.
#[tokio::test]
async fn a_device_fault_ends_streams_with_an_error_frame() {
    let server = broken(true);
    let frames = server.chat(&request(json!({"stream": true}))).await.frames();
    let error = &frames.last().unwrap()["error"];
    assert_eq!(error["code"], "engine_fault");
    eventually(|| matches!(server.engine.snapshot().state, EngineState::Faulted(_))).await;
    for answer in [server.get("/health").await, server.chat(&request(json!({}))).await] {
        assert_eq!(answer.status, 503);
        assert_eq!(answer.error()["code"], "engine_fault");
    }
}

/// OPS-19.
#[tokio::test]
async fn a_device_fault_is_503_whole_and_ends_the_server() {
    let server = broken(true);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let serving = serve(listener, server.state.clone(), std::future::pending());
    let (end, answer) = tokio::join!(serving, async { server.chat(&request(json!({}))).await });
    assert_eq!(answer.status, 503);
    assert_eq!(answer.error()["code"], "engine_fault");
    assert!(matches!(end.unwrap(), EngineState::Faulted(_)));
}

/// OPS-20: a step that does not end turns health 503; many short steps beside a full queue do not.
#[tokio::test(flavor = "multi_thread")]
async fn health_tells_a_stalled_engine_from_a_busy_one() {
    let tokenizer = tokenizer();
    let script =
        |line: &str| ScriptedRunner::new(tokenizer.len(), CONTEXT, vec![tokenizer.encode_with_control(line)]);
    let mut setup = Setup::new(&[]);
    setup.server.stall_timeout = Duration::from_millis(50);
    let server = setup.start_with(Box::new(Hung(script(LINE))));
    assert_eq!(server.get("/health").await.status, 200, "nothing waits");
    let app = server.app.clone();
    let asking = tokio::spawn(async move { tower::ServiceExt::oneshot(app, post(json!({}))).await });
    eventually(|| server.engine.snapshot().step_age > Duration::from_millis(50)).await;
    let answer = server.get("/health").await;
    assert_eq!(answer.status, 503);
    assert_eq!(answer.error()["type"], "server_error");
    asking.abort();

    let mut setup = Setup::new(&[]);
    setup.engine.max_num_seqs = 1;
    setup.server.stall_timeout = Duration::from_secs(600);
    let long = format!("<|channel|>final<|message|>{}", "x y ".repeat(300));
    let server = setup.start_with(Box::new(script(&long).with_pace(Duration::from_millis(2))));
    let asking: Vec<_> = (0..4)
        .map(|_| tokio::spawn(tower::ServiceExt::oneshot(server.app.clone(), post(json!({})))))
        .collect();
    eventually(|| server.engine.snapshot().waiting >= 3 && server.engine.snapshot().generation_tokens > 20)
        .await;
    assert_eq!(server.get("/health").await.status, 200, "a full queue is no stall");
    for task in asking {
        task.abort();
    }
}

#[tokio::test]
async fn a_device_that_hangs_does_not_keep_the_server_from_ending() {
    let tokenizer = tokenizer();
    let script = ScriptedRunner::new(tokenizer.len(), CONTEXT, vec![tokenizer.encode_with_control(LINE)]);
    let mut setup = Setup::new(&[]);
    setup.server.drain_timeout = Duration::from_millis(10);
    setup.server.abort_timeout = Duration::from_millis(10);
    let server = setup.start_with(Box::new(Hung(script)));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let engine = server.engine.clone();
    let busy = async move { eventually(|| engine.snapshot().running == 1).await };
    let serving = serve(listener, server.state.clone(), busy);
    let request = request(json!({}));
    let end = tokio::select! {
        end = serving => end.unwrap(),
        answer = server.chat(&request) => panic!("answered {}", answer.status),
    };
    assert_eq!(end, EngineState::Faulted("the device does not answer".to_owned()));
}
