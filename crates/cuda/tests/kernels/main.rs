//! Every kernel against its definition in float64, on fresh random inputs and ragged shapes. Without a device each test says so
//! and passes; `CTXSERVE_REQUIRE_GPU=1` makes that a failure.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    unreachable_pub,
    dead_code
)]

mod attention;
mod attention_decode;
mod attention_prefill;
mod attention_raw;
mod common;
mod embed;
mod gemm;
mod gemm_nvfp4;
mod gemm_outputs;
mod gemv;
mod gemv_gate_up;
mod gemv_head;
mod gemv_nvfp4;
mod gemv_out;
mod gemv_qkv;
mod kv_append;
mod kv_gather;
mod moe_combine;
mod moe_down;
mod moe_gate_up;
mod moe_gemm;
mod moe_gemm_bf16;
mod moe_scatter;
mod moe_sort;
mod narrow;
mod pack_mxfp4;
mod pack_nvfp4;
mod pack_panels;
mod quantise_nvfp4;
mod rms_norm;
mod route;
mod sampler;
mod sorted_rows;
mod upload;
