//! Serving profiles of known models: the files of `configs/`, compiled in.
//!
//! A profile is a `--config` file that says which repository to serve and how; flags and the user's own file win.

use crate::cli::values::{OptionError, Origin, Values, from_toml};

const PROFILES: &[(&str, &str)] = &[
    ("context-1-mxfp4", include_str!("../../../configs/context-1-mxfp4.toml")),
    ("gpt-oss-20b", include_str!("../../../configs/gpt-oss-20b.toml")),
    ("gpt-oss-120b", include_str!("../../../configs/gpt-oss-120b.toml")),
    ("fastcontext-1.0-4b-nvfp4", include_str!("../../../configs/fastcontext-1.0-4b-nvfp4.toml")),
    ("fastcontext-1.0-4b", include_str!("../../../configs/fastcontext-1.0-4b.toml")),
    ("qwen3-4b-instruct-2507", include_str!("../../../configs/qwen3-4b-instruct-2507.toml")),
    ("qwen3-4b-thinking-2507", include_str!("../../../configs/qwen3-4b-thinking-2507.toml")),
];

/// Names of the profiles.
pub fn names() -> impl Iterator<Item = &'static str> {
    PROFILES.iter().map(|(name, _)| *name)
}

/// The profile with this name, or for this repository.
///
/// # Errors
/// A profile that does not read: a mistake in this build, which a test rules out.
pub fn find(model: &str) -> Result<Option<(&'static str, Values)>, OptionError> {
    for &(name, text) in PROFILES {
        let values = from_toml(text, &Origin::Profile(name))?;
        if name == model || values.text("model") == Some(model) {
            return Ok(Some((name, values)));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::options::ServeOptions;

    #[test]
    fn every_profile_reads_and_names_a_repository() {
        for name in names() {
            let (found, values) = find(name).unwrap().unwrap();
            assert_eq!(found, name);
            let options = ServeOptions::new(&values, |_| None).unwrap();
            let model = options.model.model.unwrap();
            assert!(model.parse::<crate::hub::RepoId>().is_ok(), "{model}");
            assert!(options.model.served_names.contains(&name.to_owned()));
            assert!(!options.engine.strict_len && options.notes.is_empty(), "{name}");
            assert_eq!(find(&model).unwrap().unwrap().0, name);
        }
        assert!(find("demo").unwrap().is_none());
    }

    #[test]
    fn every_file_of_configs_is_a_profile() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
        let mut files: Vec<_> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
            .collect();
        files.sort();
        let mut known: Vec<_> = names().map(str::to_owned).collect();
        known.sort();
        assert_eq!(files, known);
    }
}
