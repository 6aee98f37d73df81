//! Model families: configuration, weight names, forward pass.
//!
//! A family is one folder and one row of the registry. It reads an untrusted `config.json`, says which
//! tensors it wants, hands them to a [`Backend`](ctxserve_backend::Backend) layer by layer, and then runs
//! each step as that backend's coarse ops. Nothing here knows a device or a quantisation format.

mod costs;
mod decoder;
pub mod demo;
mod eos;
mod error;
mod fields;
mod footprint;
pub mod gpt_oss;
mod limits;
mod model;
pub mod qwen3;
mod registry;
mod rope;
mod rotary;
mod weights;

pub use costs::{Costs, expected_experts};
pub use error::{ConfigError, LoadError};
pub use model::{LoadOptions, LoadProgress, Model, ModelInfo};
pub use registry::{architectures, inspect, load, wants};
pub use rope::{Yarn, rope_table};
pub use rotary::Rope;
