//! A model ready to be started: weights or script, tokenizer, chat format, names.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, bail};
use ctxserve_chat::{ChatFormat, PromptFiles, Tokenizer, demo_tokenizer_json, formats};
use ctxserve_checkpoint::Checkpoint;
use ctxserve_core::TokenId;
use ctxserve_engine::{Bytes, ScriptedRunner};
use ctxserve_models::demo::{self, DemoSpec};
use ctxserve_models::wants;
use serde_json::Value;

use crate::cli::options::ModelOptions;
use crate::hub::Want;
use crate::lines::sequences;
use crate::profile;
use crate::prompts;
use crate::source::{Source, download};

/// Chat formats of model families, where neither flag nor profile names one.
const FAMILY_FORMATS: &[(&str, &str)] = &[("gpt_oss", "harmony"), ("qwen3", "hermes")];
/// Format of scripts and of the demo.
pub const DEFAULT_FORMAT: &str = "harmony";
/// Context of a scripted model.
const REPLAY_CONTEXT: usize = 131_072;
const DEMO_SEED: u64 = 1;
/// Formats whose experts `--quantization mxfp4` quantises.
const QUANTISED_FROM: [&str; 2] = ["dense", "mlx"];

/// What answers.
#[derive(Debug)]
pub enum Body {
    /// A checkpoint, still to be loaded onto a device.
    Checkpoint(Checkpoint),
    /// A script.
    Script(ScriptedRunner),
}

/// A model, but for its weights.
pub struct Model {
    /// What answers.
    pub body: Body,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// What its family speaks, unless told otherwise.
    pub default_format: &'static str,
    /// The name it is served under without `--served-model-name`.
    pub name: String,
    /// Where it came from, for people and `/v1/models`.
    pub root: String,
    /// Where files beside the tokenizer are, if anywhere.
    prompts: Option<PathBuf>,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("name", &self.name).field("root", &self.root).finish_non_exhaustive()
    }
}

impl Model {
    /// Finds, downloads if need be, and opens a model; reads headers and tokenizer, no weights.
    ///
    /// # Errors
    /// Whatever makes it unusable.
    pub fn open(source: &Source, name: &str, options: &ModelOptions) -> anyhow::Result<Self> {
        match source {
            Source::Demo => Self::demo(options),
            Source::Replay(file) => Self::replay(file, options),
            Source::Directory(dir) => Self::directory(dir, name, options),
            Source::Repository(repo) => {
                let dir = download(repo, options, Want::Model)?;
                let model = Self::directory(&dir, name, options)?;
                Ok(Self { root: format!("{repo} ({})", options.revision), ..model })
            }
        }
    }

    fn demo(options: &ModelOptions) -> anyhow::Result<Self> {
        let tokenizer = tokenizer(options.tokenizer.as_deref(), || Ok(Some(demo_tokenizer_json().to_vec())))?;
        let format = formats::open(DEFAULT_FORMAT, Arc::clone(&tokenizer), &PromptFiles::default())?;
        let spec = demo_spec(&tokenizer, &*format);
        let checkpoint = demo::checkpoint(&spec).context("making the demo model")?;
        Ok(Self {
            body: Body::Checkpoint(checkpoint),
            tokenizer,
            default_format: DEFAULT_FORMAT,
            name: "demo".to_owned(),
            root: "demo (random weights, made in memory)".to_owned(),
            prompts: options.tokenizer.as_deref().map(beside),
        })
    }

    fn replay(file: &Path, options: &ModelOptions) -> anyhow::Result<Self> {
        let tokenizer = tokenizer(options.tokenizer.as_deref(), || Ok(Some(demo_tokenizer_json().to_vec())))?;
        let open = File::open(file).with_context(|| file.display().to_string())?;
        let mut script = Vec::new();
        for line in sequences(BufReader::new(open), &tokenizer) {
            let (number, ids) = line.with_context(|| file.display().to_string())?;
            match ids {
                Ok(ids) => script.push(ids),
                Err(what) => bail!("{}, line {number}: {what}", file.display()),
            }
        }
        if script.is_empty() {
            bail!("{} has no answers to replay", file.display());
        }
        // A script may say ids that the tokenizer does not have: the parser has to bear them.
        let highest = script.iter().flatten().copied().max().unwrap_or(0) as usize;
        let vocab = tokenizer.len().max(highest.saturating_add(1));
        let root = format!("replay of {} answers from {}", script.len(), file.display());
        Ok(Self {
            body: Body::Script(ScriptedRunner::new(vocab, REPLAY_CONTEXT, script)),
            tokenizer,
            default_format: DEFAULT_FORMAT,
            name: "replay".to_owned(),
            root,
            prompts: options.tokenizer.as_deref().map(beside),
        })
    }

    fn directory(dir: &Path, name: &str, options: &ModelOptions) -> anyhow::Result<Self> {
        let checkpoint = Checkpoint::open(dir)?;
        let tokenizer = tokenizer(options.tokenizer.as_deref(), || Ok(checkpoint.tokenizer_json()?))
            .with_context(|| format!("the tokenizer of {}", dir.display()))?;
        let checkpoint = match &options.quantization {
            Some(said) => stored_or_quantised(checkpoint, said, dir)?,
            None => checkpoint,
        };
        Ok(Self {
            body: Body::Checkpoint(checkpoint),
            tokenizer,
            default_format: DEFAULT_FORMAT,
            name: name.to_owned(),
            root: dir.display().to_string(),
            prompts: Some(options.tokenizer.as_deref().map_or_else(|| dir.to_owned(), beside)),
        })
    }

    /// The chat format asked for, or that of the family; `template` is the user's, a file or a template itself.
    ///
    /// # Errors
    /// An unknown format, one whose control tokens the tokenizer lacks, and a template that cannot be used.
    pub fn format(
        &self,
        asked: Option<&str>,
        family: Option<&str>,
        template: Option<&str>,
    ) -> anyhow::Result<Arc<dyn ChatFormat>> {
        let name = asked.unwrap_or_else(|| family.map_or(self.default_format, format_of));
        open_format(name, &self.tokenizer, self.prompts.as_deref(), template)
    }

    /// `generation_config.json`, if the model has one.
    pub fn generation_config(&self) -> Option<&Value> {
        match &self.body {
            Body::Checkpoint(checkpoint) => checkpoint.generation_config(),
            Body::Script(_) => None,
        }
    }
}

/// Binds a chat format to a tokenizer and the files beside it.
///
/// # Errors
/// As [`Model::format`].
pub fn open_format(
    name: &str,
    tokenizer: &Arc<Tokenizer>,
    dir: Option<&Path>,
    template: Option<&str>,
) -> anyhow::Result<Arc<dyn ChatFormat>> {
    let files = if formats::uses_template(name) {
        prompts::files(dir, template)?
    } else if template.is_some() {
        bail!("--chat-template: {name} renders prompts token by token, without a template");
    } else {
        PromptFiles::default()
    };
    Ok(formats::open(name, Arc::clone(tokenizer), &files)?)
}

/// The directory of a tokenizer, which may be named itself.
fn beside(tokenizer: &Path) -> PathBuf {
    if tokenizer.is_dir() {
        tokenizer.to_owned()
    } else {
        tokenizer.parent().map(Path::to_owned).unwrap_or_default()
    }
}

/// The chat format that a model family speaks.
pub fn format_of(family: &str) -> &'static str {
    FAMILY_FORMATS.iter().find(|(name, _)| *name == family).map_or(DEFAULT_FORMAT, |(_, format)| format)
}

/// A checkpoint as `--quantization` has it: stored so, or with experts that are quantised while they load.
fn stored_or_quantised(checkpoint: Checkpoint, said: &str, dir: &Path) -> anyhow::Result<Checkpoint> {
    let found = checkpoint.format_name();
    if stored_as(said) == found {
        return Ok(checkpoint);
    }
    if said != "mxfp4" || !QUANTISED_FROM.contains(&found) {
        bail!("--quantization {said}: {} is stored as {found}", dir.display());
    }
    let stored = checkpoint.total_bytes();
    let quantised = wants(&checkpoint)
        .map_err(anyhow::Error::from)
        .and_then(|wants| Ok(checkpoint.with_experts_in_mxfp4(&wants)?))
        .with_context(|| format!("--quantization mxfp4: {} is stored as {found}", dir.display()))?;
    let bytes = |bytes: u64| Bytes(usize::try_from(bytes).unwrap_or(usize::MAX));
    tracing::info!(
        "--quantization mxfp4: the experts, stored as {found}, are quantised to MXFP4 while they load; {} of weights become {}",
        bytes(stored),
        bytes(quantised.total_bytes()),
    );
    Ok(quantised)
}

/// The storage format that a name of `--quantization` means: vLLM names tools, and some twice.
fn stored_as(name: &str) -> &str {
    match name {
        "modelopt" | "modelopt_fp4" | "compressed-tensors" => "nvfp4",
        name => name,
    }
}

/// What makes random weights look like an answer: a message that opens and ends, without stray control tokens.
fn demo_spec(tokenizer: &Tokenizer, format: &dyn ChatFormat) -> DemoSpec {
    let control = |text: &str| tokenizer.special_id(text);
    let mut opening: Vec<TokenId> = tokenizer.encode("assistant").last().copied().into_iter().collect();
    opening.extend(control("<|channel|>"));
    opening.extend(tokenizer.encode("final"));
    opening.extend(control("<|message|>"));
    let ends = control("<|return|>");
    let others = format.stop_ids().iter().copied().filter(|id| Some(*id) != ends);
    DemoSpec {
        seed: DEMO_SEED,
        vocab_size: tokenizer.len(),
        eos: ends.into_iter().chain(others).collect(),
        avoids: tokenizer.special_tokens().map(|(_, id)| id).filter(|id| Some(*id) != ends).collect(),
        follows: opening.windows(2).map(|pair| (pair[0], pair[1])).collect(),
    }
}

/// The tokenizer at `path` (a file, or a directory with `tokenizer.json`), or the one that `otherwise` has.
fn tokenizer(
    path: Option<&Path>,
    otherwise: impl FnOnce() -> anyhow::Result<Option<Vec<u8>>>,
) -> anyhow::Result<Arc<Tokenizer>> {
    let tokenizer = match path {
        Some(path) => Tokenizer::from_file(tokenizer_file(path))?,
        None => match otherwise()? {
            Some(json) => Tokenizer::from_bytes(&json)?,
            None => bail!("there is no tokenizer.json; name one with --tokenizer"),
        },
    };
    Ok(Arc::new(tokenizer))
}

fn tokenizer_file(path: &Path) -> PathBuf {
    if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() }
}

/// The tokenizer that `--model` of `render` and `parse` names, the demo's without one, and where it is.
///
/// # Errors
/// No tokenizer there.
pub fn tokenizer_of(model: Option<&str>) -> anyhow::Result<(Arc<Tokenizer>, Option<PathBuf>)> {
    let Some(model) = model.filter(|&model| model != "demo") else {
        return Ok((tokenizer(None, || Ok(Some(demo_tokenizer_json().to_vec())))?, None));
    };
    let mut path = PathBuf::from(model);
    if !path.exists() {
        let profile = profile::find(model)?;
        let repo = profile.as_ref().and_then(|(_, values)| values.text("model")).unwrap_or(model);
        path = match Source::from_str(repo)? {
            Source::Repository(repo) => {
                let options = ModelOptions { revision: "main".to_owned(), ..ModelOptions::default() };
                download(&repo, &options, Want::Tokenizer)?
            }
            _ => bail!("{model} has no tokenizer of its own"),
        };
    }
    Ok((tokenizer(Some(&path), || Ok(None))?, Some(beside(&path))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> ModelOptions {
        ModelOptions::default()
    }

    #[test]
    fn the_demo_opens_without_any_file() {
        let model = Model::open(&Source::Demo, "demo", &options()).unwrap();
        assert_eq!(model.name, "demo");
        assert_eq!(model.format(None, Some("gpt_oss"), None).unwrap().name(), "harmony");
        let error =
            |asked, family, template| model.format(asked, family, template).err().unwrap().to_string();
        assert!(error(Some("nonsense"), None, None).contains("nonsense"));
        assert!(error(None, Some("qwen3"), None).contains("hermes needs the token <|im_start|>"));
        assert!(error(None, None, Some("{{ a }}")).contains("--chat-template: harmony"));
    }

    #[test]
    fn a_replay_names_its_bad_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("answers.jsonl");
        let open = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Model::open(&Source::Replay(path.clone()), "x", &options()).map_err(|error| format!("{error:#}"))
        };
        assert!(open("{\"token_ids\":[1]}\n").unwrap().root.contains("1 answers"));
        assert!(open("{\"token_ids\":[1]}\nwhat\n").unwrap_err().contains("line 2"));
        assert!(open("\n").unwrap_err().contains("no answers"));
    }

    #[test]
    fn a_directory_without_a_model_says_what_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let source = Source::Directory(dir.path().to_owned());
        let error = format!("{:#}", Model::open(&source, "x", &options()).unwrap_err());
        assert!(error.contains("config.json"), "{error}");
    }

    #[test]
    fn a_format_is_asserted_by_its_name_or_by_vllm_s() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &[u8]| std::fs::write(dir.path().join(name), text).unwrap();
        write(
            "config.json",
            br#"{"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}"#,
        );
        let header = br#"{"a.weight_scale":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#;
        write("model.safetensors", &[&(header.len() as u64).to_le_bytes()[..], header].concat());
        write("tokenizer.json", demo_tokenizer_json());
        let open = |name: &str| {
            let options = ModelOptions { quantization: Some(name.to_owned()), ..options() };
            Model::open(&Source::Directory(dir.path().to_owned()), "x", &options)
                .map_err(|error| error.to_string())
        };
        for name in ["nvfp4", "modelopt", "modelopt_fp4", "compressed-tensors"] {
            assert!(open(name).is_ok(), "{name}");
        }
        for name in ["mxfp4", "mlx", "gptq"] {
            let error = open(name).unwrap_err();
            assert!(error.contains(name) && error.ends_with("is stored as nvfp4"), "{error}");
        }
    }

    #[test]
    fn experts_that_are_not_packed_are_quantised_on_request() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        std::fs::write(&path, demo_tokenizer_json()).unwrap();
        let open = |golden: &str, quantization: Option<&str>| {
            let at = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(golden);
            let quantization = quantization.map(str::to_owned);
            let options = ModelOptions { quantization, tokenizer: Some(path.clone()), ..options() };
            let model = Model::open(&Source::Directory(at), "x", &options);
            model.map_err(|error| format!("{error:#}")).map(|model| match model.body {
                Body::Checkpoint(checkpoint) => checkpoint.total_bytes(),
                Body::Script(_) => 0,
            })
        };
        let packed = open("mxfp4", Some("mxfp4")).unwrap();
        assert_eq!(packed, open("mxfp4", None).unwrap());
        assert_eq!(open("dense", Some("mxfp4")).unwrap(), packed);
        assert!(open("dense", None).unwrap() > packed && open("dense", Some("dense")).unwrap() > packed);
        assert!(open("mlx", Some("mxfp4")).is_ok());
        for (golden, quantization, wanted) in [
            ("dense", "nvfp4", "is stored as dense"),
            ("mxfp4", "dense", "is stored as mxfp4"),
            ("qwen3", "mxfp4", "no expert stacks"),
            ("qwen3_nvfp4", "mxfp4", "is stored as nvfp4"),
        ] {
            let error = open(golden, Some(quantization)).unwrap_err();
            assert!(error.contains(quantization) && error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn tools_take_a_tokenizer_from_file_or_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        std::fs::write(&path, demo_tokenizer_json()).unwrap();
        let demo = tokenizer_of(None).unwrap().0.len();
        for place in [dir.path(), path.as_path()] {
            let (tokenizer, beside) = tokenizer_of(place.to_str()).unwrap();
            assert_eq!((tokenizer.len(), beside.as_deref()), (demo, Some(dir.path())));
        }
        assert!(tokenizer_of(Some("word")).is_err());
    }
}
