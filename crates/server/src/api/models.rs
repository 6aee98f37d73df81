//! `GET /v1/models` and `/v1/models/{name}`.

use axum::extract::{Path, State};
use axum::response::Response;

use crate::error::ApiError;
use crate::http::body;
use crate::state::ServerState;
use crate::wire::service::{ModelCard, ModelList};

/// Every served name.
pub(crate) async fn list(State(state): State<ServerState>) -> Result<Response, ApiError> {
    let names = state.config().served_model_names.iter();
    body::json(&ModelList { object: "list", data: names.map(|name| card(&state, name)).collect() })
}

/// One served name, which may contain slashes.
pub(crate) async fn one(
    State(state): State<ServerState>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    let name = state.model(Some(&name))?;
    body::json(&card(&state, &name))
}

fn card<'a>(state: &'a ServerState, name: &'a str) -> ModelCard<'a> {
    let root = state.config().model_root.as_str();
    ModelCard {
        id: name,
        object: "model",
        created: state.started(),
        owned_by: "ctxserve",
        root: if root.is_empty() { name } else { root },
        parent: None,
        max_model_len: state.engine().info().max_model_len,
    }
}
