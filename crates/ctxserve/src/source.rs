//! From the MODEL argument to files: a directory, a repository, the demo, or a script.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, bail};
use ctxserve_models::architectures;

use crate::cli::options::ModelOptions;
use crate::hub::{Bars, Hub, RepoId, Want};
use crate::profile;

/// What MODEL means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A small model with random weights, made in memory.
    Demo,
    /// Answers from a file.
    Replay(PathBuf),
    /// A checkpoint on disk.
    Directory(PathBuf),
    /// A repository of the hub.
    Repository(RepoId),
}

impl FromStr for Source {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        if text == "demo" {
            return Ok(Self::Demo);
        }
        if let Some(file) = text.strip_prefix("replay:") {
            return Ok(Self::Replay(file.into()));
        }
        let path = Path::new(text);
        if path.is_dir() {
            return Ok(Self::Directory(path.to_owned()));
        }
        if path.is_file() {
            bail!("{text} is a file; give the directory that holds config.json and the weights");
        }
        match text.parse() {
            Ok(repo) => Ok(Self::Repository(repo)),
            Err(_) => bail!(
                "{text:?} is neither a directory, nor a repository owner/name, nor demo, nor replay:FILE, nor a \
                 profile ({})",
                profile::names().collect::<Vec<_>>().join(", ")
            ),
        }
    }
}

/// The directory of a checkpoint: itself, or where a repository or a profile's repository is brought.
///
/// # Errors
/// What has no directory, and the hub's.
pub fn locate(text: &str) -> anyhow::Result<PathBuf> {
    let profile = profile::find(text)?;
    let place = profile.as_ref().and_then(|(_, values)| values.text("model")).unwrap_or(text);
    match place.parse()? {
        Source::Directory(dir) => Ok(dir),
        Source::Repository(repo) => {
            let options = ModelOptions { revision: "main".to_owned(), ..ModelOptions::default() };
            download(&repo, &options, Want::Model)
        }
        Source::Demo | Source::Replay(_) => bail!("{text} is no checkpoint on disk"),
    }
}

/// Brings a repository into the cache and returns where it is.
///
/// # Errors
/// The hub's, and a model that this build cannot serve, found out before its weights are fetched.
pub fn download(repo: &RepoId, options: &ModelOptions, want: Want) -> anyhow::Result<PathBuf> {
    let hub = Hub::from_env(|name| std::env::var(name).ok())
        .or_else(|error| match &options.download_dir {
            // Without a home directory the cache given by flag will do.
            Some(dir) => Hub::from_env(|name| {
                if name == "HF_HOME" { Some(dir.display().to_string()) } else { std::env::var(name).ok() }
            }),
            None => Err(error),
        })?
        .with_cache(options.download_dir.clone())
        .with_token(options.token.clone());
    let check = |dir: &Path| match want {
        Want::Model => check_architecture(dir),
        Want::Tokenizer => Ok(()),
    };
    hub.snapshot(repo, &options.revision, want, &Bars::default(), check)
}

/// Reads `config.json` alone, to refuse before gigabytes are fetched.
fn check_architecture(dir: &Path) -> anyhow::Result<()> {
    let path = dir.join("config.json");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let config: serde_json::Value =
        serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    let Some(named) = config.get("architectures").and_then(|list| list.as_array()) else { return Ok(()) };
    let named: Vec<&str> = named.iter().filter_map(|name| name.as_str()).collect();
    let known: Vec<_> = architectures().collect();
    if named.is_empty() || named.iter().any(|name| known.contains(name)) {
        return Ok(());
    }
    bail!(
        "{}: architecture {} is not supported; known are {}",
        path.display(),
        named.join(", ").chars().take(200).collect::<String>(),
        known.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_model_argument_means() {
        let of = |text: &str| text.parse::<Source>();
        assert_eq!(of("demo").unwrap(), Source::Demo);
        assert_eq!(of("replay:a/b.jsonl").unwrap(), Source::Replay("a/b.jsonl".into()));
        assert_eq!(of("src").unwrap(), Source::Directory("src".into()));
        assert_eq!(of("no/such").unwrap(), Source::Repository("no/such".parse().unwrap()));
        assert!(of("Cargo.toml").unwrap_err().to_string().contains("is a file"));
        for text in ["/no/such/dir", "./nothing", "word", ""] {
            let error = of(text).unwrap_err().to_string();
            assert!(error.contains("context-1-mxfp4"), "{error}");
        }
    }

    #[test]
    fn unknown_architectures_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let check = |config: &str| {
            std::fs::write(dir.path().join("config.json"), config).unwrap();
            check_architecture(dir.path()).map_err(|error| error.to_string())
        };
        for known in ["GptOssForCausalLM", "Qwen3ForCausalLM"] {
            assert_eq!(check(&format!("{{\"architectures\": [\"{known}\"]}}")), Ok(()));
        }
        let error = check("{\"architectures\": [\"LlamaForCausalLM\"]}").unwrap_err();
        assert!(error.contains("LlamaForCausalLM") && error.contains("GptOssForCausalLM"), "{error}");
        assert!(check("{").is_err());
    }
}
