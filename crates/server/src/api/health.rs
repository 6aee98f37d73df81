//! `GET /health`, `/ping`, `/version`, `/load`, `/metrics`, `/openapi.json`; `POST /reset_prefix_cache`.

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use ctxserve_engine::EngineState;

use crate::error::ApiError;
use crate::http::body::json;
use crate::openapi;
use crate::state::ServerState;
use crate::wire::service::{Health, Load, Version};

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
    json(&Health { status: "ok" })
}

/// The server's version.
pub(crate) async fn version() -> Result<Response, ApiError> {
    json(&Version { version: env!("CARGO_PKG_VERSION") })
}

/// Sequences in flight, in vLLM's shape.
pub(crate) async fn load(State(state): State<ServerState>) -> Result<Response, ApiError> {
    let snapshot = state.engine().snapshot();
    json(&Load { server_load: snapshot.running + snapshot.waiting })
}

/// Forgets what is kept for later prompts. Answers under way are not touched.
pub(crate) async fn reset_prefix_cache(State(state): State<ServerState>) -> Result<StatusCode, ApiError> {
    if state.engine().reset_prefixes().await {
        Ok(StatusCode::OK)
    } else {
        Err(ApiError::unavailable("The engine has stopped."))
    }
}

/// Prometheus text.
pub(crate) async fn metrics(State(state): State<ServerState>) -> Response {
    let text = state.metrics().render(&state.engine().snapshot());
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

/// What every route takes and gives.
pub(crate) async fn document(State(state): State<ServerState>) -> Result<Response, ApiError> {
    json(&openapi::document(&state))
}
