//! What happens around every route: a name for the request, the key check, a count of the response.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::error::{ApiError, ErrorCode};
use crate::state::ServerState;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Anthropic's name for the same, sent on its routes.
const ANTHROPIC_REQUEST_ID: HeaderName = HeaderName::from_static("request-id");
const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
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

/// Names the request, checks its key, counts its response.
pub(crate) async fn guard(State(state): State<ServerState>, mut request: Request, next: Next) -> Response {
    let http_id = client_id(request.headers()).unwrap_or_else(|| state.random_name("req-"));
    // The pattern that matched, never the client's path.
    let route = request.extensions().get::<MatchedPath>().cloned();
    let is_anthropic = is_anthropic(request.uri().path());
    let mut response = match check_key(&state, &request) {
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

/// The index of the key that the request shows.
fn check_key(state: &ServerState, request: &Request) -> Result<Option<usize>, ApiError> {
    let config = state.config();
    if config.api_keys.is_empty()
        || is_open(request.uri().path(), request.method(), config.metrics_without_key)
    {
        return Ok(None);
    }
    let keys = presented(request.headers());
    if keys.iter().all(Option::is_none) {
        return Err(ApiError::unauthorized(
            "This server needs an API key: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
        ));
    }
    // Every key is compared, so that the time does not tell which one is close.
    let tenant = |key: &[u8]| {
        config.api_keys.iter().enumerate().fold(None, |found: Option<usize>, (index, known)| {
            let is_same = !key.is_empty() & same(known.as_bytes(), key);
            found.or(is_same.then_some(index))
        })
    };
    let found =
        keys.into_iter().flatten().map(tenant).fold(None, |found: Option<usize>, tenant| found.or(tenant));
    found.map(Some).ok_or_else(|| ApiError::unauthorized("The API key is not valid."))
}

/// The keys that a request shows, where OpenAI's clients put them and where Anthropic's do. A scheme other than Bearer
/// shows an empty key, which is none of ours.
fn presented(headers: &HeaderMap) -> [Option<&[u8]>; 2] {
    let authorization = headers.get(AUTHORIZATION).map(HeaderValue::as_bytes).map(|header| {
        let (scheme, key) = header.split_at(header.len().min(7));
        if scheme.eq_ignore_ascii_case(b"bearer ") { key.trim_ascii() } else { b"" }
    });
    [authorization, headers.get(API_KEY).map(|value| value.as_bytes().trim_ascii())]
}

fn is_open(path: &str, method: &Method, metrics: bool) -> bool {
    let probe = matches!(path, "/health" | "/ping") || (metrics && path == "/metrics");
    probe && (method == Method::GET || method == Method::HEAD)
}

/// Equality in time that depends on the lengths alone.
fn same(a: &[u8], b: &[u8]) -> bool {
    let difference = a.iter().zip(b).fold(0, |sum, (x, y)| std::hint::black_box(sum | (x ^ y)));
    a.len() == b.len() && difference == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_compare_whole() {
        assert!(same(b"secret", b"secret"));
        for other in [&b"secreu"[..], b"secre", b"secret1", b""] {
            assert!(!same(b"secret", other));
        }
    }

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
