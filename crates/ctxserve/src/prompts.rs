//! What is read for prompts beside the tokenizer: the chat template, and where the user names another.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use anyhow::{Context, bail};
use ctxserve_chat::PromptFiles;

/// A larger file is refused. Known ones are under 10 MB, with every added token listed.
const MAX_BYTES: u64 = 64 << 20;

/// The files of a directory, with the template that the user named in their place: a file, or a template itself.
///
/// # Errors
/// Files that are there and cannot be read, and a template that is neither.
pub fn files(dir: Option<&Path>, template: Option<&str>) -> anyhow::Result<PromptFiles> {
    let mut files = PromptFiles::default();
    if let Some(dir) = dir {
        files.chat_template = read(&dir.join("chat_template.jinja"))?;
        let path = dir.join("tokenizer_config.json");
        if let Some(text) = read(&path)? {
            let config = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
            files.tokenizer_config = Some(config);
        }
    }
    if let Some(given) = template {
        files.chat_template = Some(match read(Path::new(given)) {
            Ok(Some(text)) => text,
            // A path has no such braces.
            _ if given.contains("{{") || given.contains("{%") => given.to_owned(),
            Ok(None) => bail!("--chat-template {given}: there is no such file"),
            Err(error) => return Err(error).context("--chat-template"),
        });
    }
    Ok(files)
}

/// The text of a regular file; `None` if there is none.
fn read(path: &Path) -> anyhow::Result<Option<String>> {
    let name = || path.display().to_string();
    match path.metadata() {
        Ok(metadata) if !metadata.is_file() => bail!("{}: not a regular file", name()),
        Ok(metadata) if metadata.len() > MAX_BYTES => bail!("{}: larger than {MAX_BYTES} bytes", name()),
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(name),
    }
    let mut text = String::new();
    let file = File::open(path).with_context(name)?;
    file.take(MAX_BYTES).read_to_string(&mut text).with_context(name)?;
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_may_have_either_file_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let found = files(Some(dir.path()), None).unwrap();
        assert!(found.chat_template.is_none() && found.tokenizer_config.is_none());
        std::fs::write(dir.path().join("chat_template.jinja"), "own").unwrap();
        std::fs::write(dir.path().join("tokenizer_config.json"), "{\"bos_token\": \"x\"}").unwrap();
        let found = files(Some(dir.path()), None).unwrap();
        assert_eq!(found.chat_template.as_deref(), Some("own"));
        assert_eq!(found.tokenizer_config.unwrap()["bos_token"], "x");
        std::fs::write(dir.path().join("tokenizer_config.json"), "{").unwrap();
        let error = format!("{:#}", files(Some(dir.path()), None).unwrap_err());
        assert!(error.contains("tokenizer_config.json"), "{error}");
    }

    #[test]
    fn the_user_s_template_wins_and_may_be_inline() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("chat_template.jinja"), "own").unwrap();
        let mine = dir.path().join("mine.jinja");
        std::fs::write(&mine, "mine").unwrap();
        let template = |given: &str| files(Some(dir.path()), Some(given)).map(|files| files.chat_template);
        assert_eq!(template(mine.to_str().unwrap()).unwrap().as_deref(), Some("mine"));
        assert_eq!(template("{{ messages }}").unwrap().as_deref(), Some("{{ messages }}"));
        let long = format!("{{% set a = 1 %}}{}", "x".repeat(5_000));
        assert_eq!(template(&long).unwrap().as_deref(), Some(long.as_str()));
        assert!(template("nothing.jinja").unwrap_err().to_string().contains("nothing.jinja"));
        assert!(template(dir.path().to_str().unwrap()).is_err());
    }
}
