//! The safetensors header: eight bytes of length, JSON, then data that it must describe exactly.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::dtype::Dtype;
use crate::error::{CheckpointError, clipped, quoted};
use crate::source::Source;

/// Longest header that is read, as in the reference implementation; a real one has a few hundred kilobytes.
const MAX_HEADER: u64 = 100_000_000;

/// Most dimensions of a tensor.
const MAX_RANK: usize = 8;

/// One tensor of a file. Its bytes are known to lie inside the file and to belong to no other tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Position of the first byte in the file.
    pub(crate) offset: u64,
    /// `shape` times the width of `dtype`.
    pub(crate) bytes: usize,
}

/// Reads and checks the header of `source`; entries come in file order.
///
/// # Errors
/// Anything that the format forbids: see the tests for the list.
pub(crate) fn read(source: &Source) -> Result<Vec<Entry>, CheckpointError> {
    let fail = |problem: String| CheckpointError::File { file: source.label.clone(), problem };
    let io = |error| CheckpointError::Io { file: source.label.clone(), source: error };
    let Some(room) = source.len.checked_sub(8) else {
        return Err(fail(format!("{} bytes are too few for a safetensors file", source.len)));
    };
    let mut length = [0; 8];
    source.read_at(0, &mut length).map_err(io)?;
    let length = u64::from_le_bytes(length);
    if length > room {
        return Err(fail(format!("header length {length} exceeds the file, which has {} bytes", source.len)));
    }
    if length > MAX_HEADER {
        return Err(fail(format!("header length {length}, at most {MAX_HEADER} is accepted")));
    }
    // At most MAX_HEADER, and the file is at least as long.
    let mut json = vec![0; usize::try_from(length).map_err(|_| fail("header too long".to_owned()))?];
    source.read_at(8, &mut json).map_err(io)?;
    let UniqueKeys(raw) = serde_json::from_slice(&json)
        .map_err(|error| fail(format!("header is not valid: {}", clipped(&error.to_string()))))?;
    layout(&source.label, raw, 8 + length, room - length)
}

/// Checks sizes and that the tensors tile the `data` bytes from `start` on without gap or overlap.
fn layout(
    file: &str,
    raw: Vec<(String, RawTensor)>,
    start: u64,
    data: u64,
) -> Result<Vec<Entry>, CheckpointError> {
    let fail = |tensor: &str, problem| CheckpointError::Tensor {
        file: file.to_owned(),
        tensor: quoted(tensor),
        problem,
    };
    let mut entries = Vec::with_capacity(raw.len());
    for (name, tensor) in raw {
        let (begin, end) = tensor.data_offsets;
        let shown = || format!("data_offsets [{begin}, {end}]");
        let Some(span) = end.checked_sub(begin) else {
            return Err(fail(&name, format!("{} run backwards", shown())));
        };
        if end > data {
            let problem = format!("file is truncated: {} pass the {data} bytes of data in it", shown());
            return Err(fail(&name, problem));
        }
        if tensor.shape.len() > MAX_RANK {
            let rank = tensor.shape.len();
            return Err(fail(&name, format!("{rank} dimensions, at most {MAX_RANK} are accepted")));
        }
        let Some(bytes) = tensor.dtype.bytes(&tensor.shape) else {
            let problem = format!("shape {:?} of {} has no byte size", tensor.shape, tensor.dtype);
            return Err(fail(&name, problem));
        };
        if bytes != span {
            let (dtype, shape) = (tensor.dtype, &tensor.shape);
            let problem = format!("shape {shape:?} of {dtype} takes {bytes} bytes, {} hold {span}", shown());
            return Err(fail(&name, problem));
        }
        let shape: Option<Vec<usize>> = tensor.shape.iter().map(|&dim| usize::try_from(dim).ok()).collect();
        let (Some(shape), Ok(bytes)) = (shape, usize::try_from(bytes)) else {
            return Err(fail(&name, format!("{bytes} bytes do not fit this machine's address space")));
        };
        entries.push(Entry { name, dtype: tensor.dtype, shape, offset: start + begin, bytes });
    }
    // Empty tensors sort before the one that starts where they do.
    entries.sort_by(|a, b| (a.offset, a.bytes, &a.name).cmp(&(b.offset, b.bytes, &b.name)));
    let mut cursor = start;
    let mut previous = "the header";
    for entry in &entries {
        if entry.offset < cursor {
            return Err(fail(&entry.name, format!("data overlaps {}", quoted(previous))));
        }
        if entry.offset > cursor {
            let gap = entry.offset - cursor;
            return Err(fail(&entry.name, format!("{gap} bytes before its data belong to no tensor")));
        }
        cursor += entry.bytes as u64;
        previous = &entry.name;
    }
    let left = start + data - cursor;
    if left > 0 {
        let after =
            if entries.is_empty() { "the header".to_owned() } else { format!("tensor {}", quoted(previous)) };
        return Err(CheckpointError::File {
            file: file.to_owned(),
            problem: format!("{left} bytes after {after} belong to no tensor"),
        });
    }
    Ok(entries)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// A JSON object as pairs in file order, in which no key comes twice; errors name the key.
///
/// The key `__metadata__`, which the format reserves for free strings, is checked and left out.
pub(crate) struct UniqueKeys<V>(pub(crate) Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueKeys<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(UniqueKeysVisitor(PhantomData)).map(Self)
    }
}

struct UniqueKeysVisitor<V>(PhantomData<V>);

impl<'de, V: Deserialize<'de>> Visitor<'de> for UniqueKeysVisitor<V> {
    type Value = Vec<(String, V)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object with tensor names as keys")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut seen = HashSet::new();
        let mut pairs = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            if !seen.insert(key.clone()) {
                return Err(A::Error::custom(format!("tensor {} is listed twice", quoted(&key))));
            }
            let named = |error: A::Error| A::Error::custom(format!("tensor {}: {error}", quoted(&key)));
            if key == "__metadata__" {
                map.next_value::<HashMap<String, String>>().map_err(named)?;
            } else {
                let value = map.next_value().map_err(named)?;
                pairs.push((key, value));
            }
        }
        Ok(pairs)
    }
}

#[cfg(test)]
#[path = "header_properties.rs"]
mod properties;
