//! One module a kernel file: checks shapes, then launches.

pub mod rms_norm;
