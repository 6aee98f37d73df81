//! Bytes to typed requests, with errors that name the field.

use serde::de::DeserializeOwned;
use serde_json::error::Category;

use crate::error::ApiError;

/// Fields whose elements clients tell apart: errors name the whole path below them.
const NESTED: [&str; 5] = ["input", "messages", "reasoning", "text", "tools"];

/// Checks that a body is text. Everything below reads the result, several times if it likes.
pub(crate) fn text(body: &[u8]) -> Result<&str, ApiError> {
    if body.iter().all(u8::is_ascii_whitespace) {
        return Err(ApiError::malformed("The request body is empty; it must be a JSON object."));
    }
    std::str::from_utf8(body)
        .map_err(|error| ApiError::malformed(format!("The request body is not UTF-8: {error}")))
}

/// Reads the fields of `T` from a JSON object; fields that `T` lacks are skipped.
pub(crate) fn json<T: DeserializeOwned>(body: &str) -> Result<T, ApiError> {
    if !body.trim_ascii_start().starts_with('{') {
        return Err(ApiError::malformed("The request body must be a JSON object."));
    }
    let mut deserializer = serde_json::Deserializer::from_str(body);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        explain(&path, error.inner())
    })?;
    deserializer.end().map_err(|error| explain(".", &error))?;
    Ok(value)
}

fn explain(path: &str, error: &serde_json::Error) -> ApiError {
    let message = error.to_string();
    if path == "." || path.is_empty() || error.classify() != Category::Data && !is_number(error) {
        return ApiError::malformed(format!("The request body is not valid JSON: {message}"));
    }
    let field = path.split(['.', '[']).next().unwrap_or(path);
    let param = if NESTED.contains(&field) { path } else { field };
    ApiError::invalid(param, format!("Invalid value for '{path}': {message}"))
}

/// `1e999` is well-formed JSON that no number type holds: the field is at fault, not the syntax.
fn is_number(error: &serde_json::Error) -> bool {
    error.to_string().starts_with("number out of range")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    struct Probe {
        top_p: Option<f32>,
        #[expect(dead_code, reason = "read for its errors only")]
        stop: Option<Vec<String>>,
        #[expect(dead_code, reason = "read for its errors only")]
        messages: Option<Vec<Inner>>,
    }

    #[derive(Debug, Deserialize)]
    struct Inner {
        #[expect(dead_code, reason = "read for its errors only")]
        role: Option<String>,
    }

    #[test]
    fn errors_name_the_field() {
        let cases = [
            (r#"{"top_p":"x"}"#, Some("top_p")),
            (r#"{"top_p":1e999}"#, Some("top_p")),
            (r#"{"stop":[1]}"#, Some("stop")),
            (r#"{"messages":[{"role":7}]}"#, Some("messages[0].role")),
            (r#"{"top_p":1"#, None),
            (r#"{"top_p":1} x"#, None),
            ("[1]", None),
            ("", None),
        ];
        for (body, param) in cases {
            let error = json::<Probe>(body).unwrap_err();
            assert_eq!(error.param.as_deref(), param, "{body}");
            assert_eq!(error.status, 400, "{body}");
        }
    }

    /// OAI-10.
    #[test]
    fn unknown_fields_of_any_depth_are_skipped() {
        let deep = format!(r#"{{"top_p":0.5,"x":{}{}}}"#, "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(json::<Probe>(&deep).unwrap().top_p, Some(0.5));
    }

    #[test]
    fn bytes_that_are_no_text_are_malformed() {
        assert_eq!(text(b"{\"a\":\"\xff\"}").unwrap_err().code, Some("invalid_json"));
        assert_eq!(text(b" \n").unwrap_err().code, Some("invalid_json"));
    }
}
