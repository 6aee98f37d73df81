//! Qwen3: a decoder of full attention, whose query and key heads are normed before they are rotated, and dense SwiGLU.
//!
//! ```text
//! x = E[token]
//! for each layer:
//!     x = x + Attn(RMS(x))
//!     x = x + W_down * (silu(W_gate * RMS(x)) . W_up * RMS(x))
//! logits = W * RMS(x)
//! ```

mod config;
mod forward;
mod weights;

use ctxserve_backend::Backend;
use ctxserve_checkpoint::{Checkpoint, Want};

use crate::eos;
use crate::registry::Family;
use crate::{LoadError, LoadOptions, LoadProgress, Model, ModelInfo, rope_table};

pub use config::Config;

pub(crate) const FAMILY: Family =
    Family { architectures: &["Qwen3ForCausalLM"], model_types: &["qwen3"], inspect, wants };

/// Reads the configuration and holds the tensor headers against it.
fn check(checkpoint: &Checkpoint) -> Result<Config, LoadError> {
    let config = Config::read(checkpoint.config())
        .map_err(|error| LoadError::Config { file: "config.json", error })?;
    checkpoint.check(&weights::wants(&config))?;
    Ok(config)
}

fn info(config: &Config, checkpoint: &Checkpoint, options: &LoadOptions) -> Result<ModelInfo, LoadError> {
    let Config { layers, hidden, inner, max_context, .. } = *config;
    let format = checkpoint.format_name();
    Ok(ModelInfo {
        family: "qwen3",
        description: format!(
            "qwen3, {format}: {layers} layers of width {hidden}, dense layers of {inner}, {max_context} positions"
        ),
        vocab_size: config.vocab,
        max_context,
        layers,
        kv: config.kv_spec(options),
        eos: eos::read(checkpoint, config.vocab)?,
        weight_bytes: checkpoint.total_bytes(),
        weight_bytes_on_gpu: config.frame().gpu_bytes(checkpoint, &weights::wants(config))?,
        costs: weights::costs(config, checkpoint)?,
    })
}

pub(crate) fn inspect(checkpoint: &Checkpoint, options: &LoadOptions) -> Result<ModelInfo, LoadError> {
    info(&check(checkpoint)?, checkpoint, options)
}

pub(crate) fn wants(checkpoint: &Checkpoint) -> Result<Vec<Want>, LoadError> {
    Ok(weights::wants(&check(checkpoint)?))
}

pub(crate) fn load<B: Backend>(
    checkpoint: &Checkpoint,
    backend: &mut B,
    options: &LoadOptions,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Box<dyn Model<B>>, LoadError> {
    let config = check(checkpoint)?;
    let info = info(&config, checkpoint, options)?;
    let weights = weights::load(&config, checkpoint, backend, progress)?;
    Ok(Box::new(forward::Qwen3 {
        info,
        attention: config.attention(),
        rope: rope_table(config.rope.theta, config.head_dim, config.rope.yarn.as_ref()),
        weights,
    }))
}
