//! Paths.

use axum::Router;
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use serde_json::Value;
use tower_http::catch_panic::CatchPanicLayer;

use crate::api::responses::stored;
use crate::api::{chat, completions, health, messages, models, responses, tokenize};
use crate::error::ApiError;
use crate::http::guard::guard;
use crate::openapi::{self, Schemas, responses as document};
use crate::state::ServerState;

/// A path, its handlers, and what `/openapi.json` says of it.
pub(crate) type Route = (&'static str, MethodRouter<ServerState>, fn(&mut Schemas) -> Value);

/// Every route there is.
pub(crate) fn routes() -> Vec<Route> {
    vec![
        ("/v1/chat/completions", post(chat::chat), openapi::chat),
        ("/v1/completions", post(completions::completions), openapi::completions),
        ("/v1/responses", post(responses::create), document::create),
        ("/v1/responses/{id}", get(stored::retrieve).delete(stored::delete), document::stored),
        ("/v1/responses/{id}/cancel", post(stored::cancel), document::cancel),
        ("/v1/responses/{id}/input_items", get(stored::input_items), document::input_items),
        ("/v1/responses/input_tokens", post(responses::input_tokens), document::input_tokens),
        ("/v1/responses/compact", post(responses::compact), document::compact),
        ("/v1/messages", post(messages::messages), openapi::messages::create),
        ("/v1/messages/count_tokens", post(messages::count_tokens), openapi::messages::count_tokens),
        ("/v1/models", get(models::list), openapi::models),
        ("/v1/models/{*name}", get(models::one), openapi::model),
        ("/tokenize", post(tokenize::tokenize), openapi::tokenize),
        ("/detokenize", post(tokenize::detokenize), openapi::detokenize),
        ("/health", get(health::health), openapi::health),
        ("/ping", get(health::health).post(health::health), openapi::ping),
        ("/version", get(health::version), openapi::version),
        ("/load", get(health::load), openapi::load),
        ("/metrics", get(health::metrics), openapi::metrics),
        ("/reset_prefix_cache", post(health::reset_prefix_cache), openapi::reset_prefix_cache),
        ("/openapi.json", get(health::document), openapi::this),
    ]
}

/// The service. Anything but its routes is 404, a wrong method 405, a panic 500 for that request alone.
pub fn router(state: ServerState) -> Router {
    // Settings that make no layer were refused when the state was made.
    let cors = state.config().browsers.layer().ok().flatten();
    let service = service(state);
    match cors {
        Some(cors) => service.layer(cors),
        None => service,
    }
}

fn service(state: ServerState) -> Router {
    let routes = routes().into_iter();
    routes
        .fold(Router::new(), |router, (path, methods, _)| router.route(path, methods))
        .fallback(async || ApiError::unknown_path())
        .method_not_allowed_fallback(async || ApiError::method_not_allowed())
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn_with_state(state.clone(), guard))
        .with_state(state)
}

fn panicked(_: Box<dyn std::any::Any + Send>) -> Response {
    ApiError::internal("The server failed on this request.").into_response()
}
