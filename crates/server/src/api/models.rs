//! `GET /v1/models` and `/v1/models/{name}`.

use axum::extract::{Path, State};
use axum::response::Response;
use serde_json::{Value, json};

use crate::error::ApiError;
use crate::http::body;
use crate::state::ServerState;

/// Every served name.
pub(crate) async fn list(State(state): State<ServerState>) -> Result<Response, ApiError> {
    let cards: Vec<Value> = state.config().served_model_names.iter().map(|name| card(&state, name)).collect();
    body::json(&json!({"object": "list", "data": cards}))
}

/// One served name, which may contain slashes.
pub(crate) async fn one(
    State(state): State<ServerState>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    let name = state.model(Some(&name))?;
    body::json(&card(&state, &name))
}

fn card(state: &ServerState, name: &str) -> Value {
    let root = &state.config().model_root;
    json!({
        "id": name,
        "object": "model",
        "created": state.started(),
        "owned_by": "ctxserve",
        "root": if root.is_empty() { name } else { root },
        "parent": null,
        "max_model_len": state.engine().info().max_model_len,
    })
}
