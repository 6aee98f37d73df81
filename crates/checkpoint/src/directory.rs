//! Which files of a directory are the checkpoint: one `model.safetensors`, or the shards of an index.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use serde::Deserialize;

use crate::error::{CheckpointError, quoted};
use crate::header::{self, UniqueKeys};
use crate::json;
use crate::source::Source;
use crate::store::Store;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

#[derive(Deserialize)]
struct Index {
    weight_map: UniqueKeys<String>,
}

/// Opens every weight file of `dir` and checks the headers and the index.
pub(crate) fn open(dir: &Path) -> Result<Store, CheckpointError> {
    let single = dir.join(SINGLE);
    let index = dir.join(INDEX);
    match json::read_small(&index, json::MAX_INDEX)? {
        Some(json) => sharded(dir, &index, json::parse(&index, &json)?),
        None if single.exists() => {
            let source = source(&single)?;
            let mut store = Store::new(source.label.clone());
            let entries = header::read(&source)?;
            store.add(source, entries)?;
            Ok(store)
        }
        None => Err(CheckpointError::MissingFile { file: single.display().to_string(), hint: hint(dir) }),
    }
}

fn source(path: &Path) -> Result<Source, CheckpointError> {
    Source::open(path).map_err(|source| CheckpointError::Io { file: path.display().to_string(), source })
}

fn sharded(dir: &Path, path: &Path, index: Index) -> Result<Store, CheckpointError> {
    let label = path.display().to_string();
    let wrong = |tensor: &str, problem: String| CheckpointError::Tensor {
        file: label.clone(),
        tensor: quoted(tensor),
        problem,
    };
    // Shard name to the first tensor that names it.
    let mut shards: BTreeMap<&str, &str> = BTreeMap::new();
    for (tensor, shard) in &index.weight_map.0 {
        if !is_plain_name(shard) {
            return Err(wrong(
                tensor,
                format!("shard {} is not a file name in this directory", quoted(shard)),
            ));
        }
        shards.entry(shard).or_insert(tensor);
    }
    if !shards.contains_key(SINGLE) && dir.join(SINGLE).exists() {
        let problem = format!("does not mention {SINGLE}, which is there too: remove the one that is stale");
        return Err(CheckpointError::File { file: label, problem });
    }
    let listed: HashMap<&str, &str> =
        index.weight_map.0.iter().map(|(t, s)| (t.as_str(), s.as_str())).collect();
    let mut store = Store::new(label.clone());
    for (&shard, &tensor) in &shards {
        let path = dir.join(shard);
        if !path.exists() {
            let hint = format!("; the index lists it for tensor {}", quoted(tensor));
            return Err(CheckpointError::MissingFile { file: path.display().to_string(), hint });
        }
        let source = source(&path)?;
        let entries = header::read(&source)?;
        for entry in &entries {
            let problem = match listed.get(entry.name.as_str()) {
                Some(&there) if there == shard => continue,
                Some(&there) => format!("the index lists it in {}", quoted(there)),
                None => "the index does not list it".to_owned(),
            };
            let (file, tensor) = (source.label, quoted(&entry.name));
            return Err(CheckpointError::Tensor { file, tensor, problem });
        }
        store.add(source, entries)?;
    }
    match index.weight_map.0.iter().find(|(tensor, _)| store.get(tensor).is_none()) {
        Some((tensor, shard)) => {
            Err(wrong(tensor, format!("is not in {}, where it is listed", quoted(shard))))
        }
        None => Ok(store),
    }
}

/// Whether a name from an index stays in the directory on every platform.
fn is_plain_name(name: &str) -> bool {
    let plain = |c: char| !c.is_control() && !matches!(c, '/' | '\\' | ':');
    name.ends_with(".safetensors") && !name.starts_with('.') && name.len() <= 255 && name.chars().all(plain)
}

/// Says what a directory without safetensors weights has instead.
fn hint(dir: &Path) -> String {
    let Ok(files) = std::fs::read_dir(dir) else { return String::new() };
    let mut names: Vec<String> =
        files.flatten().take(10_000).map(|file| file.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let with = |ends: &[&str]| names.iter().find(|name| ends.iter().any(|end| name.ends_with(end)));
    if let Some(name) = with(&[".safetensors"]) {
        return format!("; the directory has {} but neither {SINGLE} nor {INDEX}", quoted(name));
    }
    if let Some(name) = with(&[".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".onnx", ".npz", ".h5"]) {
        return format!("; the directory has {}, but only safetensors weights are read", quoted(name));
    }
    "; the directory has no weights".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shard_names_stay_in_the_directory() {
        for good in ["model-00001-of-00002.safetensors", "a.safetensors", "a b..c.safetensors"] {
            assert!(is_plain_name(good), "{good}");
        }
        let long = format!("{}.safetensors", "a".repeat(300));
        for bad in [
            "",
            "..",
            "../model.safetensors",
            "/etc/model.safetensors",
            "sub/model.safetensors",
            "sub\\model.safetensors",
            "C:model.safetensors",
            "model.safetensors/..",
            ".hidden.safetensors",
            "a\0.safetensors",
            "model.bin",
            &long,
        ] {
            assert!(!is_plain_name(bad), "{bad}");
        }
    }
}
