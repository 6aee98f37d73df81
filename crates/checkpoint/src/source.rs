//! Where bytes come from: a file read at positions, or memory.
//!
//! Files are not mapped. A map shows a file that is cut short while serving as a fatal signal, and page
//! faults read network file systems in small pieces; positioned reads give an error and large requests.

use std::fs::File;
use std::io;
use std::path::Path;

/// What bytes without a file are called.
pub(crate) const MEMORY: &str = "<memory>";

/// A run of bytes with a name for messages.
#[derive(Debug)]
pub(crate) struct Source {
    /// Path of the file, or `<memory>`.
    pub(crate) label: String,
    /// Total length in bytes, taken when it was opened.
    pub(crate) len: u64,
    bytes: Bytes,
}

#[derive(Debug)]
enum Bytes {
    File(PositionedFile),
    Memory(Vec<u8>),
}

impl Source {
    /// Opens a regular file (a link to one will do: the Hugging Face cache is made of them).
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        // Asked before opening: opening a pipe would wait for its writer.
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        let bytes = Bytes::File(PositionedFile::new(file));
        Ok(Self { label: path.display().to_string(), len, bytes })
    }

    /// Wraps bytes in memory.
    pub(crate) fn memory(bytes: Vec<u8>) -> Self {
        Self { label: MEMORY.to_owned(), len: bytes.len() as u64, bytes: Bytes::Memory(bytes) }
    }

    /// Fills `into` from `offset` on.
    pub(crate) fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        match &self.bytes {
            Bytes::File(file) => file.read_exact_at(into, offset),
            Bytes::Memory(bytes) => {
                let from = usize::try_from(offset).ok();
                let range = from.and_then(|from| Some(from..from.checked_add(into.len())?));
                let slice = range.and_then(|range| bytes.get(range)).ok_or(io::ErrorKind::UnexpectedEof)?;
                into.copy_from_slice(slice);
                Ok(())
            }
        }
    }
}

#[cfg(unix)]
use unix::PositionedFile;

#[cfg(not(unix))]
use seeking::SeekingFile as PositionedFile;

#[cfg(unix)]
mod unix {
    use std::fs::File;
    use std::io;
    use std::os::unix::fs::FileExt;

    /// `pread`: no shared cursor, so threads read without a lock.
    #[derive(Debug)]
    pub(super) struct PositionedFile(File);

    impl PositionedFile {
        pub(super) fn new(file: File) -> Self {
            Self(file)
        }

        pub(super) fn read_exact_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
            self.0.read_exact_at(into, offset)
        }
    }
}

#[cfg(any(not(unix), test))]
mod seeking {
    use std::fs::File;
    use std::io::{self, Read, Seek, SeekFrom};
    use std::sync::{Mutex, PoisonError};

    /// Seek and read under a lock, for systems without a positioned read.
    #[derive(Debug)]
    pub(super) struct SeekingFile(Mutex<File>);

    impl SeekingFile {
        pub(super) fn new(file: File) -> Self {
            Self(Mutex::new(file))
        }

        pub(super) fn read_exact_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
            let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            file.seek(SeekFrom::Start(offset))?;
            file.read_exact(into)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_three_readers_agree() {
        let bytes: Vec<u8> = (0..=255).collect();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bytes");
        std::fs::write(&path, &bytes).unwrap();
        let file = Source::open(&path).unwrap();
        let memory = Source::memory(bytes);
        let seeking = seeking::SeekingFile::new(File::open(&path).unwrap());
        for (offset, len) in
            [(0, 256), (0, 0), (17, 100), (250, 6), (256, 0), (250, 7), (300, 1), (u64::MAX, 1)]
        {
            let (mut a, mut b, mut c) = (vec![0; len], vec![0; len], vec![0; len]);
            let results = [
                file.read_at(offset, &mut a).is_ok(),
                memory.read_at(offset, &mut b).is_ok(),
                seeking.read_exact_at(&mut c, offset).is_ok(),
            ];
            let fits = offset.checked_add(len as u64).is_some_and(|end| end <= 256);
            assert_eq!(results, [fits; 3], "offset {offset} len {len}");
            if fits {
                assert_eq!(a, b);
                assert_eq!(a, c);
            }
        }
    }

    #[test]
    fn directories_are_not_read() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Source::open(dir.path()).unwrap_err().to_string().contains("not a regular file"));
    }
}
