//! Over a real connection: disconnects, and the end of a server.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use std::net::SocketAddr;
use std::time::Duration;

use common::{Server, Setup, eventually, request};
use ctxserve_engine::EngineState;
use ctxserve_server::serve;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

struct Running {
    server: Server,
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    ended: JoinHandle<EngineState>,
}

async fn run(pace: Duration) -> Running {
    let mut setup = Setup::new(&[&format!("<|channel|>final<|message|>{}<|return|>", "x y ".repeat(200))]);
    setup.pace = pace;
    let server = setup.start();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = serve(listener, server.state.clone(), async {
        let _ = stopped.await;
    });
    Running { server, address, stop, ended: tokio::spawn(async { serving.await.unwrap() }) }
}

/// Sends a chat request and returns the connection without reading the answer.
async fn ask(address: SocketAddr, extra: serde_json::Value) -> TcpStream {
    let body = request(extra).to_string();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         connection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body.as_bytes()).await.unwrap();
    stream
}

async fn read(mut stream: TcpStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text
}

/// OPS-13.
#[tokio::test(flavor = "multi_thread")]
async fn a_disconnect_cancels_streamed_and_whole_answers() {
    let running = run(Duration::from_millis(5)).await;
    let engine = &running.server.engine;
    for (count, stream) in [(1, true), (2, false)] {
        let connection = ask(running.address, json!({"stream": stream})).await;
        let before = engine.snapshot().generation_tokens;
        eventually(|| engine.snapshot().generation_tokens > before + 2).await;
        drop(connection);
        eventually(|| engine.snapshot().aborted == count).await;
        eventually(|| engine.snapshot().used_pages.iter().all(|&pages| pages == 0)).await;
    }
    assert_eq!(engine.snapshot().finished, 0);
}

/// OAI-15.
#[tokio::test(flavor = "multi_thread")]
async fn headers_leave_before_the_first_token() {
    let running = run(Duration::from_secs(3600)).await;
    let mut connection = ask(running.address, json!({"stream": true})).await;
    let mut head = [0; 15];
    connection.read_exact(&mut head).await.unwrap();
    assert_eq!(&head, b"HTTP/1.1 200 OK");
}

/// OPS-21.
#[tokio::test(flavor = "multi_thread")]
async fn shutdown_finishes_what_runs_and_refuses_the_rest() {
    let running = run(Duration::from_millis(2)).await;
    let engine = running.server.engine.clone();
    let first = ask(running.address, json!({"stream": true})).await;
    eventually(|| engine.snapshot().generation_tokens > 2).await;
    running.stop.send(()).unwrap();
    eventually(|| engine.snapshot().state == EngineState::Draining).await;
    let late = read(ask(running.address, json!({})).await).await;
    assert!(late.starts_with("HTTP/1.1 503"), "{late}");
    let text = read(first).await;
    assert!(text.contains("\"finish_reason\":\"stop\"") && text.contains("data: [DONE]"), "{text}");
    assert_eq!(running.ended.await.unwrap(), EngineState::Stopped);
    assert!(TcpStream::connect(running.address).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_over_the_limit_gets_its_answer() {
    let running = run(Duration::ZERO).await;
    let size = (32 << 20) + 10;
    let mut stream = TcpStream::connect(running.address).await.unwrap();
    let head = format!(
        "POST /tokenize HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {size}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&vec![b' '; size]).await.unwrap();
    let text = read(stream).await;
    assert!(text.starts_with("HTTP/1.1 413"), "{text}");
    assert!(text.contains("request_too_large"));
}
