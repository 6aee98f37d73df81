//! The families this build knows: one row each.

use ctxserve_backend::Backend;
use ctxserve_checkpoint::{Checkpoint, Want};
use serde_json::Value;

use crate::{LoadError, LoadOptions, LoadProgress, Model, ModelInfo, gpt_oss, qwen3};

/// How a configuration names a family, and how to inspect it without a device.
pub(crate) struct Family {
    /// Values of `architectures`.
    pub(crate) architectures: &'static [&'static str],
    /// Values of `model_type`, read where `architectures` is absent.
    pub(crate) model_types: &'static [&'static str],
    /// Checks configuration and tensor headers.
    pub(crate) inspect: fn(&Checkpoint, &LoadOptions) -> Result<ModelInfo, LoadError>,
    /// Checks the same and returns every tensor that the model is made of.
    pub(crate) wants: fn(&Checkpoint) -> Result<Vec<Want>, LoadError>,
}

type Load<B> = fn(
    &Checkpoint,
    &mut B,
    &LoadOptions,
    &mut dyn FnMut(LoadProgress),
) -> Result<Box<dyn Model<B>>, LoadError>;

/// Lists the modules that hold a `FAMILY` and a generic `load`. The table is a macro because a generic function has
/// no place in a constant.
macro_rules! families {
    ($($module:ident),+ $(,)?) => {
        const FAMILIES: &[Family] = &[$($module::FAMILY),+];

        /// The loaders, in the order of [`FAMILIES`].
        fn loaders<B: Backend>() -> [Load<B>; FAMILIES.len()] {
            [$($module::load::<B>),+]
        }
    };
}

families! {
    gpt_oss,
    qwen3,
}

impl Family {
    fn serves(&self, name: &str) -> bool {
        self.architectures.contains(&name) || self.model_types.contains(&name)
    }
}

/// Every architecture that can be served.
pub fn architectures() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().flat_map(|family| family.architectures).copied()
}

/// The names in a configuration that decide its family: `architectures`, or `model_type` without it.
fn names(config: &Value) -> Vec<&str> {
    match config.get("architectures") {
        Some(Value::Array(list)) if !list.is_empty() => list.iter().filter_map(Value::as_str).collect(),
        _ => config.get("model_type").and_then(Value::as_str).into_iter().collect(),
    }
}

/// Index into [`FAMILIES`].
fn find(config: &Value) -> Result<usize, LoadError> {
    let names = names(config);
    let serves = |family: &Family| names.iter().any(|name| family.serves(name));
    FAMILIES.iter().position(serves).ok_or_else(|| {
        // The file is not trusted: neither is the length of what it calls itself.
        let found: String = names.join(", ").chars().take(200).collect();
        let found = if found.is_empty() { "(none named)".to_owned() } else { found };
        LoadError::UnknownArchitecture { found, known: architectures().collect::<Vec<_>>().join(", ") }
    })
}

/// Checks configuration and tensor headers and returns the model's facts. Reads no weights and needs no device.
///
/// # Errors
/// An unknown architecture, a bad configuration, or tensors that do not fit it.
pub fn inspect(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<ModelInfo, LoadError> {
    options.check().map_err(LoadError::Options)?;
    (FAMILIES[find(checkpoint.config())?].inspect)(checkpoint, options)
}

/// Every tensor that the model of a checkpoint is made of, in the order in which they are loaded. Checks what [`inspect`]
/// checks of configuration and tensor headers.
///
/// # Errors
/// An unknown architecture, a bad configuration, or tensors that do not fit it.
pub fn wants(checkpoint: &Checkpoint) -> Result<Vec<Want>, LoadError> {
    (FAMILIES[find(checkpoint.config())?].wants)(checkpoint)
}

/// Loads a model onto a backend, after every check that the headers allow. Weights pass through layer by layer, one
/// being read while the backend takes the one before: besides the checkpoint and the backend's own copy, two layers (or
/// a layer and a table of the vocabulary) are in memory at a time.
///
/// # Errors
/// What [`inspect`] refuses; weights that cannot be read; a device that refuses them.
pub fn load<B: Backend>(
    checkpoint: &Checkpoint,
    backend: &mut B,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Box<dyn Model<B>>, LoadError> {
    options.check().map_err(LoadError::Options)?;
    let load = loaders::<B>()[find(checkpoint.config())?];
    load(checkpoint, backend, options, progress)
}
