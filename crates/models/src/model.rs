//! What every family offers.

use ctxserve_backend::{Backend, Batch, DeviceError, KvDtype, KvSpec};
use ctxserve_core::TokenId;

use crate::{ConfigError, Costs};

/// A model whose weights a backend holds.
pub trait Model<B: Backend>: Send {
    /// Its static facts.
    fn info(&self) -> &ModelInfo;

    /// Runs one step: starts it on the backend, writes keys and values of every row of the batch, and returns
    /// the logits `[logit rows, vocab]` in the order of [`Batch::logit_rows`].
    ///
    /// # Errors
    /// A batch that breaks [`Batch::check`], or a device fault.
    fn forward(&self, backend: &mut B, kv: &mut B::Kv, batch: &Batch) -> Result<B::Logits, DeviceError>;
}

/// What the rest of the server needs to know of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelInfo {
    /// The family's name: its row of the registry.
    pub family: &'static str,
    /// One line for logs: family, size, positions.
    pub description: String,
    /// Rows of the embedding and columns of the logits; may exceed the tokenizer's length.
    pub vocab_size: usize,
    /// Most positions the configuration promises, prompt and answer together.
    pub max_context: usize,
    /// Transformer blocks.
    pub layers: usize,
    /// The KV cache it needs.
    pub kv: KvSpec,
    /// End-of-turn ids named by `generation_config.json` and `config.json`, ascending, those outside the
    /// vocabulary left out. A chat format adds its own.
    pub eos: Vec<TokenId>,
    /// Bytes of weights as the checkpoint stores them.
    pub weight_bytes: u64,
    /// The same in the memory of a GPU, where codes that it has no kernels for are bfloat16.
    pub weight_bytes_on_gpu: u64,
    /// The weights by how a step uses them.
    pub costs: Costs,
}

/// What the server decides about a model before loading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// Positions per KV page, at least 1.
    pub page_size: usize,
    /// How keys and values are stored; a family may keep more bits where fewer would save little.
    pub kv_dtype: KvDtype,
}

impl LoadOptions {
    /// Refuses options that no cache could be built from.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        const MOST: usize = 4096;
        if (1..=MOST).contains(&self.page_size) {
            return Ok(());
        }
        let got = self.page_size;
        Err(ConfigError::new("page_size", format!("must be between 1 and {MOST}, got {got}")))
    }
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { page_size: 16, kv_dtype: KvDtype::F32 }
    }
}

/// How far loading has come. Reported after each part: the embedding, each layer, the head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadProgress {
    /// Parts that the backend holds.
    pub done: usize,
    /// All parts.
    pub total: usize,
    /// Bytes of all parts as the checkpoint stores them.
    pub total_bytes: u64,
}
