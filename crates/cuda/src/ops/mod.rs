//! One module a kernel file: checks shapes, then launches.

pub mod attention;
pub mod attention_decode;
pub mod attention_prefill;
pub mod gemm;
pub mod kv_append;
pub mod kv_gather;
pub mod rms_norm;
