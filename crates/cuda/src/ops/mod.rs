//! One module a kernel file: checks shapes, then launches.

pub mod attention;
pub mod attention_decode;
pub mod attention_prefill;
pub mod gemm;
pub mod kv_append;
pub mod kv_gather;
pub mod moe_combine;
pub mod moe_down;
pub mod moe_gate_up;
pub mod moe_gemm;
pub mod moe_sort;
pub mod pack_mxfp4;
pub mod rms_norm;
pub mod route;
