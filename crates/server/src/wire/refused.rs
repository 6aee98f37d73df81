//! Fields that are known and not served: silently ignoring them would change what the client gets, so a value
//! other than the field's default is refused by name.

use std::fmt;

use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

use crate::error::ApiError;

type IsDefault = fn(&Value) -> bool;

/// Routes differ in a few rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    Chat,
    Completions,
    Tokenize,
    Responses,
}

fn never(_: &Value) -> bool {
    false
}

fn off(value: &Value) -> bool {
    value.as_bool() == Some(false)
}

fn on(value: &Value) -> bool {
    value.as_bool() == Some(true)
}

fn empty(value: &Value) -> bool {
    match value {
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        _ => false,
    }
}

fn zero(value: &Value) -> bool {
    value.as_f64() == Some(0.0)
}

fn one(value: &Value) -> bool {
    value.as_f64() == Some(1.0)
}

fn text_only(value: &Value) -> bool {
    value.as_array().is_some_and(|list| list.iter().all(|v| v == "text"))
}

fn medium(value: &Value) -> bool {
    value == "medium"
}

fn no_text(value: &Value) -> bool {
    value == ""
}

/// Field and default, for both generation routes.
const BOTH: &[(&str, IsDefault)] = &[
    ("guided_decoding_backend", never),
    ("guided_whitespace_pattern", never),
    ("structural_tag", never),
    ("grammar", never),
    ("json_schema", never),
    ("regex", never),
    ("use_beam_search", off),
    ("length_penalty", one),
    ("early_stopping", off),
    ("prompt_logprobs", never),
    ("allowed_token_ids", never),
    ("bad_words", empty),
    ("logits_processors", empty),
    ("truncate_prompt_tokens", never),
    ("prompt_embeds", never),
    ("cache_salt", never),
    ("kv_transfer_params", empty),
    ("vllm_xargs", empty),
    ("priority", zero),
    ("thinking_token_budget", never),
    ("repetition_detection", never),
    ("return_tokens_as_token_ids", off),
];

const CHAT: &[(&str, IsDefault)] = &[
    ("audio", never),
    ("modalities", text_only),
    ("prediction", never),
    ("functions", empty),
    ("function_call", |value| value == "none"),
    ("web_search_options", never),
    ("verbosity", medium),
    ("echo", off),
    ("skip_special_tokens", on),
    ("documents", empty),
];

const COMPLETIONS: &[(&str, IsDefault)] = &[("suffix", no_text)];

/// What belongs to the other routes would be missed here without a word.
const RESPONSES: &[(&str, IsDefault)] = &[
    ("conversation", never),
    ("prompt", never),
    ("context_management", empty),
    ("messages", never),
    ("n", one),
    ("best_of", one),
    ("max_tokens", never),
    ("max_completion_tokens", never),
    ("response_format", never),
    ("reasoning_effort", never),
    ("logprobs", off),
    ("return_token_ids", off),
    ("skip_special_tokens", on),
];

/// What would change the rendered prompt; also refused by `/tokenize`.
const TEMPLATE: &[(&str, IsDefault)] = &[
    ("chat_template", never),
    ("continue_final_message", off),
    ("mm_processor_kwargs", empty),
    ("media_io_kwargs", empty),
];

/// Chat always answers in a new turn.
const GENERATION_PROMPT: &[(&str, IsDefault)] = &[("add_generation_prompt", on)];

impl Route {
    fn rows(self) -> impl Iterator<Item = &'static (&'static str, IsDefault)> {
        let tables: [&'static [(&str, IsDefault)]; 4] = match self {
            Self::Chat => [BOTH, CHAT, TEMPLATE, GENERATION_PROMPT],
            Self::Completions => [BOTH, COMPLETIONS, &[], &[]],
            Self::Tokenize => [TEMPLATE, &[], &[], &[]],
            Self::Responses => [BOTH, RESPONSES, TEMPLATE, GENERATION_PROMPT],
        };
        tables.into_iter().flatten()
    }
}

/// Checks a body that has already been read once, so its JSON is sound.
///
/// # Errors
/// 400 naming the first refused field.
pub(crate) fn check(route: Route, body: &str) -> Result<(), ApiError> {
    let mut deserializer = serde_json::Deserializer::from_str(body);
    let found = deserializer
        .deserialize_map(Scan { route })
        .map_err(|error| ApiError::malformed(format!("The request body is not valid JSON: {error}")))?;
    found.map_or(Ok(()), |name| {
        Err(ApiError::unsupported(name, format!("'{name}' is not supported by this server; leave it out.")))
    })
}

struct Scan {
    route: Route,
}

impl<'de> Visitor<'de> for Scan {
    type Value = Option<&'static str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = None;
        while let Some(key) = map.next_key::<String>()? {
            match self.route.rows().find(|(name, _)| *name == key) {
                Some((name, is_default)) => {
                    let value: Value = map.next_value()?;
                    if found.is_none() && !value.is_null() && !is_default(&value) {
                        found = Some(*name);
                    }
                }
                None => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// OAI-11: defaults pass.
    #[test]
    fn defaults_and_nulls_pass() {
        let body = r#"{"response_format":{"type":"json_object"},"modalities":["text"],"priority":0,"suffix":1,
            "guided_whitespace_pattern":null,"use_beam_search":false,"length_penalty":1.0,"verbosity":"medium","functions":[]}"#;
        assert_eq!(check(Route::Chat, body), Ok(()));
        assert_eq!(check(Route::Completions, r#"{"suffix":"","audio":{}}"#), Ok(()));
    }

    /// OAI-11.
    #[test]
    fn anything_else_is_refused_by_name() {
        let chat = [
            ("guided_whitespace_pattern", r#"" ""#),
            ("structural_tag", "{}"),
            ("audio", "{}"),
            ("modalities", r#"["audio"]"#),
            ("chat_template", r#""""#),
            ("priority", "1"),
            ("cache_salt", r#""a""#),
            ("function_call", r#""auto""#),
            ("echo", "true"),
            ("skip_special_tokens", "false"),
        ];
        for (field, value) in chat {
            let error = check(Route::Chat, &format!(r#"{{"{field}":{value}}}"#)).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(field));
        }
        assert!(check(Route::Completions, r#"{"suffix":"x"}"#).is_err());
        assert!(check(Route::Tokenize, r#"{"chat_template":"x"}"#).is_err());
        assert_eq!(check(Route::Tokenize, r#"{"add_generation_prompt":false}"#), Ok(()));
    }
}
