//! The Hugging Face cache layout: `models--owner--name/{blobs,refs,snapshots}`.

use std::fmt;
use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use super::{HubError, Want};

/// `owner/name`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepoId {
    owner: String,
    name: String,
}

impl FromStr for RepoId {
    type Err = HubError;

    fn from_str(text: &str) -> Result<Self, HubError> {
        let word = |part: &str| {
            !part.is_empty()
                && part.len() <= 96
                && !part.starts_with(['.', '-'])
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        };
        match text.split_once('/') {
            Some((owner, name)) if word(owner) && word(name) => {
                Ok(Self { owner: owner.to_owned(), name: name.to_owned() })
            }
            _ => Err(HubError::BadRepo(text.to_owned())),
        }
    }
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)
    }
}

/// One repository's folder in the cache.
#[derive(Clone, Debug)]
pub struct RepoCache {
    repo: String,
    root: PathBuf,
}

impl RepoCache {
    /// The folder of `repo` under the cache directory; nothing is created yet.
    pub fn new(cache: &Path, repo: &RepoId) -> Self {
        Self { repo: repo.to_string(), root: cache.join(format!("models--{}--{}", repo.owner, repo.name)) }
    }

    /// Where a commit's files are listed by name, created if need be.
    ///
    /// # Errors
    /// A commit that is no plain word, or the disk.
    pub fn snapshot_dir(&self, commit: &str) -> Result<PathBuf, HubError> {
        let dir = self.root.join("snapshots").join(self.plain(commit)?);
        fs::create_dir_all(&dir).map_err(HubError::disk(&dir))?;
        Ok(dir)
    }

    /// Where the bytes with this etag are kept, and where they grow. The folder is created if need be.
    ///
    /// # Errors
    /// An etag that is no plain word, or the disk.
    pub fn blob(&self, etag: &str) -> Result<(PathBuf, PathBuf), HubError> {
        let dir = self.root.join("blobs");
        fs::create_dir_all(&dir).map_err(HubError::disk(&dir))?;
        let blob = dir.join(self.plain(etag)?);
        let mut growing = blob.clone().into_os_string();
        growing.push(".incomplete");
        Ok((blob, growing.into()))
    }

    /// Waits until no other process writes this blob; the lock goes with the file.
    ///
    /// # Errors
    /// The disk.
    pub fn lock(&self, etag: &str) -> Result<File, HubError> {
        let folder = self.root.file_name().unwrap_or_default();
        let dir = self.root.with_file_name(".locks").join(folder);
        fs::create_dir_all(&dir).map_err(HubError::disk(&dir))?;
        let path = dir.join(format!("{}.lock", self.plain(etag)?));
        let file = File::create(&path).map_err(HubError::disk(&path))?;
        file.lock().map_err(HubError::disk(&path))?;
        Ok(file)
    }

    /// Makes `snapshots/COMMIT/FILE` point at a blob.
    ///
    /// # Errors
    /// An unsafe file name, or the disk.
    pub fn link(&self, commit: &str, file: &str, blob: &Path) -> Result<(), HubError> {
        let to = self.snapshot_dir(commit)?.join(self.plain(file)?);
        if fs::symlink_metadata(&to).is_ok() {
            fs::remove_file(&to).map_err(HubError::disk(&to))?;
        }
        let name = blob.file_name().unwrap_or_default();
        #[cfg(unix)]
        let made = std::os::unix::fs::symlink(Path::new("../../blobs").join(name), &to);
        #[cfg(not(unix))]
        let made = fs::copy(self.root.join("blobs").join(name), &to).map(|_| ());
        made.map_err(HubError::disk(&to))
    }

    /// Remembers which commit a branch or tag meant.
    ///
    /// # Errors
    /// The disk.
    pub fn write_ref(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if revision == commit {
            return Ok(());
        }
        let path = self.root.join("refs").join(self.relative(revision)?);
        let dir = path.parent().unwrap_or(&self.root);
        fs::create_dir_all(dir).map_err(HubError::disk(dir))?;
        fs::write(&path, commit).map_err(HubError::disk(&path))
    }

    /// The snapshot of a revision, if all that is wanted of it is here.
    ///
    /// # Errors
    /// What is missing.
    pub fn find(&self, revision: &str, want: Want) -> Result<PathBuf, String> {
        let name = self.relative(revision).map_err(|error| error.to_string())?;
        let commit = fs::read_to_string(self.root.join("refs").join(&name))
            .map_or_else(|_| revision.to_owned(), |text| text.trim().to_owned());
        let commit = self.plain(&commit).map_err(|error| error.to_string())?;
        let dir = self.root.join("snapshots").join(commit);
        if !dir.is_dir() {
            return Err("it was never downloaded".to_owned());
        }
        match missing(&dir, want) {
            None => Ok(dir),
            Some(file) => Err(format!("{file} is missing")),
        }
    }

    /// A file name that stays where it is put.
    pub(super) fn plain<'a>(&self, name: &'a str) -> Result<&'a str, HubError> {
        let fine = !name.is_empty()
            && !name.starts_with('.')
            && name.len() <= 255
            && !name.contains(['/', '\\', '\0']);
        if fine { Ok(name) } else { Err(self.unsafe_name(name)) }
    }

    /// A relative path without `..`.
    fn relative(&self, name: &str) -> Result<PathBuf, HubError> {
        let path = PathBuf::from(name);
        let fine = !name.is_empty() && path.components().all(|part| matches!(part, Component::Normal(_)));
        if fine { Ok(path) } else { Err(self.unsafe_name(name)) }
    }

    fn unsafe_name(&self, name: &str) -> HubError {
        HubError::UnsafeName { repo: self.repo.clone(), file: name.to_owned() }
    }
}

/// The first file that a snapshot lacks.
fn missing(dir: &Path, want: Want) -> Option<String> {
    let lacks = |name: &str| (!dir.join(name).is_file()).then(|| name.to_owned());
    if let Some(name) = lacks("tokenizer.json") {
        return Some(name);
    }
    if want == Want::Tokenizer {
        return None;
    }
    lacks("config.json").or_else(|| {
        let index = fs::read_to_string(dir.join("model.safetensors.index.json")).ok();
        let index: Option<serde_json::Value> = index.and_then(|text| serde_json::from_str(&text).ok());
        let shards = index.as_ref().and_then(|index| index.get("weight_map")?.as_object());
        match shards {
            Some(map) => map.values().filter_map(|shard| shard.as_str()).find_map(lacks),
            None => lacks("model.safetensors"),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repository_ids_are_two_plain_words() {
        assert_eq!("a-b/c.d_1".parse::<RepoId>().unwrap().to_string(), "a-b/c.d_1");
        for bad in ["a", "a/", "/b", "a/b/c", "../b", "a/..", "a b/c", ""] {
            assert!(bad.parse::<RepoId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn names_from_the_hub_cannot_leave_the_cache() {
        let dir = tempfile::tempdir().unwrap();
        let cache = RepoCache::new(dir.path(), &"o/n".parse().unwrap());
        for bad in ["..", "../x", "/etc/passwd", "a/b", ".hidden", ""] {
            assert!(cache.blob(bad).is_err(), "{bad}");
            assert!(cache.link("c", bad, Path::new("b")).is_err(), "{bad}");
        }
        assert!(cache.write_ref("../../x", "c").is_err());
        assert!(cache.write_ref("refs/pr/3", "c").is_ok());
        assert!(cache.find("refs/pr/3", Want::Model).is_err());
    }

    #[test]
    fn an_incomplete_snapshot_says_what_it_lacks() {
        let dir = tempfile::tempdir().unwrap();
        let cache = RepoCache::new(dir.path(), &"o/n".parse().unwrap());
        let snapshot = cache.snapshot_dir("abc").unwrap();
        let put = |name: &str, text: &str| fs::write(snapshot.join(name), text).unwrap();
        let lacks = |want| cache.find("abc", want).unwrap_err();
        assert!(lacks(Want::Tokenizer).contains("tokenizer.json"));
        put("tokenizer.json", "{}");
        assert_eq!(cache.find("abc", Want::Tokenizer).unwrap(), snapshot);
        assert!(lacks(Want::Model).contains("config.json"));
        put("config.json", "{}");
        assert!(lacks(Want::Model).contains("model.safetensors"));
        put(
            "model.safetensors.index.json",
            r#"{"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}"#,
        );
        put("x.safetensors", "");
        assert!(lacks(Want::Model).contains("y.safetensors"));
        put("y.safetensors", "");
        assert!(cache.find("abc", Want::Model).is_ok());
    }
}
