//! What can go wrong between here and the hub.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// A failed look-up or download.
#[derive(Debug, Error)]
pub enum HubError {
    /// Neither `HF_HOME` nor `HOME` is set.
    #[error("no place for the model cache: set HF_HOME or --download-dir")]
    NoHome,
    /// Not `owner/name`.
    #[error("{0:?} is not a repository id (owner/name)")]
    BadRepo(String),
    /// 401 or 403.
    #[error("{repo} may not be read (HTTP {status}): {advice}")]
    Denied {
        /// The repository.
        repo: String,
        /// 401 or 403.
        status: u16,
        /// What to do.
        advice: &'static str,
    },
    /// 404.
    #[error("{endpoint} has no repository {repo} with revision {revision:?} (HTTP 404)")]
    NotFound {
        /// Where was asked.
        endpoint: String,
        /// The repository.
        repo: String,
        /// The revision.
        revision: String,
    },
    /// Any other status.
    #[error("{url} answered HTTP {status}")]
    Status {
        /// What was asked for.
        url: String,
        /// The status.
        status: u16,
    },
    /// No connection, or no answer.
    #[error("{url} cannot be reached: {what}")]
    Unreachable {
        /// What was asked for.
        url: String,
        /// The transport's words.
        what: String,
    },
    /// An answer that makes no sense.
    #[error("{url} answered nonsense: {what}")]
    Protocol {
        /// What was asked for.
        url: String,
        /// What is wrong.
        what: String,
    },
    /// The bytes stopped coming, and asking again brought no more.
    #[error("{file} is truncated: got {got} of {expected} bytes ({what}); run again to resume")]
    Truncated {
        /// The file.
        file: String,
        /// Size according to the hub.
        expected: u64,
        /// Bytes that came.
        got: u64,
        /// What the last attempt saw.
        what: String,
    },
    /// All bytes came, and they are others than the hub promised.
    #[error("{file} is damaged: its SHA-256 is {got}, the hub says {expected}; it was deleted, run again")]
    Damaged {
        /// The file.
        file: String,
        /// Digest according to the hub.
        expected: String,
        /// Digest of the bytes that came.
        got: String,
    },
    /// A file name that would leave the cache.
    #[error("{repo} lists a file with an unsafe name: {file:?}")]
    UnsafeName {
        /// The repository.
        repo: String,
        /// The name.
        file: String,
    },
    /// No safetensors.
    #[error("{repo} has no safetensors files{}", hint(.found))]
    NoWeights {
        /// The repository.
        repo: String,
        /// Weights in formats that are never read.
        found: Vec<String>,
    },
    /// `HF_HUB_OFFLINE` is set and the cache does not have it.
    #[error("HF_HUB_OFFLINE is set and {repo} ({revision}) is not complete in {}: {lacking}", .cache.display())]
    Offline {
        /// The repository.
        repo: String,
        /// The revision.
        revision: String,
        /// The cache.
        cache: PathBuf,
        /// What is missing.
        lacking: String,
    },
    /// The disk.
    #[error("{}: {cause}", .path.display())]
    Disk {
        /// The file or directory.
        path: PathBuf,
        /// The system's words.
        cause: io::Error,
    },
}

impl HubError {
    /// Wraps an IO error with its path.
    pub(super) fn disk(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |cause| Self::Disk { path, cause }
    }
}

fn hint(found: &[String]) -> String {
    if found.is_empty() {
        return String::new();
    }
    format!("; it has {}, which are never read (pickle can run code)", found.join(", "))
}
