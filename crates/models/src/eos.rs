//! End-of-turn ids, which files state in several places and shapes.

use std::collections::BTreeSet;

use ctxserve_checkpoint::Checkpoint;
use ctxserve_core::TokenId;
use serde_json::Value;

use crate::{ConfigError, LoadError};

/// The union of `eos_token_id` over both configuration files. Ids outside the vocabulary cannot be sampled and are
/// left out.
pub(crate) fn read(checkpoint: &Checkpoint, vocab: usize) -> Result<Vec<TokenId>, LoadError> {
    let mut ids = BTreeSet::new();
    let generation = checkpoint.generation_config().map(|value| ("generation_config.json", value));
    for (file, value) in generation.into_iter().chain([("config.json", checkpoint.config())]) {
        ids.extend(stated(value, vocab).map_err(|error| LoadError::Config { file, error })?);
    }
    Ok(ids.into_iter().collect())
}

/// What one file says: a number, a list of numbers, or nothing.
fn stated(file: &Value, vocab: usize) -> Result<Vec<TokenId>, ConfigError> {
    let list = match file.get("eos_token_id") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(list)) => list.as_slice(),
        Some(one) => std::slice::from_ref(one),
    };
    let id = |value: &Value| {
        let what = "must be a token id or a list of them";
        value.as_u64().ok_or_else(|| ConfigError::new("eos_token_id", what))
    };
    let ids = list.iter().map(id).collect::<Result<Vec<u64>, _>>()?;
    Ok(ids
        .into_iter()
        .filter_map(|id| TokenId::try_from(id).ok())
        .filter(|&id| (id as usize) < vocab)
        .collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn numbers_and_lists_are_read() {
        let cases = [
            (json!({ "eos_token_id": [7, 3, 900, 1_u64 << 40] }), vec![7, 3]),
            (json!({ "eos_token_id": 5 }), vec![5]),
            (json!({ "eos_token_id": null }), vec![]),
            (json!({}), vec![]),
        ];
        for (file, expected) in cases {
            assert_eq!(stated(&file, 100), Ok(expected), "{file}");
        }
    }

    #[test]
    fn other_kinds_are_refused() {
        for bad in [json!("</s>"), json!(-1), json!(1.5), json!([1, "x"])] {
            let error = stated(&json!({ "eos_token_id": bad }), 100).unwrap_err();
            assert_eq!(error.field, "eos_token_id");
        }
    }
}
