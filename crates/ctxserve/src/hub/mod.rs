//! Models from a Hugging Face hub, kept in the ordinary Hugging Face cache.
//!
//! Honours `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN` (or the token file of `hf auth login`), `HF_ENDPOINT` and
//! `HF_HUB_OFFLINE`. Downloads resume where they were cut, sizes are always checked and SHA-256 digests where
//! the hub states them. Only safetensors, JSON, Jinja and text files of the repository's root are taken.
//! The token is sent to the endpoint alone, never to a host it redirects to, and never logged.

mod cache;
mod client;
mod download;
mod error;
mod progress;

use std::path::{Path, PathBuf};
use std::time::Duration;

pub use cache::{RepoCache, RepoId};
use client::Client;
pub use error::HubError;
pub use progress::{Bars, Progress, Silent};

/// How much of a repository is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Everything that serving takes.
    Model,
    /// Configuration and tokenizer, no weights.
    Tokenizer,
}

/// Where models come from and are kept.
#[derive(Clone)]
pub struct Hub {
    endpoint: String,
    token: Option<String>,
    cache: PathBuf,
    offline: bool,
    patience: Patience,
}

/// When a failing download gives up.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Attempts in a row that bring no new byte.
    pub attempts: u32,
    /// Wait before the second attempt; doubles with each.
    pub pause: Duration,
    /// Longest wait for a connection or for the next bytes.
    pub silence: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { attempts: 5, pause: Duration::from_millis(250), silence: Duration::from_secs(30) }
    }
}

impl Hub {
    /// Settings from environment variables, read through `env` (`std::env::var` but for tests).
    ///
    /// # Errors
    /// No home directory to put the cache into.
    pub fn from_env(env: impl Fn(&str) -> Option<String>) -> Result<Self, HubError> {
        let var = |name: &str| env(name).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
        let home = || {
            var("HF_HOME")
                .map(PathBuf::from)
                .or_else(|| var("XDG_CACHE_HOME").map(|dir| Path::new(&dir).join("huggingface")))
                .or_else(|| var("HOME").map(|dir| Path::new(&dir).join(".cache").join("huggingface")))
        };
        let cache = var("HF_HUB_CACHE").map(PathBuf::from).or_else(|| Some(home()?.join("hub")));
        let token_file = || var("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| Some(home()?.join("token")));
        let stored = || {
            let text = std::fs::read_to_string(token_file()?).ok()?;
            Some(text.trim().to_owned()).filter(|token| !token.is_empty())
        };
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: var("HF_TOKEN").or_else(stored),
            cache: cache.ok_or(HubError::NoHome)?,
            offline: var("HF_HUB_OFFLINE")
                .is_some_and(|v| ["1", "on", "yes", "true"].contains(&v.to_ascii_lowercase().as_str())),
            patience: Patience::default(),
        })
    }

    /// Uses this token instead of the environment's.
    #[must_use]
    pub fn with_token(mut self, token: Option<String>) -> Self {
        self.token = token.or(self.token);
        self
    }

    /// Keeps models here instead of the Hugging Face cache.
    #[must_use]
    pub fn with_cache(mut self, cache: Option<PathBuf>) -> Self {
        self.cache = cache.unwrap_or(self.cache);
        self
    }

    /// When to give up.
    #[must_use]
    pub fn with_patience(mut self, patience: Patience) -> Self {
        self.patience = patience;
        self
    }

    /// Brings a repository into the cache and returns its snapshot directory. `check` sees that directory
    /// when the configuration is there and before any weights are fetched.
    ///
    /// # Errors
    /// See [`HubError`]; `check`'s error is passed through.
    pub fn snapshot<E: From<HubError>>(
        &self,
        repo: &RepoId,
        revision: &str,
        want: Want,
        progress: &dyn Progress,
        check: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<PathBuf, E> {
        let cache = RepoCache::new(&self.cache, repo);
        if self.offline {
            let dir = cache.find(revision, want).map_err(|lacking| HubError::Offline {
                repo: repo.to_string(),
                revision: revision.to_owned(),
                cache: self.cache.clone(),
                lacking,
            })?;
            check(&dir)?;
            return Ok(dir);
        }
        let client = Client::new(&self.endpoint, self.token.clone(), self.patience.silence)?;
        let listing = match client.list(repo, revision) {
            Err(error @ HubError::Unreachable { .. }) => {
                let Ok(dir) = cache.find(revision, want) else { return Err(error.into()) };
                tracing::warn!("{error}; using the cached copy of {repo}");
                check(&dir)?;
                return Ok(dir);
            }
            other => other?,
        };
        let dir = cache.snapshot_dir(&listing.commit)?;
        let fetch = |name: &String| -> Result<(), HubError> {
            let url = client.file_url(repo, &listing.commit, name);
            download::file(&client, &url, name, &cache, &listing.commit, self.patience, progress)
        };
        for name in listing.files.iter().filter(|name| wanted(name)) {
            cache.plain(name)?;
        }
        let (weights, small): (Vec<_>, Vec<_>) =
            listing.files.iter().filter(|name| wanted(name)).cloned().partition(|name| is_weights(name));
        if want == Want::Model && weights.is_empty() {
            let found = listing.files.iter().filter(|name| foreign_weights(name)).cloned().collect();
            return Err(HubError::NoWeights { repo: repo.to_string(), found }.into());
        }
        small.iter().try_for_each(fetch)?;
        check(&dir)?;
        if want == Want::Model {
            weights.iter().try_for_each(fetch)?;
        }
        cache.write_ref(revision, &listing.commit)?;
        Ok(dir)
    }
}

/// Files that serving reads: weights, configuration and tokenizer in the repository's root.
fn wanted(name: &str) -> bool {
    let extension = name.rsplit_once('.').map_or("", |(_, extension)| extension);
    !name.contains('/')
        && !name.starts_with("consolidated")
        && ["safetensors", "json", "jinja", "txt"].contains(&extension)
}

fn is_weights(name: &str) -> bool {
    name.ends_with(".safetensors")
}

fn foreign_weights(name: &str) -> bool {
    [".bin", ".pt", ".pth", ".gguf", ".h5", ".onnx", ".npz"].iter().any(|suffix| name.ends_with(suffix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_that_serving_reads_are_taken() {
        for name in
            ["model.safetensors", "model-00001-of-00003.safetensors", "config.json", "chat_template.jinja"]
        {
            assert!(wanted(name), "{name}");
        }
        for name in [
            "pytorch_model.bin",
            "original/model.safetensors",
            "metal/model.bin",
            "x.gguf",
            "modeling.py",
            "README.md",
        ] {
            assert!(!wanted(name), "{name}");
        }
    }

    #[test]
    fn the_environment_is_read_as_the_python_package_does() {
        let hub = |vars: &[(&str, &str)]| {
            let vars: Vec<_> = vars.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect();
            Hub::from_env(move |name| vars.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone()))
        };
        let plain = hub(&[("HOME", "/h")]).unwrap();
        assert_eq!(plain.cache, Path::new("/h/.cache/huggingface/hub"));
        assert_eq!((plain.endpoint.as_str(), plain.offline), ("https://huggingface.co", false));
        let set = hub(&[
            ("HF_HOME", "/x"),
            ("HF_ENDPOINT", "http://mirror/"),
            ("HF_TOKEN", " secret\n"),
            ("HF_HUB_OFFLINE", "1"),
        ])
        .unwrap();
        assert_eq!(set.cache, Path::new("/x/hub"));
        assert_eq!((set.endpoint.as_str(), set.offline), ("http://mirror", true));
        assert_eq!(set.token.as_deref(), Some("secret"));
        assert_eq!(hub(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/x")]).unwrap().cache, Path::new("/c"));
        assert!(matches!(hub(&[]), Err(HubError::NoHome)));
    }
}
