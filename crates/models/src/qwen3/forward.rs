//! The forward pass.

use ctxserve_backend::{AttentionSpec, Backend, Batch, DeviceError, RopeTable};

use super::weights::Weights;
use crate::decoder::Rest;
use crate::{Model, ModelInfo};

/// Qwen3 on a backend.
pub(super) struct Qwen3<B: Backend> {
    pub(super) info: ModelInfo,
    pub(super) attention: AttentionSpec,
    pub(super) rope: RopeTable,
    pub(super) weights: Weights<B>,
}

impl<B: Backend> Model<B> for Qwen3<B> {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn forward(&self, backend: &mut B, kv: &mut B::Kv, batch: &Batch) -> Result<B::Logits, DeviceError> {
        let (weights, spec) = (&self.weights, &self.attention);
        backend.begin(batch, kv, self.info.vocab_size)?;
        let mut x = backend.embed(&weights.embedding, batch)?;
        for (layer, block) in weights.blocks.iter().enumerate() {
            let mut q =
                backend.attention_input(layer, &block.attention.input, spec, &self.rope, &x, kv, batch)?;
            match Rest::of(layer, weights.blocks.len(), batch) {
                Rest::Rows => {}
                Rest::LogitRows => backend.narrow(layer, &mut q, &mut x, batch)?,
                Rest::Nothing => break,
            }
            let heads = backend.attention(layer, spec, None, &q, kv, batch)?;
            backend.attention_output(&block.attention.output, &heads, &mut x)?;
            backend.mlp(&block.mlp, &mut x)?;
        }
        let head = weights.head.as_ref().unwrap_or(&weights.embedding);
        backend.logits(&weights.norm, spec.norm_eps, head, &x, batch)
    }
}
