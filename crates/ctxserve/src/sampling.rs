//! Sampling defaults: what a request that says nothing gets.

use std::path::Path;

use anyhow::{Context, bail};
use ctxserve_core::SamplingParams;
use serde_json::{Map, Value};

use crate::cli::options::Generation;

/// Defaults for requests.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Defaults {
    /// How tokens are picked.
    pub sampling: SamplingParams,
    /// `max_tokens`; `None` is the rest of the context.
    pub max_tokens: Option<usize>,
}

/// Reads the defaults of a model, then the user's.
///
/// # Errors
/// A file that cannot be read, a value out of bounds, an override that does not exist.
pub fn defaults(
    generation: &Generation,
    checkpoint: Option<&Value>,
    overrides: &Map<String, Value>,
    vocab: usize,
) -> anyhow::Result<Defaults> {
    let mut defaults = Defaults::default();
    let file = match generation {
        Generation::Checkpoint => checkpoint.and_then(Value::as_object).cloned(),
        Generation::Neutral => None,
        Generation::Directory(dir) => Some(read(dir)?),
    };
    for (key, value) in file.iter().flatten() {
        // The file has many keys for other programs, and null for "unset".
        if !value.is_null() {
            apply(&mut defaults, key, value).with_context(|| format!("generation_config.json: {key}"))?;
        }
    }
    for (key, value) in overrides {
        let known = apply(&mut defaults, key, value)
            .with_context(|| format!("--override-generation-config: {key}"))?;
        if !known {
            bail!(
                "--override-generation-config: {key:?} is not a sampling default; known are {}",
                KEYS.join(", ")
            );
        }
    }
    defaults.sampling.validate(vocab).context("sampling defaults")?;
    Ok(defaults)
}

const KEYS: [&str; 8] = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "max_new_tokens",
];

/// Sets one default; false when the key is none.
fn apply(defaults: &mut Defaults, key: &str, value: &Value) -> anyhow::Result<bool> {
    let float =
        || value.as_f64().map(|v| v as f32).with_context(|| format!("expected a number, got {value}"));
    let whole = || {
        let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
        number.with_context(|| format!("expected a whole number, got {value}"))
    };
    let sampling = &mut defaults.sampling;
    match key {
        "temperature" => sampling.temperature = float()?,
        "top_p" => sampling.top_p = float()?,
        "top_k" => sampling.top_k = whole()?,
        "min_p" => sampling.min_p = float()?,
        "presence_penalty" => sampling.presence_penalty = float()?,
        "frequency_penalty" => sampling.frequency_penalty = float()?,
        "repetition_penalty" => sampling.repetition_penalty = float()?,
        "max_new_tokens" => defaults.max_tokens = Some(whole()?.max(1) as usize),
        _ => return Ok(false),
    }
    Ok(true)
}

fn read(dir: &Path) -> anyhow::Result<Map<String, Value>> {
    let path = dir.join("generation_config.json");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(checkpoint: &Value, overrides: &Value) -> anyhow::Result<Defaults> {
        let overrides = overrides.as_object().unwrap();
        defaults(&Generation::Checkpoint, Some(checkpoint), overrides, 100)
    }

    #[test]
    fn overrides_win_over_the_checkpoint() {
        let file =
            json!({"temperature": 0.6, "top_k": 20, "eos_token_id": [1], "max_new_tokens": 9, "top_p": null});
        let found = of(&file, &json!({"temperature": 0.9})).unwrap();
        assert_eq!((found.sampling.temperature, found.sampling.top_k), (0.9, 20));
        assert_eq!((found.sampling.top_p, found.max_tokens), (1.0, Some(9)));
        let neutral = defaults(&Generation::Neutral, Some(&file), &Map::new(), 100).unwrap();
        assert_eq!(neutral, Defaults::default());
    }

    #[test]
    fn mistakes_name_the_key() {
        let error = format!("{:#}", of(&json!({}), &json!({"temprature": 1})).unwrap_err());
        assert!(error.contains("temprature") && error.contains("temperature"), "{error}");
        assert!(format!("{:#}", of(&json!({"top_k": -1}), &json!({})).unwrap_err()).contains("top_k"));
        assert!(of(&json!({}), &json!({"top_p": 7})).is_err());
    }

    #[test]
    fn another_directory_may_hold_them() {
        let dir = tempfile::tempdir().unwrap();
        let from = Generation::Directory(dir.path().to_owned());
        assert!(defaults(&from, None, &Map::new(), 100).is_err());
        std::fs::write(dir.path().join("generation_config.json"), "{\"top_p\": 0.5}").unwrap();
        assert_eq!(defaults(&from, None, &Map::new(), 100).unwrap().sampling.top_p, 0.5);
    }
}
