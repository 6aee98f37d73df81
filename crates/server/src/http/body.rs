//! Request bodies.

use std::time::Duration;

use axum::extract::Request;
use axum::http::HeaderMap;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use tokio::time::timeout;

use super::depth::Gauge;
use crate::error::ApiError;
use crate::limits::Limits;
use crate::state::ServerState;

/// Of a body that is too large, this much is read and thrown away, so that a client that writes before it reads
/// gets to see the answer.
const DISCARD_BYTES: usize = 64 << 20;
const DISCARD_TIME: Duration = Duration::from_secs(10);

/// Reads a JSON body.
///
/// # Errors
/// 415 for another content type, 413 over the limit, 408 when it does not arrive, 400 when it is cut or nested too deep.
pub(crate) async fn read(state: &ServerState, request: Request) -> Result<Bytes, ApiError> {
    let limits = &state.config().limits;
    if !is_json(request.headers()) {
        return Err(ApiError::media_type());
    }
    let declared = declared_length(request.headers());
    let reading = collect(request, declared, limits);
    timeout(limits.body_timeout, reading).await.map_err(|_| ApiError::body_timeout())?
}

/// A missing content type is accepted; a foreign one is not, so that no web page can post a form here.
fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(CONTENT_TYPE) else { return true };
    let essence = value.to_str().unwrap_or_default().split(';').next().unwrap_or_default();
    let essence = essence.trim().to_ascii_lowercase();
    essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
}

fn declared_length(headers: &HeaderMap) -> usize {
    let value = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    value.and_then(|text| text.parse().ok()).unwrap_or(0)
}

async fn collect(request: Request, declared: usize, limits: &Limits) -> Result<Bytes, ApiError> {
    let mut chunks = request.into_body().into_data_stream();
    // The declared length is the client's word: nothing is reserved by it.
    let mut body = BytesMut::new();
    let limit = limits.max_body_bytes;
    let mut gauge = Gauge::default();
    let (mut too_large, mut too_deep) = (declared > limit, false);
    while !too_large && !too_deep {
        match chunks.next().await {
            None => return Ok(body.freeze()),
            Some(Err(_)) => return Err(ApiError::malformed("The request body ended early.")),
            Some(Ok(chunk)) => {
                too_large = body.len() + chunk.len() > limit;
                too_deep = gauge.read(&chunk) > limits.max_json_depth;
                if !too_large {
                    body.extend_from_slice(&chunk);
                }
            }
        }
    }
    drop(body);
    let discard = async {
        let mut discarded = 0;
        while let Some(Ok(chunk)) = chunks.next().await {
            discarded += chunk.len();
            if discarded > DISCARD_BYTES {
                break;
            }
        }
    };
    // Whether all of it came or time ran out, the answer is the same.
    let _ = timeout(DISCARD_TIME, discard).await;
    Err(if too_large { ApiError::body_too_large(limit) } else { ApiError::too_deep(limits.max_json_depth) })
}

/// Runs work that may take long (parsing, rendering and encoding a large prompt) off the async threads.
///
/// # Errors
/// What the work returns; 500 when it panics.
pub(crate) async fn blocking<T: Send + 'static>(
    state: &ServerState,
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    // The semaphore is never closed. The work keeps the place, also when its client has gone.
    let place = state.preparing().acquire_owned().await.ok();
    let work = move || {
        let result = work();
        drop(place);
        result
    };
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        tracing::error!(%error, "a request's preparation did not finish");
        Err(ApiError::internal("The server failed on this request."))
    })
}

/// A JSON answer.
pub(crate) fn json(value: &impl serde::Serialize) -> Result<Response, ApiError> {
    use axum::response::IntoResponse;
    let text = serde_json::to_string(value)
        .map_err(|error| ApiError::internal(format!("The answer could not be written: {error}")))?;
    Ok(([(CONTENT_TYPE, "application/json")], text).into_response())
}
