//! What happens around every route: a name for the request, the check of origin and key, a count of the response.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::keys::Presented;
use super::origin::Loopback;
use crate::error::{ApiError, ErrorCode};
use crate::state::ServerState;

pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Anthropic's name for the same, sent on its routes.
const ANTHROPIC_REQUEST_ID: HeaderName = HeaderName::from_static("request-id");
const MAX_REQUEST_ID: usize = 128;

/// Whose request it is: the number of the key, none where the server has no keys. What is kept for one tenant is used for no
/// other.
pub(crate) type Tenant = Option<usize>;

/// A request as the routes see it.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    /// The client's `X-Request-Id`, or ours. For headers and logs only: nothing is looked up by it.
    pub(crate) http_id: String,
    pub(crate) arrived: Instant,
    /// Which of the API keys it showed; `None` where the server has none.
    pub(crate) tenant: Tenant,
}

/// Names the request, checks where it is from and its key, counts its response.
pub(crate) async fn guard(State(state): State<ServerState>, mut request: Request, next: Next) -> Response {
    let http_id = client_id(request.headers()).unwrap_or_else(|| state.random_name("req-"));
    // The pattern that matched, never the client's path.
    let route = request.extensions().get::<MatchedPath>().cloned();
    let is_anthropic = is_anthropic(request.uri().path());
    let mut response = match admit(&state, &request) {
        Ok(tenant) => {
            let caller = Caller { http_id: http_id.clone(), arrived: Instant::now(), tenant };
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => error.into_response(),
    };
    let status = response.status().as_u16();
    state.metrics().response(status);
    if let Some(ErrorCode(code)) = response.extensions().get() {
        let route = route.as_ref().map_or("other", MatchedPath::as_str);
        tracing::info!(http_id, route, status, code, "refused");
    }
    if let Ok(value) = HeaderValue::from_str(&http_id) {
        if is_anthropic {
            response.headers_mut().insert(ANTHROPIC_REQUEST_ID, value.clone());
        }
        response.headers_mut().insert(REQUEST_ID, value);
    }
    if is_anthropic && let Some(error) = response.extensions().get::<Arc<ApiError>>() {
        *response.body_mut() = Body::from(error.to_anthropic(&http_id));
    }
    response
}

/// Whether errors have Anthropic's envelope.
fn is_anthropic(path: &str) -> bool {
    path.strip_prefix("/v1/messages").is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The client's name for the request, without what has no business in a header or a log line.
fn client_id(headers: &HeaderMap) -> Option<String> {
    let given = headers.get(REQUEST_ID)?.to_str().ok()?;
    let safe = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | ':');
    let id: String = given.chars().filter(safe).take(MAX_REQUEST_ID).collect();
    (!id.is_empty()).then_some(id)
}

/// Whether a request may come in: where it is from, then whose it is, by the index of the key that it shows. Probes may always.
fn admit(state: &ServerState, request: &Request) -> Result<Option<usize>, ApiError> {
    let config = state.config();
    if is_open(request.uri().path(), request.method(), config.metrics_without_key) {
        return Ok(None);
    }
    let loopback = request.extensions().get::<Loopback>().is_some();
    config.browsers.admit(request.headers(), loopback)?;
    if config.api_keys.is_empty() {
        return Ok(None);
    }
    match config.api_keys.of(request.headers()) {
        Presented::Known(tenant) => Ok(Some(tenant)),
        Presented::Unknown => Err(ApiError::unauthorized("The API key is not valid.")),
        Presented::Absent => Err(ApiError::unauthorized(
            "This server needs an API key: send 'Authorization: Bearer KEY' or 'X-Api-Key: KEY'.",
        )),
    }
}

fn is_open(path: &str, method: &Method, metrics: bool) -> bool {
    let probe = matches!(path, "/health" | "/ping") || (metrics && path == "/metrics");
    probe && (method == Method::GET || method == Method::HEAD)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_are_sanitised() {
        let id = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, HeaderValue::from_static(text));
            client_id(&headers)
        };
        assert_eq!(id("abc-1").as_deref(), Some("abc-1"));
        assert_eq!(id("a b\"c{}").as_deref(), Some("abc"));
        assert_eq!(id("\" \""), None);
        assert_eq!(
            id(&*Box::leak("x".repeat(500).into_boxed_str())).map(|id| id.len()),
            Some(MAX_REQUEST_ID)
        );
    }

    #[test]
    fn only_probes_are_open() {
        assert!(is_open("/health", &Method::GET, false));
        assert!(!is_open("/health", &Method::POST, false));
        assert!(!is_open("/metrics", &Method::GET, false));
        assert!(is_open("/metrics", &Method::GET, true));
        assert!(!is_open("/v1/models", &Method::GET, true));
    }
}
