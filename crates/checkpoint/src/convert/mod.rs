//! From one storage format to another.
//!
//! [`convert`] reads one matrix, one expert or some rows of a table at a time, so memory does not grow with the model. What
//! it writes goes to `DST.partial`; `DST` appears by renaming when everything is there and was read back. A run that was
//! ended goes on with the files that it had finished, if source and format are still the same.

mod blocks;
mod files;
mod journal;
mod mxfp4;
mod nvfp4;
mod plan;
mod report;
mod write;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::check::Want;
use crate::checkpoint::Checkpoint;
use crate::error::CheckpointError;
use journal::{Journal, io_error};
pub(crate) use mxfp4::encode_rows;
use plan::{Plan, Shard};
pub use report::{ConvertReport, TensorReport};

/// Who wrote a checkpoint.
const TOOL: &str = "ctxserve";

/// What is written about a conversion, in the directory that it made.
const REPORT: &str = "convert-report.json";

/// A format that is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Hugging Face MXFP4: expert stacks packed, the rest BF16.
    Mxfp4,
    /// NVFP4 in ModelOpt's layout: the projections of dense layers packed, the rest BF16. `input_scale` comes from
    /// [`Conversion::inputs`].
    Nvfp4,
    /// All in BF16.
    Bf16,
}

impl Target {
    /// All, in the order in which they are listed.
    pub const ALL: [Self; 3] = [Self::Mxfp4, Self::Nvfp4, Self::Bf16];

    /// As it is written and read.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mxfp4 => "mxfp4",
            Self::Nvfp4 => "nvfp4",
            Self::Bf16 => "bf16",
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = || Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|target| target.name() == text);
        found.ok_or_else(|| format!("{text:?} is not one of {}", names()))
    }
}

/// What is converted, to what, and to where.
#[derive(Clone, Copy, Debug)]
pub struct Conversion<'a> {
    /// Read, never written to.
    pub source: &'a Checkpoint,
    /// Every tensor of the model.
    pub wants: &'a [Want],
    /// The format to write.
    pub target: Target,
    /// The directory to make. Its parent must exist.
    pub to: &'a Path,
    /// Most bytes of a file of weights, one tensor at least.
    pub shard_bytes: u64,
    /// The largest magnitude that each module, such as `model.layers.0.mlp.up_proj`, met in its inputs. NVFP4's `input_scale`
    /// is made of it, of the largest where several modules have the same input. Where nothing is known of a module, the source's
    /// factor is kept, and is 1 if it had none.
    pub inputs: &'a BTreeMap<String, f32>,
}

/// How far a conversion has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvertProgress<'a> {
    /// Bytes of the source that are converted.
    pub done: u64,
    /// Bytes of the source.
    pub total: u64,
    /// The tensor that was read last; empty where a file of an earlier run was found.
    pub tensor: &'a str,
}

/// Converts, or goes on with a conversion that was ended.
///
/// # Errors
/// A target that is there already or lies in the source, a model that the format cannot hold, weights that cannot be read
/// or are not finite, inputs that were not, a refusal of the system. The source is as it was, and what was finished is kept for the next run.
pub fn convert(
    conversion: &Conversion<'_>,
    progress: &mut dyn FnMut(ConvertProgress<'_>),
) -> Result<ConvertReport, CheckpointError> {
    let Conversion { source, wants, target, to, shard_bytes, inputs } = *conversion;
    source.check(wants)?;
    let (partial, parent) = places(source, to)?;
    let refused = |problem| CheckpointError::File { file: to.display().to_string(), problem };
    let plan = plan::plan(wants, target, shard_bytes).map_err(refused)?;
    let inputs = plan.inputs(inputs).map_err(refused)?;
    let calibrated = inputs.iter().filter(|input| input.is_some()).count();
    let mut journal = Journal::open(&partial, &fingerprint(conversion)?)?;
    tidy(&partial, &plan)?;
    let mut writer = write::Writer::new(source, &plan, &inputs, progress)?;
    let mut tensors = Vec::new();
    for shard in &plan.shards {
        if let Some(done) = journal.finished(&partial, &shard.file)? {
            tensors.extend(done.tensors.iter().cloned());
            writer.skip(shard)?;
            continue;
        }
        let reports = writer.shard(shard, &partial)?;
        // A file counts once its name is on disk.
        sync(&partial)?;
        journal.record(&partial, &shard.file, reports.clone())?;
        tensors.extend(reports);
    }
    index(&plan.shards, &partial)?;
    files::write(source, target, &plan.excluded, &partial)?;
    let report = ConvertReport::new(source.format_name(), target, calibrated, tensors);
    files::write_json(&partial.join(REPORT), &report.to_json())?;
    // What cannot be opened here is not handed over.
    Checkpoint::open(&partial)?.check(wants)?;
    sync(&partial)?;
    free(to)?;
    fs::rename(&partial, to).map_err(|source| io_error(to, source))?;
    sync(&parent)?;
    journal.remove()?;
    Ok(report)
}

/// `DST.partial` and the directory that both lie in.
fn places(source: &Checkpoint, to: &Path) -> Result<(PathBuf, PathBuf), CheckpointError> {
    let refuse = |problem: &str| {
        Err(CheckpointError::File { file: to.display().to_string(), problem: problem.to_owned() })
    };
    let Some(name) = to.file_name() else { return refuse("does not name a directory to make") };
    free(to)?;
    let parent = match to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let parent = parent.canonicalize().map_err(|source| io_error(parent, source))?;
    if let Some(dir) = source.dir() {
        let dir = dir.canonicalize().map_err(|source| io_error(dir, source))?;
        if parent.starts_with(&dir) {
            return refuse("lies in the source, which is never written to");
        }
    }
    let mut partial = name.to_owned();
    partial.push(".partial");
    Ok((parent.join(partial), parent))
}

/// Refuses a target that exists.
fn free(to: &Path) -> Result<(), CheckpointError> {
    match to.symlink_metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(io_error(to, source)),
        Ok(_) => {
            let problem = "is there already, and nothing is overwritten".to_owned();
            Err(CheckpointError::File { file: to.display().to_string(), problem })
        }
    }
}

/// Removes what a run that was ended has left half written.
fn tidy(partial: &Path, plan: &Plan) -> Result<(), CheckpointError> {
    let io = |source| io_error(partial, source);
    for entry in fs::read_dir(partial).map_err(io)? {
        let entry = entry.map_err(io)?;
        let name = entry.file_name();
        let ours = |shard: &Shard| name.to_string_lossy().starts_with(&format!(".{}.", shard.file));
        if plan.shards.iter().any(ours) {
            fs::remove_file(entry.path()).map_err(|source| io_error(&entry.path(), source))?;
        }
    }
    Ok(())
}

/// Makes the names in a directory durable.
fn sync(dir: &Path) -> Result<(), CheckpointError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|source| io_error(dir, source))
}

/// The list of which tensor is in which file, where there are several.
fn index(shards: &[Shard], partial: &Path) -> Result<(), CheckpointError> {
    if shards.len() < 2 {
        return Ok(());
    }
    let mut map = serde_json::Map::new();
    let mut total = 0;
    for shard in shards {
        for spec in shard.items.iter().flat_map(|item| &item.specs) {
            map.insert(spec.name.clone(), Value::from(shard.file.as_str()));
            let dims: Vec<u64> = spec.shape.iter().map(|&dim| dim as u64).collect();
            total += spec.dtype.bytes(&dims).unwrap_or_default();
        }
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": map});
    files::write_json(&partial.join("model.safetensors.index.json"), &index)
}

/// Says which conversion it is: of these files, in this state, to this.
fn fingerprint(conversion: &Conversion<'_>) -> Result<String, CheckpointError> {
    let Conversion { source, wants, target, shard_bytes, inputs, .. } = *conversion;
    let mut hash = Sha256::new();
    let version = env!("CARGO_PKG_VERSION");
    let configuration = [Some(source.config()), source.generation_config()];
    hash.update(format!("{TOOL} {version} {target} {shard_bytes} {configuration:?} {wants:?} {inputs:?}"));
    source.describe_files(&mut |line| hash.update(line))?;
    Ok(journal::hex(&hash.finalize()))
}
