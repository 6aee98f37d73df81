//! All tensors of a checkpoint by stored name, whichever file holds them.

use std::collections::BTreeMap;
use std::path::Path;

use crate::dtype::Dtype;
use crate::error::{CheckpointError, quoted};
use crate::header::Entry;
use crate::source::{MEMORY, Source};

/// Files and the tensors in them.
#[derive(Debug, Default)]
pub(crate) struct Store {
    sources: Vec<Source>,
    tensors: BTreeMap<String, Place>,
    /// Where a message says that a missing tensor should have been.
    pub(crate) label: String,
}

#[derive(Debug)]
struct Place {
    source: usize,
    entry: Entry,
}

/// One stored tensor and the bytes behind it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stored<'a> {
    source: &'a Source,
    entry: &'a Entry,
}

impl Store {
    /// An empty store; `label` names it in messages.
    pub(crate) fn new(label: String) -> Self {
        Self { label, ..Self::default() }
    }

    /// Adds the tensors of one source. A name that is there already is an error that names both files.
    pub(crate) fn add(&mut self, source: Source, entries: Vec<Entry>) -> Result<(), CheckpointError> {
        for entry in entries {
            if let Some(other) = self.get(&entry.name) {
                let problem = format!("is stored in {} too", other.file());
                return Err(CheckpointError::Tensor {
                    file: source.label,
                    tensor: quoted(&entry.name),
                    problem,
                });
            }
            self.tensors.insert(entry.name.clone(), Place { source: self.sources.len(), entry });
        }
        self.sources.push(source);
        Ok(())
    }

    /// The tensor stored under `name`.
    pub(crate) fn get(&self, name: &str) -> Option<Stored<'_>> {
        self.tensors.get(name).and_then(|place| self.stored(place))
    }

    /// Every tensor, by name.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Stored<'_>> {
        self.tensors.values().filter_map(|place| self.stored(place))
    }

    /// Bytes of all tensors together.
    pub(crate) fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|place| place.entry.bytes as u64).sum()
    }

    /// Passes on, line by line, which files and tensors these are. Directories are left out: they may be named in several
    /// ways.
    pub(crate) fn describe(&self, line: &mut dyn FnMut(&str)) -> Result<(), CheckpointError> {
        for source in &self.sources {
            let changed = match Path::new(&source.label).metadata() {
                Ok(metadata) => metadata.modified().ok(),
                Err(_) if source.label == MEMORY => None,
                Err(error) => return Err(CheckpointError::Io { file: source.label.clone(), source: error }),
            };
            let name = Path::new(&source.label).file_name();
            line(&format!("{name:?} {} {changed:?}\n", source.len));
        }
        self.tensors.values().for_each(|place| line(&format!("{} {:?}\n", place.source, place.entry)));
        Ok(())
    }

    fn stored<'a>(&'a self, place: &'a Place) -> Option<Stored<'a>> {
        // An entry added while its source was refused has none; such a store is dropped, not used.
        self.sources.get(place.source).map(|source| Stored { source, entry: &place.entry })
    }
}

impl<'a> Stored<'a> {
    pub(crate) fn name(&self) -> &'a str {
        &self.entry.name
    }

    pub(crate) fn file(&self) -> &'a str {
        &self.source.label
    }

    pub(crate) fn dtype(&self) -> Dtype {
        self.entry.dtype
    }

    pub(crate) fn shape(&self) -> &'a [usize] {
        &self.entry.shape
    }

    /// Number of elements. The product was checked when the header was read.
    pub(crate) fn count(&self) -> usize {
        self.entry.shape.iter().product()
    }

    /// Bytes it takes.
    pub(crate) fn bytes(&self) -> usize {
        self.entry.bytes
    }

    /// An error about this tensor.
    pub(crate) fn error(&self, problem: String) -> CheckpointError {
        CheckpointError::Tensor { file: self.file().to_owned(), tensor: quoted(self.name()), problem }
    }

    /// Fills `into` from byte `from` of the tensor on.
    pub(crate) fn read_at(&self, from: usize, into: &mut [u8]) -> Result<(), CheckpointError> {
        let inside = from.checked_add(into.len()).is_some_and(|end| end <= self.entry.bytes);
        if !inside {
            let (len, bytes) = (into.len(), self.entry.bytes);
            return Err(self.error(format!("reading {len} bytes at {from} of {bytes}")));
        }
        self.source.read_at(self.entry.offset + from as u64, into).map_err(|source| CheckpointError::Io {
            file: format!("{}: tensor {}", self.file(), quoted(self.name())),
            source,
        })
    }

    /// A zeroed vector of `count` elements of `T`.
    pub(crate) fn allocate<T: bytemuck::Zeroable>(&self, count: usize) -> Result<Vec<T>, CheckpointError> {
        bytemuck::allocation::try_zeroed_vec(count).map_err(|()| CheckpointError::OutOfMemory {
            file: self.file().to_owned(),
            tensor: quoted(self.name()),
            bytes: count.saturating_mul(size_of::<T>()),
        })
    }
}
