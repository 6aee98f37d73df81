//! One module a kernel file: checks shapes, then launches.

pub mod gemm;
pub mod rms_norm;
