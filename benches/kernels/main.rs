//! Kernels on random data: `bench-kernels [FILTER]`. Prints time, rate and share of the roofline of each case.

#![allow(clippy::print_stdout)]

mod gemm;
mod harness;
mod moe_small;
mod rms_norm;
mod route;

use ctxserve_cuda::driver::{Device, unavailable};

fn main() -> anyhow::Result<()> {
    let filter = std::env::args().nth(1).unwrap_or_default();
    if let Some(why) = unavailable(0) {
        anyhow::bail!("{why}");
    }
    let bench = harness::Bench::new(Device::open(0)?, filter)?;
    gemm::run(&bench)?;
    rms_norm::run(&bench)?;
    moe_small::run(&bench)?;
    route::run(&bench)?;
    Ok(())
}
