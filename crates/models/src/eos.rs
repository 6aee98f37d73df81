//! End-of-turn ids, which files state in several places and shapes.

use std::collections::BTreeSet;

use ctxserve_core::TokenId;
use serde_json::Value;

use crate::ConfigError;

/// The union of `eos_token_id` over all files: each a number, a list of numbers, or absent. Ids outside the
/// vocabulary cannot be sampled and are left out.
pub(crate) fn read<'a>(
    files: impl IntoIterator<Item = &'a Value>,
    vocab: usize,
) -> Result<Vec<TokenId>, ConfigError> {
    let mut ids = BTreeSet::new();
    for file in files {
        let stated = match file.get("eos_token_id") {
            None | Some(Value::Null) => continue,
            Some(Value::Array(list)) => list.as_slice(),
            Some(one) => std::slice::from_ref(one),
        };
        for id in stated {
            let Some(id) = id.as_u64() else {
                return Err(ConfigError::new("eos_token_id", "must be a token id or a list of them"));
            };
            if (id as u128) < vocab as u128 {
                ids.insert(id as TokenId);
            }
        }
    }
    Ok(ids.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn lists_and_numbers_are_united() {
        let files = [json!({"eos_token_id": [7, 3, 900]}), json!({"eos_token_id": 5}), json!({})];
        assert_eq!(read(&files, 100), Ok(vec![3, 5, 7]));
    }

    #[test]
    fn other_kinds_are_refused() {
        for bad in [json!("</s>"), json!(-1), json!(1.5), json!([1, "x"])] {
            let error = read([&json!({ "eos_token_id": bad })], 100).unwrap_err();
            assert_eq!(error.field, "eos_token_id");
        }
    }
}
