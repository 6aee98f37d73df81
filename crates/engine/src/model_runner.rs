//! A loaded model as a [`Runner`]: the one place where backend and family types are erased.

use ctxserve_backend::{Backend, Batch, DeviceError, KvPlan, SampleError, Sampled};
use ctxserve_models::Model;

use crate::{Runner, RunnerInfo};

/// A model and the backend that holds its weights.
pub struct ModelRunner<B: Backend> {
    backend: B,
    model: Box<dyn Model<B>>,
    kv: Option<B::Kv>,
    info: RunnerInfo,
}

impl<B: Backend> ModelRunner<B> {
    /// Takes a model and the backend that it was loaded into.
    pub fn new(backend: B, model: Box<dyn Model<B>>) -> Self {
        let facts = model.info();
        let info = RunnerInfo {
            vocab_size: facts.vocab_size,
            max_context: facts.max_context,
            kv: facts.kv.clone(),
            description: format!("{} on {}", facts.description, backend.describe()),
        };
        Self { backend, model, kv: None, info }
    }
}

impl<B: Backend> Runner for ModelRunner<B> {
    fn info(&self) -> &RunnerInfo {
        &self.info
    }

    fn allocate(&mut self, plan: &KvPlan) -> Result<(), DeviceError> {
        self.kv = Some(self.backend.allocate_kv(plan)?);
        Ok(())
    }

    fn step(&mut self, batch: &Batch) -> Result<Vec<Result<Sampled, SampleError>>, DeviceError> {
        let Some(kv) = &mut self.kv else {
            return Err(DeviceError::new("step", "the KV cache was never allocated"));
        };
        let logits = self.model.forward(&mut self.backend, kv, batch)?;
        if batch.sample_rows().next().is_none() {
            return Ok(Vec::new());
        }
        self.backend.sample(&logits, batch)
    }
}
