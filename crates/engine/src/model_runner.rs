//! A loaded model as a [`Runner`]: the one place where backend and family types are erased.

use std::collections::VecDeque;

use ctxserve_backend::{Backend, Batch, DeviceError, KvPlan, SampleError, Sampled};
use ctxserve_models::Model;

use crate::{Runner, RunnerInfo};

/// A model and the backend that holds its weights.
pub struct ModelRunner<B: Backend> {
    backend: B,
    model: Box<dyn Model<B>>,
    kv: Option<B::Kv>,
    info: RunnerInfo,
    /// Steps in flight, oldest first.
    pending: VecDeque<B::Pending>,
    /// Sampling rows of the step launched last.
    sampled: usize,
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
        Self { backend, model, kv: None, info, pending: VecDeque::new(), sampled: 0 }
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

    fn steps_in_flight(&self) -> usize {
        self.backend.steps_in_flight().max(1)
    }

    fn launch(&mut self, batch: &Batch) -> Result<(), DeviceError> {
        let fail = |what: String| DeviceError::new("launch", what);
        batch.check_feeds(self.sampled).map_err(|error| fail(error.to_string()))?;
        let Some(kv) = &mut self.kv else {
            return Err(fail("the KV cache was never allocated".to_owned()));
        };
        let model = &self.model;
        let pending = self.backend.step(kv, batch, &mut |backend, kv| model.forward(backend, kv, batch))?;
        self.pending.push_back(pending);
        self.sampled = batch.sample_rows().count();
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<Result<Sampled, SampleError>>, DeviceError> {
        let oldest = self.pending.pop_front();
        let oldest = oldest.ok_or_else(|| DeviceError::new("collect", "no step is in flight"))?;
        self.backend.collect(oldest)
    }
}
