//! Checkpoint directories built by hand, byte by byte where a test needs it.

use std::path::Path;

use ctxserve_checkpoint::{Checkpoint, Dtype, MemoryTensor, SafetensorsWriter, TensorSpec};
use ctxserve_core::Matrix;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Header length, header, data.
pub(crate) fn raw(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// A directory with `config.json` and the given files.
pub(crate) fn dir(config: &Value, files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    for (name, bytes) in files {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

/// What opening a directory with this `model.safetensors` says.
pub(crate) fn open_error(model: &[u8]) -> String {
    let dir = dir(&json!({}), &[("model.safetensors", model)]);
    Checkpoint::open(dir.path()).unwrap_err().to_string()
}

pub(crate) fn tensor(name: &str, dtype: Dtype, shape: &[usize], data: Vec<u8>) -> MemoryTensor {
    MemoryTensor { name: name.to_owned(), dtype, shape: shape.to_vec(), data }
}

pub(crate) fn f32s(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

pub(crate) fn bf16s(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(|value| half::bf16::from_f32(value).to_le_bytes()).collect()
}

pub(crate) fn f16s(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(|value| half::f16::from_f32(value).to_le_bytes()).collect()
}

/// Writes tensors with the crate's own writer.
pub(crate) fn write(path: &Path, tensors: &[MemoryTensor]) {
    let specs: Vec<TensorSpec> = tensors
        .iter()
        .map(|t| TensorSpec { name: t.name.clone(), dtype: t.dtype, shape: t.shape.clone() })
        .collect();
    let mut writer = SafetensorsWriter::create(path, &specs, &[("format", "pt")]).unwrap();
    for tensor in tensors {
        writer.write(&tensor.name, &tensor.data).unwrap();
    }
    writer.finish().unwrap();
}

pub(crate) fn mxfp4_config() -> Value {
    json!({"quantization_config": {"quant_method": "mxfp4"}})
}

/// All elements as f32.
pub(crate) fn decoded(matrix: &Matrix) -> Vec<f32> {
    let mut out = vec![f32::NAN; matrix.rows() * matrix.cols()];
    out.chunks_mut(matrix.cols().max(1)).enumerate().for_each(|(row, out)| matrix.decode_row(row, out));
    out
}
