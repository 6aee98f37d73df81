//! Safetensors files out: header first, data in any order, visible under its name only when complete.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::dtype::Dtype;
use crate::error::{CheckpointError, quoted};

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its stored name.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
}

/// Writes one file, a piece at a time. Data goes to a hidden file beside the target, which
/// [`finish`](Self::finish) renames; dropping the writer before removes it.
#[derive(Debug)]
pub struct SafetensorsWriter {
    target: PathBuf,
    temporary: PathBuf,
    file: File,
    slots: HashMap<String, Slot>,
    finished: bool,
}

#[derive(Debug)]
struct Slot {
    /// Position of the next byte in the file.
    next: u64,
    /// Position after the last.
    end: u64,
}

impl SafetensorsWriter {
    /// Creates the file and writes its header. `metadata` becomes `__metadata__`.
    ///
    /// # Errors
    /// Two tensors of one name, a shape without a byte size, or a refusal of the system.
    pub fn create(
        path: &Path,
        tensors: &[TensorSpec],
        metadata: &[(&str, &str)],
    ) -> Result<Self, CheckpointError> {
        let (header, slots) = layout(path, tensors, metadata)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let temporary = path.with_file_name(format!(".{name}.{}.part", std::process::id()));
        let open = || {
            let mut file = File::create(&temporary)?;
            file.write_all(&(header.len() as u64).to_le_bytes())?;
            file.write_all(&header)?;
            Ok(file)
        };
        let file =
            open().map_err(|source| CheckpointError::Io { file: temporary.display().to_string(), source })?;
        Ok(Self { target: path.to_owned(), temporary, file, slots, finished: false })
    }

    /// Appends the next bytes of one tensor: little-endian, row-major.
    ///
    /// # Errors
    /// An unknown name, more bytes than its shape has, or a refusal of the system.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        let path = self.target.display().to_string();
        let fail = |problem| CheckpointError::Tensor { file: path.clone(), tensor: quoted(name), problem };
        let Some(slot) = self.slots.get_mut(name) else {
            return Err(fail("was not announced in the header".to_owned()));
        };
        let left = slot.end - slot.next;
        if bytes.len() as u64 > left {
            return Err(fail(format!("{} bytes, {left} are left of its shape", bytes.len())));
        }
        let at = slot.next;
        slot.next += bytes.len() as u64;
        self.file
            .seek(SeekFrom::Start(at))
            .and_then(|_| self.file.write_all(bytes))
            .map_err(|source| self.io(source))
    }

    /// Makes the file durable and gives it its name, replacing a file of that name at once.
    ///
    /// # Errors
    /// A tensor that is not complete, or a refusal of the system; the target is then as it was.
    pub fn finish(mut self) -> Result<(), CheckpointError> {
        if let Some((name, slot)) = self.slots.iter().find(|(_, slot)| slot.next < slot.end) {
            return Err(CheckpointError::Tensor {
                file: self.target.display().to_string(),
                tensor: quoted(name),
                problem: format!("{} bytes were never written", slot.end - slot.next),
            });
        }
        self.file.sync_all().map_err(|source| self.io(source))?;
        std::fs::rename(&self.temporary, &self.target).map_err(|source| self.io(source))?;
        self.finished = true;
        Ok(())
    }

    fn io(&self, source: io::Error) -> CheckpointError {
        CheckpointError::Io { file: self.target.display().to_string(), source }
    }
}

impl Drop for SafetensorsWriter {
    fn drop(&mut self) {
        if !self.finished {
            // Nothing is lost by failing here: the leftover is hidden and overwritten next time.
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

/// Places tensors, widest type first so that each is aligned to its type, then by name.
fn layout(
    path: &Path,
    tensors: &[TensorSpec],
    metadata: &[(&str, &str)],
) -> Result<(Vec<u8>, HashMap<String, Slot>), CheckpointError> {
    let file = || path.display().to_string();
    let fail = |tensor: &TensorSpec, problem| CheckpointError::Tensor {
        file: file(),
        tensor: quoted(&tensor.name),
        problem,
    };
    let mut order: Vec<&TensorSpec> = tensors.iter().collect();
    order.sort_by(|a, b| b.dtype.bits().cmp(&a.dtype.bits()).then_with(|| a.name.cmp(&b.name)));
    let mut header = Map::new();
    if !metadata.is_empty() {
        let strings: Map<String, Value> = metadata.iter().map(|&(k, v)| (k.to_owned(), v.into())).collect();
        header.insert("__metadata__".to_owned(), Value::Object(strings));
    }
    let mut slots = HashMap::new();
    let mut next = 0_u64;
    for tensor in order {
        if tensor.name == "__metadata__" {
            return Err(fail(tensor, "the name is reserved".to_owned()));
        }
        let dims: Vec<u64> = tensor.shape.iter().map(|&dim| dim as u64).collect();
        // Half the range of u64 leaves room for the header.
        let end = tensor.dtype.bytes(&dims).and_then(|bytes| next.checked_add(bytes));
        let end = end.filter(|&end| end <= u64::MAX / 2);
        let end = end.ok_or_else(|| {
            fail(tensor, format!("shape {:?} of {} has no byte size", tensor.shape, tensor.dtype))
        })?;
        let item = json!({
            "dtype": tensor.dtype.to_string(),
            "shape": tensor.shape,
            "data_offsets": [next, end],
        });
        if header.insert(tensor.name.clone(), item).is_some() {
            return Err(fail(tensor, "is announced twice".to_owned()));
        }
        slots.insert(tensor.name.clone(), Slot { next, end });
        next = end;
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let start = 8 + header.len() as u64;
    for slot in slots.values_mut() {
        slot.next += start;
        slot.end += start;
    }
    Ok((header, slots))
}
