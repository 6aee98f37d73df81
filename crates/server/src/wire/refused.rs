//! Fields that are known and not served: silently ignoring them would change what the client gets, so a value
//! other than the field's default is refused by name.

use std::fmt;

use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

use crate::error::ApiError;

/// Routes differ in a few rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Route {
    Chat,
    Completions,
    Tokenize,
    Responses,
    Messages,
}

/// A value that asks for nothing, and so may be sent. Null always does.
#[derive(Clone, Copy, Debug)]
enum Default {
    /// There is none.
    Never,
    Flag(bool),
    Number(f64),
    Word(&'static str),
    /// An empty list or object.
    Empty,
    /// A list of nothing but "text".
    TextOnly,
}

impl Default {
    fn is(self, value: &Value) -> bool {
        match (self, value) {
            (_, Value::Null) => true,
            (Self::Never, _) => false,
            (Self::Flag(flag), value) => value.as_bool() == Some(flag),
            (Self::Number(number), value) => value.as_f64() == Some(number),
            (Self::Word(word), value) => value == word,
            (Self::Empty, Value::Array(list)) => list.is_empty(),
            (Self::Empty, Value::Object(map)) => map.is_empty(),
            (Self::TextOnly, Value::Array(list)) => list.iter().all(|value| value == "text"),
            (Self::Empty | Self::TextOnly, _) => false,
        }
    }

    fn schema(self) -> Value {
        match self {
            Self::Never => json!({"type": "null"}),
            Self::Flag(flag) => json!({"enum": [flag, null]}),
            Self::Number(number) => json!({"enum": [number, null]}),
            Self::Word(word) => json!({"enum": [word, null]}),
            Self::Empty => json!({"type": ["array", "object", "null"], "maxItems": 0, "maxProperties": 0}),
            Self::TextOnly => json!({"type": ["array", "null"], "items": {"const": "text"}}),
        }
    }
}

/// Field and default, for both generation routes.
const BOTH: &[(&str, Default)] = &[
    ("guided_decoding_backend", Default::Never),
    ("guided_whitespace_pattern", Default::Never),
    ("structural_tag", Default::Never),
    ("grammar", Default::Never),
    ("json_schema", Default::Never),
    ("regex", Default::Never),
    ("use_beam_search", Default::Flag(false)),
    ("length_penalty", Default::Number(1.0)),
    ("early_stopping", Default::Flag(false)),
    ("prompt_logprobs", Default::Never),
    ("allowed_token_ids", Default::Never),
    ("bad_words", Default::Empty),
    ("logits_processors", Default::Empty),
    ("truncate_prompt_tokens", Default::Never),
    ("prompt_embeds", Default::Never),
    ("mm_hashes", Default::Never),
    ("mm_placeholders", Default::Never),
    ("multi_modal_data", Default::Never),
    ("logprob_token_ids", Default::Never),
    ("kv_transfer_params", Default::Empty),
    ("vllm_xargs", Default::Empty),
    ("priority", Default::Number(0.0)),
    ("thinking_token_budget", Default::Never),
    ("repetition_detection", Default::Never),
    ("return_tokens_as_token_ids", Default::Flag(false)),
];

const CHAT: &[(&str, Default)] = &[
    ("audio", Default::Never),
    ("modalities", Default::TextOnly),
    ("prediction", Default::Never),
    ("functions", Default::Empty),
    ("function_call", Default::Word("none")),
    ("web_search_options", Default::Never),
    ("verbosity", Default::Word("medium")),
    ("echo", Default::Flag(false)),
    ("skip_special_tokens", Default::Flag(true)),
    ("documents", Default::Empty),
];

/// No template is rendered there; whoever sends one expects otherwise.
const COMPLETIONS: &[(&str, Default)] = &[
    ("suffix", Default::Word("")),
    ("chat_template", Default::Never),
    ("chat_template_kwargs", Default::Empty),
];

/// What belongs to the other routes would be missed here without a word.
const RESPONSES: &[(&str, Default)] = &[
    ("conversation", Default::Never),
    ("prompt", Default::Never),
    ("context_management", Default::Empty),
    ("messages", Default::Never),
    ("n", Default::Number(1.0)),
    ("best_of", Default::Number(1.0)),
    ("max_tokens", Default::Never),
    ("max_completion_tokens", Default::Never),
    ("response_format", Default::Never),
    ("reasoning_effort", Default::Never),
    ("logprobs", Default::Flag(false)),
    ("return_token_ids", Default::Flag(false)),
    ("skip_special_tokens", Default::Flag(true)),
];

/// Anthropic's services that are not ours.
const MESSAGES: &[(&str, Default)] = &[
    ("container", Default::Never),
    ("mcp_servers", Default::Empty),
    ("thread", Default::Never),
    ("cache_salt", Default::Never),
];

/// What would change the rendered prompt; also refused by `/tokenize`.
const TEMPLATE: &[(&str, Default)] = &[
    ("chat_template", Default::Never),
    ("continue_final_message", Default::Flag(false)),
    ("mm_processor_kwargs", Default::Empty),
    ("media_io_kwargs", Default::Empty),
];

/// Chat always answers in a new turn.
const GENERATION_PROMPT: &[(&str, Default)] = &[("add_generation_prompt", Default::Flag(true))];

impl Route {
    fn rows(self) -> impl Iterator<Item = &'static (&'static str, Default)> {
        let tables: [&'static [(&str, Default)]; 4] = match self {
            Self::Chat => [BOTH, CHAT, TEMPLATE, GENERATION_PROMPT],
            Self::Completions => [BOTH, COMPLETIONS, &[], &[]],
            Self::Tokenize => [TEMPLATE, &[], &[], &[]],
            Self::Responses => [BOTH, RESPONSES, TEMPLATE, GENERATION_PROMPT],
            Self::Messages => [BOTH, MESSAGES, TEMPLATE, &[]],
        };
        tables.into_iter().flatten()
    }

    /// What may be sent in these fields, as JSON Schemas by name.
    pub(crate) fn schemas(self) -> Map<String, Value> {
        self.rows().map(|(name, default)| ((*name).to_owned(), default.schema())).collect()
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
                Some((name, default)) => {
                    // Numbers that no type holds are no defaults either.
                    let text: &RawValue = map.next_value()?;
                    let passes =
                        serde_json::from_str::<Value>(text.get()).is_ok_and(|value| default.is(&value));
                    if found.is_none() && !passes {
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
            ("priority", "-1e999"),
            ("mm_hashes", r#"["a"]"#),
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
