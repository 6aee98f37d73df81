//! What a conversion has finished, so that the next run of it need not start over.
//!
//! `DST.partial.journal` lies beside the directory `DST.partial`: a first line that says which conversion it is, then one for
//! each file that is complete and on disk. A last line that was cut is as if it were not there.

use std::fs::{self, File, TryLockError};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::TensorReport;
use crate::error::CheckpointError;

/// Most bytes of a journal that are read; a line has some hundred bytes a tensor.
const MOST: u64 = 256 << 20;

/// A file that is complete.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct Done {
    pub(super) file: String,
    pub(super) bytes: u64,
    pub(super) sha256: String,
    pub(super) tensors: Vec<TensorReport>,
}

#[derive(Deserialize, Serialize)]
struct Header {
    fingerprint: String,
}

/// An open journal. While it is open no other process converts to the same place.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: File,
    done: Vec<Done>,
}

pub(super) fn io_error(path: &Path, source: io::Error) -> CheckpointError {
    CheckpointError::Io { file: path.display().to_string(), source }
}

impl Journal {
    /// Opens the journal of the directory `partial`, or begins one; creates the directory.
    pub(super) fn open(partial: &Path, fingerprint: &str) -> Result<Self, CheckpointError> {
        let mut path = partial.as_os_str().to_owned();
        path.push(".journal");
        let path = PathBuf::from(path);
        let io = |source| io_error(&path, source);
        let refuse = |problem: String| CheckpointError::File { file: partial.display().to_string(), problem };
        if partial.exists() && !path.exists() {
            return Err(refuse("is there already, and no conversion has left it".to_owned()));
        }
        let mut file = File::options().read(true).append(true).create(true).open(&path).map_err(io)?;
        match file.try_lock() {
            Ok(()) => (),
            Err(TryLockError::WouldBlock) => {
                return Err(refuse("another process is converting to it".to_owned()));
            }
            Err(TryLockError::Error(source)) => return Err(io(source)),
        }
        let Lines { header, done, end } = read(&file).map_err(io)?;
        match header {
            Some(header) if header.fingerprint != fingerprint => {
                return Err(refuse(format!(
                    "was begun from another source or to another format; remove it and {} to start over",
                    path.display()
                )));
            }
            Some(_) => file.set_len(end).map_err(io)?,
            None if partial.exists() => {
                return Err(refuse(format!(
                    "is there already, and {} does not say what it is; remove both to start over",
                    path.display()
                )));
            }
            None => {
                file.set_len(0).map_err(io)?;
                append(&mut file, &Header { fingerprint: fingerprint.to_owned() }).map_err(io)?;
            }
        }
        if !partial.exists() {
            fs::create_dir(partial).map_err(|source| io_error(partial, source))?;
        }
        Ok(Self { path, file, done })
    }

    /// What was recorded of a file, if that is what lies in `dir`, byte for byte.
    pub(super) fn finished(&self, dir: &Path, file: &str) -> Result<Option<&Done>, CheckpointError> {
        // The last word counts: a file that was found damaged is written and recorded again.
        let Some(done) = self.done.iter().rev().find(|done| done.file == file) else { return Ok(None) };
        match digest(&dir.join(file)) {
            Ok((bytes, sha256)) if bytes == done.bytes && sha256 == done.sha256 => Ok(Some(done)),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(io_error(&dir.join(file), source)),
        }
    }

    /// Records a file that is complete in `dir`.
    pub(super) fn record(
        &mut self,
        dir: &Path,
        file: &str,
        tensors: Vec<TensorReport>,
    ) -> Result<(), CheckpointError> {
        let path = dir.join(file);
        let (bytes, sha256) = digest(&path).map_err(|source| io_error(&path, source))?;
        let done = Done { file: file.to_owned(), bytes, sha256, tensors };
        append(&mut self.file, &done).map_err(|source| io_error(&self.path, source))?;
        self.done.push(done);
        Ok(())
    }

    /// Removes it: the conversion is complete.
    pub(super) fn remove(self) -> Result<(), CheckpointError> {
        fs::remove_file(&self.path).map_err(|source| io_error(&self.path, source))
    }
}

/// A journal's content, and where its last whole line ends.
struct Lines {
    header: Option<Header>,
    done: Vec<Done>,
    end: u64,
}

fn read(file: &File) -> io::Result<Lines> {
    let mut file = file;
    file.seek(SeekFrom::Start(0))?;
    let mut reader = BufReader::new(file.take(MOST));
    let mut lines = Lines { header: None, done: Vec::new(), end: 0 };
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        let whole = line.ends_with(b"\n");
        let read = match &lines.header {
            None => serde_json::from_slice(&line).map(|header| lines.header = Some(header)),
            Some(_) => serde_json::from_slice(&line).map(|done| lines.done.push(done)),
        };
        if !whole || read.is_err() {
            // Cut while it was written: whatever it says was not promised.
            if read.is_ok() && !whole {
                match lines.done.pop() {
                    Some(_) => (),
                    None => lines.header = None,
                }
            }
            break;
        }
        lines.end += line.len() as u64;
        line.clear();
    }
    Ok(lines)
}

fn append(file: &mut File, line: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    file.write_all(&text)?;
    file.sync_all()
}

/// Length and SHA-256 of a file.
fn digest(path: &Path) -> io::Result<(u64, String)> {
    let mut file = File::open(path)?;
    let (mut hash, mut length) = (Sha256::new(), 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok((length, hex(&hash.finalize()))),
            count => {
                length += count as u64;
                hash.update(buffer.get(..count).unwrap_or_default());
            }
        }
    }
}

/// Hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(name: &str) -> TensorReport {
        TensorReport {
            name: name.to_owned(),
            from: "bf16".to_owned(),
            to: "mxfp4".to_owned(),
            elements: 32,
            relative_error: 0.125,
        }
    }

    fn names(journal: &Journal, dir: &Path) -> Vec<&'static str> {
        let found = |file: &&str| journal.finished(dir, file).unwrap().is_some();
        ["a", "b", "c"].into_iter().filter(found).collect()
    }

    #[test]
    fn what_was_finished_is_known_again_if_it_is_the_same() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("out.partial");
        let mut journal = Journal::open(&dir, "one").unwrap();
        for file in ["a", "b", "c"] {
            fs::write(dir.join(file), file.repeat(1000)).unwrap();
            journal.record(&dir, file, vec![report(file)]).unwrap();
        }
        assert_eq!(names(&journal, &dir), ["a", "b", "c"]);
        assert_eq!(journal.finished(&dir, "b").unwrap().unwrap().tensors, [report("b")]);
        drop(journal);
        fs::write(dir.join("b"), "b".repeat(999) + "x").unwrap();
        fs::remove_file(dir.join("c")).unwrap();
        let mut journal = Journal::open(&dir, "one").unwrap();
        assert_eq!(names(&journal, &dir), ["a"]);
        journal.record(&dir, "b", vec![]).unwrap();
        assert_eq!(names(&journal, &dir), ["a", "b"]);
        assert!(journal.finished(&dir, "b").unwrap().unwrap().tensors.is_empty());
        let path = journal.path.clone();
        journal.remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_cut_line_is_not_there() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("out.partial");
        let mut journal = Journal::open(&dir, "one").unwrap();
        for file in ["a", "b"] {
            fs::write(dir.join(file), file).unwrap();
            journal.record(&dir, file, vec![]).unwrap();
        }
        let path = journal.path.clone();
        drop(journal);
        let whole = fs::read(&path).unwrap();
        let first = whole.iter().position(|&byte| byte == b'\n').unwrap() + 1;
        let second = first + whole[first..].iter().position(|&byte| byte == b'\n').unwrap() + 1;
        for cut in first..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let journal = Journal::open(&dir, "one").unwrap();
            assert_eq!(names(&journal, &dir), if cut < second { &[][..] } else { &["a"][..] }, "{cut}");
            drop(journal);
            assert_eq!(fs::read(&path).unwrap().len(), if cut < second { first } else { second });
        }
        // Without its first line it does not say what the directory is.
        fs::write(&path, &whole[..first - 1]).unwrap();
        assert!(Journal::open(&dir, "one").unwrap_err().to_string().contains("does not say what it is"));
        fs::remove_dir_all(&dir).unwrap();
        assert!(names(&Journal::open(&dir, "two").unwrap(), &dir).is_empty());
    }

    #[test]
    fn other_conversions_and_strangers_are_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("out.partial");
        fs::create_dir(&dir).unwrap();
        let refused = |fingerprint: &str| Journal::open(&dir, fingerprint).unwrap_err().to_string();
        assert!(refused("one").contains("no conversion has left it"));
        fs::remove_dir(&dir).unwrap();
        let journal = Journal::open(&dir, "one").unwrap();
        assert!(refused("one").contains("another process"), "{}", refused("one"));
        drop(journal);
        assert!(refused("two").contains("another source or to another format"));
        assert!(Journal::open(&dir, "one").is_ok());
    }
}
