//! `Backend` on NVIDIA GPUs. Kernels are compiled ahead of time by `build.rs` and embedded; the driver is loaded at run
//! time, and no CUDA library is linked.
//!
//! From the bottom: `driver` (the device, its memory, launches and graphs: the only calls into the driver), `ops` (one
//! module a kernel: checks shapes, then launches), `step` (what varies from step to step, on the device), `weights`, `kv`,
//! `workspace` (memory and layouts), `layers` (which kernels an op is for how many rows), `backend` (the seam).

mod backend;
pub mod driver;
#[cfg(feature = "fault-injection")]
mod fault;
mod kernels;
mod kv;
mod layers;
pub mod ops;
pub mod probe;
pub mod sampler;
mod selftest;
mod step;
mod weights;
mod workspace;

pub use backend::{CudaBackend, CudaOptions, HeadRows, HiddenRows, LogitRows};
pub use driver::unavailable;
pub use kv::{CudaKv, check as check_kv};
pub use layers::RawHeads;
pub use selftest::{claims, rounding_claims, self_test};
pub use step::Capacity;
pub use weights::{CudaExperts, CudaMatrix, CudaVector};
pub use workspace::{Widths, bytes as workspace_bytes};
