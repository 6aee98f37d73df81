//! The serving backend against the plain loops, on every instruction set of this machine.

use std::num::NonZeroUsize;

use ctxserve_backend::conformance::{Claims, Like, quick, run};
use ctxserve_backend::{DeviceError, KvDtype};
use ctxserve_core::Encoding;
use ctxserve_cpu::{CpuBackend, CpuOptions, Isa, Precision};

/// What holds for every precision.
fn claims() -> Claims {
    let experts = vec![Encoding::F32, Encoding::Bf16, Encoding::Mxfp4, Encoding::Nvfp4, Encoding::Affine];
    Claims {
        exact: 0.0,
        products: 0.0,
        bitwise: true,
        kv: Vec::new(),
        experts,
        page_sizes: Vec::new(),
        lacks: Vec::new(),
    }
}

fn check(precision: Precision, claims: &Claims) -> Result<(), DeviceError> {
    for &isa in Isa::available() {
        let options =
            CpuOptions { threads: NonZeroUsize::new(3), precision, isa: Some(isa), ..CpuOptions::default() };
        let make = || CpuBackend::new(options);
        let report = run(20_261_122, claims, make, || Ok(CpuBackend::plain()))?;
        eprintln!(
            "{isa}: {} cases, worst queries {:.1e}, experts {:.1e}, dense {:.1e}, attention {:.1e}, layer {:.1e}",
            report.cases.len(),
            report.worst("Queries"),
            report.worst("Experts"),
            report.worst("Mlp,"),
            report.worst("Attention"),
            report.worst("Layer"),
        );
        assert!(report.cases.len() > 500, "only {} cases ran", report.cases.len());
        assert_eq!(report.failures().count(), 0, "{isa}, {report}");
        assert!(report.skipped.is_empty(), "{report}");
    }
    Ok(())
}

/// OPS-27: no bit of a row depends on the others. KRN-02: on the CPU.
#[test]
fn exact_kernels_match_the_plain_loops_and_never_mind_their_neighbours() {
    let kv = vec![KvDtype::F32, KvDtype::Bf16, KvDtype::Fp8E4m3];
    check(Precision::Exact, &Claims { exact: 5e-6, products: 5e-6, bitwise: true, kv, ..claims() }).unwrap();
}

#[test]
fn int8_kernels_stay_within_quantisation_error_and_never_mind_their_neighbours() {
    let kv = vec![KvDtype::F32, KvDtype::Bf16];
    check(Precision::Int8, &Claims { exact: 5e-6, products: 3e-2, bitwise: true, kv, ..claims() }).unwrap();
}

#[test]
fn the_plain_loops_are_independent_of_neighbours_too() {
    let claims = Claims { exact: 0.0, products: 0.0, bitwise: true, kv: vec![KvDtype::F32], ..claims() };
    let plain = || Ok(CpuBackend::plain());
    let report = run(3, &claims, plain, plain).unwrap();
    assert_eq!(report.failures().count(), 0, "{report}");
}

#[test]
fn the_short_form_tells_right_from_wrong() {
    let kv = vec![KvDtype::Bf16, KvDtype::Fp8E4m3];
    let claims = Claims { exact: 5e-6, products: 5e-6, experts: vec![Encoding::Mxfp4], kv, ..claims() };
    let gpt_oss = |head_dim, group, experts, top_k| {
        let dense = Encoding::Bf16;
        Like { head_dim, group, experts, top_k, head_norms: false, dense, expert: Encoding::Mxfp4 }
    };
    let qwen = |dense| Like { head_norms: true, dense, ..gpt_oss(128, 4, 0, 0) };
    let options = CpuOptions { threads: NonZeroUsize::new(2), ..CpuOptions::default() };
    for like in [
        gpt_oss(64, 8, 32, 4),
        gpt_oss(32, 2, 5, 2),
        qwen(Encoding::Bf16),
        qwen(Encoding::Nvfp4),
        qwen(Encoding::Affine),
    ] {
        let start = std::time::Instant::now();
        let report =
            quick(1, &claims, like, || CpuBackend::new(options), || Ok(CpuBackend::plain())).unwrap();
        eprintln!("{like:?}: {} cases in {:.2} s", report.cases.len(), start.elapsed().as_secs_f64());
        assert!(report.cases.len() > 40, "only {} cases ran", report.cases.len());
        assert_eq!(report.failures().count(), 0, "{report}");
    }
    // int8 activations are wrong by more than these claims allow.
    let wrong = CpuOptions { precision: Precision::Int8, ..options };
    for (like, after) in [(gpt_oss(64, 4, 8, 4), "Experts,"), (qwen(Encoding::Nvfp4), "Mlp,")] {
        let report = quick(1, &claims, like, || CpuBackend::new(wrong), || Ok(CpuBackend::plain())).unwrap();
        let failed: Vec<&str> = report.failures().map(|case| case.name.as_str()).collect();
        for op in ["Queries", after, "Attention"] {
            assert!(failed.iter().any(|name| name.contains(op)), "{op}: {report}");
        }
    }
}
