//! One error type for every route, and the one function from it to HTTP.

use std::sync::Arc;
use std::time::Duration;

use axum::http::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use ctxserve_chat::RenderError;
use ctxserve_core::ParamError;
use ctxserve_engine::SubmitError;
use schemars::JsonSchema;
use serde::Serialize;

use crate::wire::schema;

/// An answer that is not a success. Serialised as `{"error":{message,type,param,code}}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status, never 2xx.
    pub status: StatusCode,
    /// `type` of the envelope.
    pub kind: &'static str,
    /// The field at fault, as the client spelled it.
    pub param: Option<String>,
    /// A stable name that programs may match.
    pub code: Option<&'static str>,
    /// For people.
    pub message: String,
    /// `Retry-After`.
    pub retry_after: Option<Duration>,
}

/// Every answer that is not a success.
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "Error")]
pub(crate) struct Envelope<'a> {
    error: Body<'a>,
}

#[derive(Serialize, JsonSchema)]
#[schemars(rename = "ErrorBody")]
struct Body<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    /// The field at fault.
    param: Option<&'a str>,
    /// A stable name that programs may match.
    code: Option<&'static str>,
}

/// Every answer of Anthropic's API that is not a success.
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "MessagesError")]
pub(crate) struct AnthropicEnvelope<'a> {
    #[serde(rename = "type")]
    #[schemars(extend("const" = "error"))]
    kind: &'static str,
    error: AnthropicBody,
    request_id: &'a str,
}

#[derive(Serialize, JsonSchema)]
#[schemars(rename = "MessagesErrorBody", transform = schema::absent_not_null)]
struct AnthropicBody {
    #[serde(rename = "type")]
    kind: &'static str,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<AnthropicDetails>,
}

/// What a client does about the error: without a conversation kept here, the SDK's tool runner sends it whole.
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "MessagesErrorDetails")]
struct AnthropicDetails {
    error_code: &'static str,
}

const UNSUPPORTED: &str = "unsupported_parameter";
const INVALID: &str = "invalid_request_error";
const SERVER: &str = "server_error";

impl ApiError {
    fn new(
        status: StatusCode,
        kind: &'static str,
        code: Option<&'static str>,
        message: impl Into<String>,
    ) -> Self {
        Self { status, kind, param: None, code, message: message.into(), retry_after: None }
    }

    /// 400 on a field. `param` is the OpenAI name or a path below it (`messages[0].content`).
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, INVALID, Some("invalid_value"), message);
        Self { param: Some(param.into()), ..error }
    }

    /// 400 on a field that is known and not implemented.
    pub fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: Some(UNSUPPORTED), ..Self::invalid(param, message) }
    }

    /// 400 on a body that is not JSON of the right shape.
    pub fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, Some("invalid_json"), message)
    }

    /// 400 for a prompt that leaves no room for an answer. Clients match the message's beginning.
    pub fn context_length(prompt: usize, max: usize, param: &str) -> Self {
        let message = format!(
            "This model's maximum context length is {max} tokens. However, your {param} resulted in {prompt} \
             tokens, which leaves no room for an answer. Please reduce the length of the {param}."
        );
        Self { code: Some("context_length_exceeded"), ..Self::invalid(param, message) }
    }

    /// 401.
    pub fn unauthorized(message: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, INVALID, Some("invalid_api_key"), message)
    }

    /// 403 for where a request comes from.
    pub fn forbidden(code: &'static str, message: &str) -> Self {
        Self::new(StatusCode::FORBIDDEN, INVALID, Some(code), message)
    }

    /// 404 for a model name that is not served. The name is cut, it comes from the client.
    pub fn unknown_model(name: &str) -> Self {
        let shown: String = name.chars().take(128).collect();
        let message = format!("The model `{shown}` does not exist.");
        let error = Self::new(StatusCode::NOT_FOUND, INVALID, Some("model_not_found"), message);
        Self { param: Some("model".to_owned()), ..error }
    }

    /// 404 for something that the client named in a field or, with no `param`, in the path.
    pub fn not_found(param: Option<&str>, code: &'static str, message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::NOT_FOUND, INVALID, Some(code), message);
        Self { param: param.map(str::to_owned), ..error }
    }

    /// 400 for a path of the API that this server does not have.
    pub fn unsupported_path(message: &str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, INVALID, Some("unsupported_path"), message)
    }

    /// 404 for a path.
    pub fn unknown_path() -> Self {
        Self::new(StatusCode::NOT_FOUND, INVALID, Some("unknown_url"), "There is nothing at this path.")
    }

    /// 405.
    pub fn method_not_allowed() -> Self {
        let message = "This path does not take this HTTP method.";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, INVALID, Some("method_not_allowed"), message)
    }

    /// 408 for a body that does not arrive.
    pub fn body_timeout() -> Self {
        let message = "The request body did not arrive in time.";
        Self::new(StatusCode::REQUEST_TIMEOUT, INVALID, Some("request_timeout"), message)
    }

    /// 413.
    pub fn body_too_large(limit: usize) -> Self {
        let message = format!("The request body is larger than {limit} bytes.");
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, Some("request_too_large"), message)
    }

    /// 400 for a body whose nesting no reader should follow.
    pub fn too_deep(limit: usize) -> Self {
        Self::malformed(format!("The request body is nested more than {limit} levels deep."))
    }

    /// 503 for an answer that takes too long. Trying again would take as long.
    pub fn answer_timeout(limit: Duration) -> Self {
        let message = format!("The answer was not complete within {} seconds.", limit.as_secs_f64());
        Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, Some("request_timeout"), message)
    }

    /// 415.
    pub fn media_type() -> Self {
        let message = "Content-Type must be application/json.";
        Self::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, INVALID, Some("unsupported_media_type"), message)
    }

    /// 500.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, SERVER, Some("internal_error"), message)
    }

    /// 503: draining, or ended by shutdown.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, Some("service_unavailable"), message)
    }

    /// 503: the device failed and the process is about to exit.
    pub fn fault(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, SERVER, Some("engine_fault"), message)
    }

    /// The JSON envelope, for a response body or an SSE frame.
    pub fn to_json(&self) -> String {
        let error =
            Body { message: &self.message, kind: self.kind, param: self.param.as_deref(), code: self.code };
        serde_json::to_string(&Envelope { error }).unwrap_or_default()
    }
}

impl ApiError {
    /// Anthropic's envelope, for `/v1/messages` and what is below it. Its errors have no field for the part of the request
    /// that is at fault, so the message names it.
    pub(crate) fn to_anthropic(&self, request_id: &str) -> String {
        let is_named =
            |param: &&str| self.message.contains(param) || self.code == Some("context_length_exceeded");
        let param = self.param.as_deref().filter(|param| !is_named(param));
        let message =
            param.map_or_else(|| self.message.clone(), |param| format!("{param}: {}", self.message));
        let threaded = self.code == Some(UNSUPPORTED) && self.param.as_deref() == Some("thread");
        let details = threaded.then_some(AnthropicDetails { error_code: "thread_unsupported_request" });
        let error = AnthropicBody { kind: self.anthropic_kind(), message, details };
        let envelope = AnthropicEnvelope { kind: "error", error, request_id };
        serde_json::to_string(&envelope).unwrap_or_default()
    }

    fn anthropic_kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            503 if self.code != Some("engine_fault") => "overloaded_error",
            500.. => "api_error",
            _ => "invalid_request_error",
        }
    }
}

/// The `code` of an error response, for the log.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ErrorCode(pub(crate) &'static str);

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let content_type = [(axum::http::header::CONTENT_TYPE, "application/json")];
        let mut response = (self.status, content_type, self.to_json()).into_response();
        response.extensions_mut().insert(ErrorCode(self.code.unwrap_or("none")));
        if let Some(after) = self.retry_after {
            let seconds = after.as_secs().max(1);
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response.extensions_mut().insert(Arc::new(self));
        response
    }
}

impl From<ParamError> for ApiError {
    fn from(error: ParamError) -> Self {
        Self::invalid(error.param, error.message)
    }
}

impl From<RenderError> for ApiError {
    fn from(error: RenderError) -> Self {
        let at = error.message.map_or_else(|| "messages".to_owned(), |index| format!("messages[{index}]"));
        Self::invalid(at, error.to_string())
    }
}

/// What a refused submission means to the client. `param` names the field that holds the prompt, `many` the one that made
/// so many sequences.
pub(crate) fn from_submit(error: SubmitError, param: &str, many: &str) -> ApiError {
    match error {
        SubmitError::QueueFull { retry_after, .. } => {
            let message = error.to_string();
            let kind = "rate_limit_error";
            let base =
                ApiError::new(StatusCode::TOO_MANY_REQUESTS, kind, Some("rate_limit_exceeded"), message);
            ApiError { retry_after: Some(retry_after), ..base }
        }
        SubmitError::TooMany { .. } => ApiError::invalid(many, error.to_string()),
        SubmitError::TooLong { prompt, max } => ApiError::context_length(prompt, max, param),
        SubmitError::Draining => ApiError::unavailable("The server is shutting down."),
        SubmitError::Faulted(message) => ApiError::fault(message),
        SubmitError::Empty => ApiError::invalid(param, "the prompt is empty"),
        SubmitError::TokenOutOfRange { .. } => ApiError::invalid(param, error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn envelope_has_all_four_fields() {
        let value: serde_json::Value = serde_json::from_str(&ApiError::unknown_path().to_json()).unwrap();
        let error = value["error"].as_object().unwrap();
        let keys: Vec<_> = error.keys().map(String::as_str).collect();
        assert_eq!(keys, ["message", "type", "param", "code"]);
        assert!(error["param"].is_null());
    }

    #[test]
    fn retry_after_is_whole_seconds_and_never_zero() {
        let error =
            ApiError { retry_after: Some(Duration::from_millis(20)), ..ApiError::unavailable("busy") };
        assert_eq!(error.into_response().headers()[RETRY_AFTER], "1");
    }

    #[test]
    fn context_error_starts_as_clients_expect() {
        let error = ApiError::context_length(10, 8, "messages");
        assert!(error.message.starts_with("This model's maximum context length is 8 tokens."));
        assert_eq!(error.code, Some("context_length_exceeded"));
    }
}
