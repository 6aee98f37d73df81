//! The backend against the CPU's plain loops, by the suite that any backend must pass. Without a device it says so and passes;
//! `CTXSERVE_REQUIRE_GPU=1` makes that a failure.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use ctxserve_backend::KvDtype;
use ctxserve_backend::conformance::{Claims, run};
use ctxserve_core::Encoding;
use ctxserve_cpu::CpuBackend;
use ctxserve_cuda::driver::Device;
use ctxserve_cuda::{CudaBackend, CudaOptions, unavailable};

#[test]
fn kernels_match_the_plain_loops_within_bf16() {
    if let Some(why) = unavailable(0) {
        assert!(std::env::var_os("CTXSERVE_REQUIRE_GPU").is_none(), "{why}");
        println!("skipped: {why}");
        return;
    }
    let seed = std::env::var("CTXSERVE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_261_122);
    let options = CudaOptions { max_rows: 512, max_sequences: 256, max_context: 4096, graphs: false };
    let claims = Claims {
        exact: 5e-6,
        // Weights, activations and queries are rounded to bf16.
        products: 1.5e-2,
        bitwise: false,
        kv: vec![KvDtype::Bf16, KvDtype::Fp8E4m3],
        experts: vec![Encoding::Mxfp4],
        page_sizes: vec![16, 32, 64, 128],
    };
    let report =
        run(seed, &claims, || CudaBackend::new(Device::open(0)?, options), || Ok(CpuBackend::plain()))
            .unwrap();
    for part in ["Embed", "Queries", "Attention", "Output", "Experts", "independence"] {
        println!("{part}: worst {:.2e}", report.worst(part));
    }
    assert!(report.cases.len() > 100, "only {} cases ran", report.cases.len());
    assert_eq!(report.failures().count(), 0, "{report}");
}
