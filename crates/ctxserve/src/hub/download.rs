//! One file into the cache: resumed, retried, measured and verified.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::cache::RepoCache;
use super::client::{Client, Download, FileMeta};
use super::{HubError, Patience, Progress};

/// Bytes read from the network at a time.
const CHUNK: usize = 1 << 18;

/// Brings `name` into the cache and links it into the commit's snapshot.
pub(super) fn file(
    client: &Client,
    url: &str,
    name: &str,
    cache: &RepoCache,
    commit: &str,
    patience: Patience,
    progress: &dyn Progress,
) -> Result<(), HubError> {
    let first = client.open(url, 0)?;
    let meta = first.meta.clone();
    let etag = meta.etag.clone().unwrap_or_else(|| format!("{commit}-{name}"));
    let (blob, growing) = cache.blob(&etag)?;
    let _lock = cache.lock(&etag)?;
    if !is_whole(&blob, meta.size) {
        let part = Part { client, url, name, meta, path: growing, patience, progress };
        part.fill(first)?;
        part.verify()?;
        fs::rename(&part.path, &blob).map_err(HubError::disk(&blob))?;
    }
    cache.link(commit, name, &blob)
}

fn is_whole(blob: &Path, size: Option<u64>) -> bool {
    fs::metadata(blob).is_ok_and(|found| found.is_file() && size.is_none_or(|size| found.len() == size))
}

/// A file on its way.
struct Part<'a> {
    client: &'a Client,
    url: &'a str,
    name: &'a str,
    meta: FileMeta,
    path: PathBuf,
    patience: Patience,
    progress: &'a dyn Progress,
}

impl Part<'_> {
    /// Appends until the size is reached; asks again after a cut, as long as that brings new bytes.
    fn fill(&self, first: Download) -> Result<(), HubError> {
        let mut have = self.kept();
        self.progress.begin(self.name, self.meta.size, have);
        let mut most = have;
        let mut idle = 0;
        let mut next = (have == 0).then_some(first);
        while self.meta.size != Some(have) {
            let attempt = match next.take() {
                Some(download) => Ok(download),
                None => self.client.open(self.url, have),
            };
            let what = match attempt.and_then(|download| self.append(download)) {
                Ok(None) if self.meta.size.is_none() => break,
                Ok(None) => "the server ended the file early".to_owned(),
                Ok(Some(cut)) => cut,
                Err(error @ (HubError::Disk { .. } | HubError::Denied { .. })) => return Err(error),
                Err(error) => error.to_string(),
            };
            have = self.kept();
            if self.meta.size == Some(have) {
                break;
            }
            if have > most {
                (most, idle) = (have, 0);
            }
            idle += 1;
            if idle >= self.patience.attempts {
                let expected = self.meta.size.unwrap_or(0);
                return Err(HubError::Truncated { file: self.name.to_owned(), expected, got: have, what });
            }
            tracing::warn!("{}: {what} at byte {have}; trying again", self.name);
            std::thread::sleep(self.patience.pause * (1 << idle.min(6)));
        }
        self.progress.end();
        Ok(())
    }

    /// Bytes of an earlier attempt; none when they cannot be a beginning of this file.
    fn kept(&self) -> u64 {
        let Some(size) = self.meta.size else { return 0 };
        fs::metadata(&self.path).map(|found| found.len()).ok().filter(|&length| length <= size).unwrap_or(0)
    }

    /// Writes a body at its place; `Some` says how it was cut.
    fn append(&self, download: Download) -> Result<Option<String>, HubError> {
        let mut file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(download.start == 0)
            .append(download.start > 0)
            .open(&self.path)
            .map_err(HubError::disk(&self.path))?;
        let mut at = download.start;
        let mut body = download.body.into_with_config().limit(u64::MAX).reader();
        let mut buffer = vec![0; CHUNK];
        let cut = loop {
            match body.read(&mut buffer) {
                Ok(0) => break None,
                Ok(n) if self.meta.size.is_some_and(|size| at + n as u64 > size) => {
                    return Err(HubError::Protocol {
                        url: self.url.to_owned(),
                        what: format!("{} is longer than the hub says", self.name),
                    });
                }
                Ok(n) => {
                    file.write_all(&buffer[..n]).map_err(HubError::disk(&self.path))?;
                    at += n as u64;
                    self.progress.at(at);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Some(error.to_string()),
            }
        };
        file.sync_all().map_err(HubError::disk(&self.path))?;
        Ok(cut)
    }

    /// Compares the digest where the etag is one (large files).
    fn verify(&self) -> Result<(), HubError> {
        let Some(expected) = self.meta.etag.as_ref().filter(|etag| is_sha256(etag)) else { return Ok(()) };
        let mut file = File::open(&self.path).map_err(HubError::disk(&self.path))?;
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; CHUNK];
        loop {
            match file.read(&mut buffer).map_err(HubError::disk(&self.path))? {
                0 => break,
                n => hasher.update(&buffer[..n]),
            }
        }
        let got: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if got == expected.to_ascii_lowercase() {
            return Ok(());
        }
        fs::remove_file(&self.path).map_err(HubError::disk(&self.path))?;
        Err(HubError::Damaged { file: self.name.to_owned(), expected: expected.clone(), got })
    }
}

fn is_sha256(etag: &str) -> bool {
    etag.len() == 64 && etag.bytes().all(|byte| byte.is_ascii_hexdigit())
}
