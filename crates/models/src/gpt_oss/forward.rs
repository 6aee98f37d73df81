//! The forward pass.

use ctxserve_backend::{AttentionSpec, Backend, Batch, DeviceError, RopeTable};

use super::weights::Weights;
use crate::decoder::Rest;
use crate::{Model, ModelInfo};

/// gpt-oss on a backend.
pub(super) struct GptOss<B: Backend> {
    pub(super) info: ModelInfo,
    /// One entry a layer.
    pub(super) attention: Vec<AttentionSpec>,
    pub(super) rope: RopeTable,
    pub(super) norm_eps: f32,
    pub(super) weights: Weights<B>,
}

impl<B: Backend> Model<B> for GptOss<B> {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn forward(&self, backend: &mut B, kv: &mut B::Kv, batch: &Batch) -> Result<B::Logits, DeviceError> {
        let weights = &self.weights;
        backend.begin(batch, kv, self.info.vocab_size)?;
        let mut x = backend.embed(&weights.embedding, batch)?;
        for (layer, (block, spec)) in weights.blocks.iter().zip(&self.attention).enumerate() {
            let mut q =
                backend.attention_input(layer, &block.attention.input, spec, &self.rope, &x, kv, batch)?;
            match Rest::of(layer, weights.blocks.len(), batch) {
                Rest::Rows => {}
                Rest::LogitRows => backend.narrow(layer, &mut q, &mut x, batch)?,
                Rest::Nothing => break,
            }
            let heads = backend.attention(layer, spec, Some(&block.sinks), &q, kv, batch)?;
            backend.attention_output(&block.attention.output, &heads, &mut x)?;
            match weights.blocks.get(layer + 1).zip(self.attention.get(layer + 1)) {
                Some((next, spec)) => {
                    let norm = &next.attention.input.norm;
                    backend.experts_before(&block.moe, &mut x, (norm, spec.norm_eps))?;
                }
                None => backend.experts(&block.moe, &mut x)?,
            }
        }
        let head = weights.head.as_ref().unwrap_or(&weights.embedding);
        backend.logits(&weights.norm, self.norm_eps, head, &x, batch)
    }
}
