//! Request fields that chat and completions share.

use std::collections::BTreeMap;
use std::fmt;

use ctxserve_core::limits;
use schemars::JsonSchema;
use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde_json::Value;

use super::schema;

/// Sampling, stopping and output options. `null` and absent are the same.
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub(crate) struct GenerationFields {
    #[schemars(default, schema_with = "schema::model")]
    pub(crate) model: Option<String>,
    pub(crate) stream: Option<bool>,
    /// Only with `stream`.
    pub(crate) stream_options: Option<StreamOptions>,
    #[schemars(range(min = 1, max = limits::MAX_N))]
    pub(crate) n: Option<u64>,
    /// As `n`.
    #[schemars(range(min = 1, max = limits::MAX_N))]
    pub(crate) best_of: Option<u64>,
    #[schemars(range(min = 0, max = limits::MAX_TEMPERATURE))]
    pub(crate) temperature: Option<f32>,
    #[schemars(range(max = 1), extend("exclusiveMinimum" = 0))]
    pub(crate) top_p: Option<f32>,
    /// -1 and 0 mean all.
    #[schemars(range(min = -1))]
    pub(crate) top_k: Option<i64>,
    #[schemars(range(min = 0, max = 1))]
    pub(crate) min_p: Option<f32>,
    #[schemars(range(min = -2, max = 2))]
    pub(crate) presence_penalty: Option<f32>,
    #[schemars(range(min = -2, max = 2))]
    pub(crate) frequency_penalty: Option<f32>,
    #[schemars(range(max = 10), extend("exclusiveMinimum" = 0))]
    pub(crate) repetition_penalty: Option<f32>,
    /// Token ids to what is added to their logits.
    #[schemars(default, schema_with = "schema::logit_bias")]
    pub(crate) logit_bias: Option<BTreeMap<String, f32>>,
    pub(crate) seed: Option<i64>,
    #[schemars(default, schema_with = "schema::stop")]
    pub(crate) stop: Option<StopField>,
    #[schemars(default, schema_with = "schema::stop_token_ids")]
    pub(crate) stop_token_ids: Option<Vec<u32>>,
    pub(crate) include_stop_str_in_output: Option<bool>,
    pub(crate) ignore_eos: Option<bool>,
    /// Cut to what the context holds.
    #[schemars(range(min = 1))]
    pub(crate) max_tokens: Option<u64>,
    /// At most `max_tokens`.
    pub(crate) min_tokens: Option<u64>,
    pub(crate) skip_special_tokens: Option<bool>,
    pub(crate) return_token_ids: Option<bool>,
    /// Prompts of different salts share nothing that was computed.
    #[schemars(extend("pattern" = "^[A-Za-z0-9_.:-]{1,128}$"))]
    pub(crate) cache_salt: Option<String>,
    #[schemars(default, schema_with = "schema::response_format")]
    pub(crate) response_format: Option<Value>,
    #[schemars(default, schema_with = "schema::structured_outputs")]
    pub(crate) structured_outputs: Option<Value>,
    #[schemars(default, schema_with = "schema::guided_json")]
    pub(crate) guided_json: Option<Value>,
    #[schemars(default, schema_with = "schema::text")]
    pub(crate) guided_regex: Option<Value>,
    #[schemars(default, schema_with = "schema::choice")]
    pub(crate) guided_choice: Option<Value>,
    #[schemars(default, schema_with = "schema::text")]
    pub(crate) guided_grammar: Option<Value>,
}

/// `stream_options`.
#[derive(Debug, Default, Deserialize, JsonSchema)]
pub(crate) struct StreamOptions {
    pub(crate) include_usage: Option<bool>,
    pub(crate) continuous_usage_stats: Option<bool>,
}

/// `stop`: one string or a list.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct StopField(pub(crate) Vec<String>);

impl<'de> Deserialize<'de> for StopField {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct StopVisitor;
        impl<'de> Visitor<'de> for StopVisitor {
            type Value = StopField;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<StopField, E> {
                Ok(StopField(vec![text.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<StopField, A::Error> {
                let mut strings = Vec::new();
                while let Some(text) = list.next_element()? {
                    strings.push(text);
                }
                Ok(StopField(strings))
            }
        }
        deserializer.deserialize_any(StopVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stop_is_a_string_or_a_list() {
        let read = |text| serde_json::from_str::<StopField>(text);
        assert_eq!(read("\"a\"").unwrap().0, ["a"]);
        assert_eq!(read("[\"a\",\"b\"]").unwrap().0, ["a", "b"]);
        assert!(read("3").is_err());
        assert!(read("[null]").is_err());
    }
}
