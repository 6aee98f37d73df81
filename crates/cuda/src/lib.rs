//! `Backend` on NVIDIA GPUs. Kernels are compiled ahead of time by `build.rs` and embedded; the driver is loaded at run
//! time, and no CUDA library is linked.
//!
//! Layers: `driver` (the device, its memory, launches and graphs: the only calls into the driver), `ops` (one module a
//! kernel: checks shapes, then launches), `backend` (the ops as the model sees them).

pub mod driver;
pub mod ops;
pub mod probe;
pub mod sampler;
