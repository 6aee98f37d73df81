//! Why a model does not load.

use ctxserve_backend::DeviceError;
use ctxserve_checkpoint::CheckpointError;
use thiserror::Error;

/// A configuration value that is missing, out of range or at odds with another.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{field}: {what}")]
pub struct ConfigError {
    /// The field as the file spells it, with its path: `rope_scaling.factor`.
    pub field: String,
    /// What is wrong, with the value and the bound.
    pub what: String,
}

impl ConfigError {
    pub(crate) fn new(field: impl Into<String>, what: impl Into<String>) -> Self {
        Self { field: field.into(), what: what.into() }
    }
}

/// Why a model does not load.
#[derive(Debug, Error)]
pub enum LoadError {
    /// No family serves this architecture.
    #[error("config.json: architecture {found} is not supported; known are {known}")]
    UnknownArchitecture {
        /// `architectures`, or `model_type` without it, as the file has it.
        found: String,
        /// Every architecture of the registry.
        known: String,
    },
    /// A value of a configuration file is unusable.
    #[error("{file}: {error}")]
    Config {
        /// `config.json` or `generation_config.json`.
        file: &'static str,
        /// The field and what is wrong with it.
        error: ConfigError,
    },
    /// An option of the server is unusable.
    #[error("load options: {0}")]
    Options(ConfigError),
    /// The checkpoint lacks a tensor, has one too many, or cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The device refused the weights.
    #[error(transparent)]
    Device(#[from] DeviceError),
}
