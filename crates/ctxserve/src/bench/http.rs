//! The same decode through the real server: axum on loopback, a streaming client of `/v1/completions`.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::{Context, bail};
use ctxserve_core::TokenId;
use ctxserve_engine::EngineState;
use ctxserve_server::ServerState;
use hyper::body::{Body, Incoming};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;

use super::measure::{Bench, Decoded};
use super::sse::SseReader;

/// Answer tokens before the counted ones.
pub(super) const UNCOUNTED: usize = 2;
/// Bytes of an error's body that are shown.
const SHOWN: usize = 1000;

/// A server on a free port of loopback, on threads of its own as under `serve`.
pub(super) struct Server {
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    thread: JoinHandle<anyhow::Result<EngineState>>,
}

impl Server {
    /// Starts it.
    ///
    /// # Errors
    /// No port, no thread.
    pub(super) fn start(state: ServerState) -> anyhow::Result<Self> {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().enable_all().build().context("async runtime")?;
        let listener = runtime.block_on(TcpListener::bind(("127.0.0.1", 0))).context("a port of loopback")?;
        let address = listener.local_addr()?;
        let (stop, stopped) = oneshot::channel();
        let serve = move || {
            // A sender that is gone stops the server too.
            let stopped = async { drop(stopped.await) };
            let end = runtime.block_on(ctxserve_server::serve(listener, state, stopped));
            runtime.shutdown_background();
            Ok(end?)
        };
        let thread = thread::Builder::new().name("server".to_owned()).spawn(serve)?;
        Ok(Self { address, stop, thread })
    }

    /// Decodes one sequence after `prompt` tokens: counted from the frame of the second token to the one that brings the
    /// last. The first frame carries the prompt's ids too and comes late; counting from it would flatter the server.
    ///
    /// # Errors
    /// A request that was refused, or an answer that is not as long as was asked.
    pub(super) fn decode(&self, bench: &mut Bench<'_>, prompt: usize) -> anyhow::Result<Decoded> {
        let (output, temperature) = (bench.options.output, bench.options.temperature);
        let body = body(&bench.prompt(prompt), output + UNCOUNTED, temperature, bench.options.seed);
        bench.settle()?;
        let mut times = bench.block_on(stream(self.address, body))?;
        if times.len() != output + UNCOUNTED {
            bail!("the server sent {} of {} tokens", times.len(), output + UNCOUNTED);
        }
        let counted = times.split_off(UNCOUNTED);
        let zero = times.last().copied().context("no token came")?;
        let context = (prompt + UNCOUNTED) as f64 + (output - 1) as f64 / 2.0;
        Ok(Decoded::new(zero, &[counted], context))
    }

    /// Stops it, and the engine behind it.
    ///
    /// # Errors
    /// The engine had failed.
    pub(super) fn stop(self) -> anyhow::Result<()> {
        // The server may have ended already, for the reason that its thread returns.
        let _ = self.stop.send(());
        match self.thread.join() {
            Ok(Ok(EngineState::Faulted(what))) => bail!("the engine failed: {what}"),
            Ok(end) => end.map(|_| ()),
            Err(_) => bail!("the server's thread panicked"),
        }
    }
}

fn body(prompt: &[TokenId], max_tokens: usize, temperature: f32, seed: u64) -> String {
    // Ids are asked for because text says little of how many tokens it was: a token can be half a character.
    json!({
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "seed": seed >> 1,
        "ignore_eos": true,
        "stream": true,
        "return_token_ids": true,
    })
    .to_string()
}

/// When each token of the answer came.
async fn stream(address: SocketAddr, body: String) -> anyhow::Result<Vec<Instant>> {
    let socket = TcpStream::connect(address).await?;
    socket.set_nodelay(true)?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(socket)).await?;
    let connection = tokio::spawn(connection);
    let request = Request::post("/v1/completions")
        .header(HOST, address.to_string())
        .header(CONTENT_TYPE, "application/json")
        .body(body)?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let mut body = response.into_body();
    if status != StatusCode::OK {
        let mut text = Vec::new();
        while let Some(bytes) = next(&mut body).await?
            && text.len() < SHOWN
        {
            text.extend(bytes);
        }
        bail!("the server answered {status}: {}", String::from_utf8_lossy(&text));
    }
    let (mut reader, mut times) = (SseReader::default(), Vec::new());
    let mut done = false;
    while let Some(bytes) = next(&mut body).await? {
        let now = Instant::now();
        for event in reader.push(&bytes) {
            done |= event == "[DONE]";
            if !done {
                times.extend(std::iter::repeat_n(now, tokens(&event)?));
            }
        }
    }
    drop(sender);
    // The body was read to its end: what becomes of the connection is of no interest.
    let _ = connection.await;
    if done { Ok(times) } else { bail!("the stream ended without [DONE]") }
}

async fn next(body: &mut Incoming) -> anyhow::Result<Option<hyper::body::Bytes>> {
    loop {
        match poll_fn(|context| Pin::new(&mut *body).poll_frame(context)).await {
            None => return Ok(None),
            Some(frame) => {
                if let Ok(bytes) = frame?.into_data() {
                    return Ok(Some(bytes));
                }
            }
        }
    }
}

/// Tokens in a frame.
fn tokens(frame: &str) -> anyhow::Result<usize> {
    let frame: Value = serde_json::from_str(frame).context("a frame that is no JSON")?;
    if let Some(error) = frame.get("error") {
        bail!("the server answered {error}");
    }
    let choices = frame.get("choices").and_then(Value::as_array).context("a frame without choices")?;
    let ids = |choice: &Value| choice.get("token_ids").and_then(Value::as_array).map_or(0, Vec::len);
    Ok(choices.iter().map(ids).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_counted_by_their_token_ids() {
        assert_eq!(tokens(r#"{"choices":[{"text":"ab","token_ids":[1,2]}]}"#).unwrap(), 2);
        assert_eq!(tokens(r#"{"choices":[{"text":"","token_ids":[]}]}"#).unwrap(), 0);
        assert_eq!(tokens(r#"{"choices":[],"usage":{}}"#).unwrap(), 0);
        assert!(tokens(r#"{"error":{"message":"full"}}"#).unwrap_err().to_string().contains("full"));
        assert!(tokens("half").is_err() && tokens("{}").is_err());
    }
}
