//! Backend on the CPU: plain loops that define each op, SIMD kernels that serve.
//!
//! [`CpuBackend::plain`] runs the definitions: straight loops, sums in f64. [`CpuBackend::new`] runs the same ops
//! on packed weights with the best instructions of the machine, on a pool of threads. Both give every row the same
//! bits whatever its neighbours in the batch and however a prompt is cut into chunks.

mod activations;
mod backend;
mod decode;
mod isa;
mod kernels;
mod kv;
mod linear;
mod ops;
mod packed;
mod peaks;
mod quantised;
mod rows;

pub use backend::{ActivationQuant, CpuBackend, CpuOptions, Precision};
pub use isa::Isa;
pub use kv::CpuKv;
pub use linear::CpuMatrix;
pub use ops::{CpuExperts, sample_row, uniform};
pub use peaks::{InputPeaks, Product};
pub use rows::Rows;
