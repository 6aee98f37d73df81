//! Kernels on random data: `bench-kernels [FILTER]`. Prints time, rate and share of the roofline of each case.

#![allow(clippy::print_stdout)]

mod attention_decode;
mod attention_prefill;
mod embed;
mod gemm;
mod gemm_nvfp4;
mod gemv_gate_up;
mod gemv_head;
mod gemv_nvfp4;
mod gemv_out;
mod gemv_qkv;
mod harness;
mod kv_append;
mod kv_gather;
mod moe_gemm;
mod moe_gemm_bf16;
mod moe_small;
mod pack_panels;
mod quantise_nvfp4;
mod rms_norm;
mod route;
mod sampler;

use ctxserve_cuda::driver::{Device, unavailable};

fn main() -> anyhow::Result<()> {
    let filter = std::env::args().nth(1).unwrap_or_default();
    if let Some(why) = unavailable(0) {
        anyhow::bail!("{why}");
    }
    let bench = harness::Bench::new(Device::open(0)?, filter)?;
    attention_decode::run(&bench)?;
    attention_prefill::run(&bench)?;
    embed::run(&bench)?;
    gemm::run(&bench)?;
    gemm_nvfp4::run(&bench)?;
    gemv_gate_up::run(&bench)?;
    gemv_head::run(&bench)?;
    gemv_nvfp4::run(&bench)?;
    gemv_out::run(&bench)?;
    gemv_qkv::run(&bench)?;
    kv_append::run(&bench)?;
    kv_gather::run(&bench)?;
    moe_small::run(&bench)?;
    route::run(&bench)?;
    moe_gemm::run(&bench)?;
    moe_gemm_bf16::run(&bench)?;
    pack_panels::run(&bench)?;
    quantise_nvfp4::run(&bench)?;
    rms_norm::run(&bench)?;
    sampler::run(&bench)?;
    Ok(())
}
