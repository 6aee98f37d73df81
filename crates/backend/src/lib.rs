//! The seam between models and devices.
//!
//! A model is written once against [`Backend`]'s coarse ops, each about one GPU launch in decode. A backend
//! is one crate that implements them and passes [`conformance`].

mod batch;
pub mod conformance;
mod kv;
mod ops;

pub use batch::{Batch, BatchError, SampleError, SampleRow, Sampled, SequenceSlice};
pub use kv::{KvDtype, KvGroup, KvPlan, KvSpec, PageId, PageTable};
pub use ops::{
    AttentionInput, AttentionSpec, Backend, DeviceError, ExpertSpec, ExpertWeights, HeadNorms, Mlp, Moe,
    Role, RopeTable,
};
