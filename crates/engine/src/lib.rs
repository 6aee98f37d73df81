//! Scheduler, paged KV, sequences, the driver loop and the [`Runner`] seam.
//!
//! One thread named `engine` owns the model and every sequence. It receives submissions, schedules a step under a
//! token budget, runs it and commits what came back; it never awaits and never waits for a reader. Everything else
//! talks to it through an [`EngineHandle`].

mod config;
mod driver;
mod guides;
mod handle;
mod model_runner;
mod pages;
mod prefixes;
mod queue;
mod runner;
mod scheduler;
mod scripted;
mod sequence;
mod shared;
mod sizing;
mod stream;
#[cfg(test)]
mod testing;

pub use config::{EngineConfig, EngineError};
pub use handle::{Engine, EngineHandle, EngineInfo};
pub use model_runner::ModelRunner;
pub use prefixes::{MissCause, PrefixCounts};
pub use runner::{Runner, RunnerInfo};
pub use scripted::ScriptedRunner;
pub use shared::{EngineState, Snapshot};
pub use sizing::{Bytes, GroupReport, KvReport};
pub use stream::{EventStream, SubmitError};
