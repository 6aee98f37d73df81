//! The small configuration files, which are as untrusted as the weights.

use std::path::Path;

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{CheckpointError, clipped};
use crate::source::Source;

/// Most bytes of `config.json` and its like; real ones have a few kilobytes.
pub(crate) const MAX_CONFIG: u64 = 4 << 20;
/// Most bytes of a shard index; that of a model with 100,000 tensors has about 10 MB.
pub(crate) const MAX_INDEX: u64 = 64 << 20;
/// Most bytes of `tokenizer.json`; gpt-oss has 28 MB.
pub(crate) const MAX_TOKENIZER: u64 = 128 << 20;

/// Reads a whole file of at most `limit` bytes; `None` when there is none.
pub(crate) fn read_small(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, CheckpointError> {
    let file = || path.display().to_string();
    let io = |source| CheckpointError::Io { file: file(), source };
    let source = match Source::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(io)?,
    };
    let bytes = source.len;
    let too_large = || CheckpointError::TooLarge { file: file(), bytes, limit };
    if bytes > limit {
        return Err(too_large());
    }
    let mut content = vec![0; usize::try_from(bytes).map_err(|_| too_large())?];
    source.read_at(0, &mut content).map_err(io)?;
    Ok(Some(content))
}

/// Parses JSON. serde_json bounds the depth at 128.
pub(crate) fn parse<T: DeserializeOwned>(file: &Path, json: &[u8]) -> Result<T, CheckpointError> {
    serde_json::from_slice(json).map_err(|error| CheckpointError::File {
        file: file.display().to_string(),
        problem: format!("not valid: {}", clipped(&error.to_string())),
    })
}

/// Reads `name` of `dir` as a JSON object; `None` when there is no such file.
pub(crate) fn read_object(dir: &Path, name: &str) -> Result<Option<Value>, CheckpointError> {
    let path = dir.join(name);
    let Some(json) = read_small(&path, MAX_CONFIG)? else { return Ok(None) };
    let value: Value = parse(&path, &json)?;
    if value.is_object() {
        return Ok(Some(value));
    }
    Err(CheckpointError::File { file: path.display().to_string(), problem: "not a JSON object".to_owned() })
}
