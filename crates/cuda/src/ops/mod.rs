//! One module a kernel file: checks shapes, then launches.

pub mod attention;
pub mod attention_decode;
pub mod attention_prefill;
pub mod embed;
pub mod gemm;
pub mod gemm_nvfp4;
pub mod gemv;
pub mod gemv_head;
pub mod gemv_out;
pub mod gemv_qkv;
pub mod kv_append;
pub mod kv_gather;
pub mod moe_combine;
pub mod moe_down;
pub mod moe_gate_up;
pub mod moe_gemm;
pub mod moe_scatter;
pub mod moe_sort;
pub mod pack_mxfp4;
pub mod pack_panels;
pub mod rms_norm;
pub mod route;
pub mod sample_pick;
pub mod sample_scan;
pub mod unpack;
