//! All that the engine knows of a model.

use ctxserve_backend::{Batch, DeviceError, KvPlan, KvSpec, SampleError, Sampled};

/// Static facts of a loaded model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunnerInfo {
    /// Width of the logits; every token id is below it.
    pub vocab_size: usize,
    /// Most positions the model supports.
    pub max_context: usize,
    /// The KV cache it needs.
    pub kv: KvSpec,
    /// One line for logs: family, device, sizes.
    pub description: String,
}

/// A model on a device, or something that plays one.
///
/// The engine calls `allocate` once, and then `launch` and `collect` from one thread. [`ctxserve_backend::SequenceSlice::key`] counts
/// accepted sequences from 0 in the order of submission and is never used twice.
pub trait Runner: Send {
    /// Static facts.
    fn info(&self) -> &RunnerInfo;

    /// Takes the memory of the KV pools.
    ///
    /// # Errors
    /// Out of memory.
    fn allocate(&mut self, plan: &KvPlan) -> Result<(), DeviceError>;

    /// How many steps may be launched before the oldest of them is collected, at least 1. With 1 the engine never
    /// launches a step whose input it does not know: no [`ctxserve_backend::SequenceSlice::feed`].
    fn steps_in_flight(&self) -> usize {
        1
    }

    /// Starts a step and does not wait for it. Steps take effect in the order they are launched.
    ///
    /// # Errors
    /// A device fault, which ends the engine.
    fn launch(&mut self, batch: &Batch) -> Result<(), DeviceError>;

    /// Waits for the oldest step in flight. Answers one outcome per sampling row of its batch, in the order of
    /// [`Batch::sample_rows`].
    ///
    /// # Errors
    /// A device fault, which ends the engine. What concerns one sequence is an outcome of its row instead.
    fn collect(&mut self) -> Result<Vec<Result<Sampled, SampleError>>, DeviceError>;
}
