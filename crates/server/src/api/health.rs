//! `GET /health`, `/ping`, `/version`, `/load`, `/metrics`.

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use ctxserve_engine::EngineState;
use serde_json::json;

use crate::error::ApiError;
use crate::http::body::json;
use crate::state::ServerState;

/// 200 while the engine takes requests and its steps keep finishing. Neither a full queue nor a long prompt
/// changes that; draining, a fault and a stalled device do.
pub(crate) async fn health(State(state): State<ServerState>) -> Result<Response, ApiError> {
    let snapshot = state.engine().snapshot();
    match snapshot.state {
        EngineState::Running => {}
        EngineState::Draining | EngineState::Stopped => {
            return Err(ApiError::unavailable("The server is shutting down."));
        }
        EngineState::Faulted(message) => return Err(ApiError::fault(message)),
    }
    if snapshot.step_age > state.config().stall_timeout {
        let seconds = snapshot.step_age.as_secs();
        return Err(ApiError::fault(format!("The engine has finished no step for {seconds} seconds.")));
    }
    json(&json!({"status": "ok"}))
}

/// The server's version.
pub(crate) async fn version() -> Result<Response, ApiError> {
    json(&json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// Sequences in flight, in vLLM's shape.
pub(crate) async fn load(State(state): State<ServerState>) -> Result<Response, ApiError> {
    let snapshot = state.engine().snapshot();
    json(&json!({"server_load": snapshot.running + snapshot.waiting}))
}

/// Prometheus text.
pub(crate) async fn metrics(State(state): State<ServerState>) -> Response {
    let text = state.metrics().render(&state.engine().snapshot());
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}
