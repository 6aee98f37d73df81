//! The backend against the CPU's plain loops, by the suite that any backend must pass. Without a device it says so and passes;
//! `CTXSERVE_REQUIRE_GPU=1` makes that a failure.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::time::Instant;

use ctxserve_backend::KvDtype;
use ctxserve_backend::conformance::{Claims, Like, Report, run};
use ctxserve_core::Encoding;
use ctxserve_cpu::{ActivationQuant, CpuBackend};
use ctxserve_cuda::driver::Device;
use ctxserve_cuda::{CudaBackend, CudaOptions, claims, rounding_claims, self_test, unavailable};

/// Whether there is a device; says so, or fails, if not.
fn is_skipped() -> bool {
    let Some(why) = unavailable(0) else { return false };
    assert!(std::env::var_os("CTXSERVE_REQUIRE_GPU").is_none(), "{why}");
    println!("skipped: {why}");
    true
}

/// Holds the backend to its claims, with inputs of NVFP4 matrices as they come or rounded.
fn conform(claims: &Claims, activations: ActivationQuant) {
    if is_skipped() {
        return;
    }
    let seed = std::env::var("CTXSERVE_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_261_122);
    let nvfp4_activations = activations == ActivationQuant::Nvfp4;
    let options = CudaOptions {
        max_rows: 512,
        max_sequences: 256,
        max_context: 4096,
        graphs: false,
        nvfp4_activations,
    };
    let make = || CudaBackend::new(Device::open(0)?, options);
    let report = run(seed, claims, make, || Ok(CpuBackend::plain_with(activations))).unwrap();
    for part in ["Embed", "Queries", "Attention", "Output", "Experts", "Mlp", "independence"] {
        println!("{part}: worst {:.2e}", report.worst(part));
    }
    report.skipped.iter().for_each(|what| println!("skipped: {what}"));
    assert!(report.cases.len() > 100, "only {} cases ran", report.cases.len());
    assert_eq!(report.failures().count(), 0, "{report}");
}

const KV: [KvDtype; 2] = [KvDtype::Bf16, KvDtype::Fp8E4m3];

/// KRN-02: all expert kernels, against the plain loops.
#[test]
fn kernels_match_the_plain_loops_within_bf16() {
    conform(&claims(KV.to_vec()), ActivationQuant::None);
}

#[test]
fn rounded_inputs_match_those_of_the_plain_loops() {
    conform(&rounding_claims(KV.to_vec()), ActivationQuant::Nvfp4);
}

/// KRN-03: the test at start.
#[test]
fn the_self_test_passes_and_is_quick() {
    if is_skipped() {
        return;
    }
    let device = Device::open(0).unwrap();
    let like = |head_dim, group, experts, top_k| {
        let (head_norms, dense, expert) = (experts == 0, Encoding::Bf16, Encoding::Mxfp4);
        Like { head_dim, group, experts, top_k, head_norms, dense, expert }
    };
    let likes = [
        like(64, 8, 32, 4),
        like(64, 8, 128, 4),
        like(64, 2, 8, 4),
        like(32, 3, 5, 2),
        like(128, 4, 0, 0),
        like(64, 2, 0, 0),
        like(96, 3, 0, 0),
        Like { expert: Encoding::Bf16, ..like(64, 8, 32, 4) },
        Like { dense: Encoding::Nvfp4, ..like(128, 4, 0, 0) },
        Like { dense: Encoding::Nvfp4, ..like(32, 3, 0, 0) },
    ];
    for like in likes {
        for (kv, activations) in [
            (vec![KvDtype::Bf16], ActivationQuant::None),
            (KV.to_vec(), ActivationQuant::None),
            (vec![KvDtype::Bf16], ActivationQuant::Nvfp4),
        ] {
            let start = Instant::now();
            let rounds = activations == ActivationQuant::Nvfp4;
            if rounds && like.dense != Encoding::Nvfp4 {
                continue;
            }
            let reference = || Ok(CpuBackend::plain_with(activations));
            let report = self_test(&device, like, kv.clone(), rounds, reference).unwrap();
            let seconds = start.elapsed().as_secs_f64();
            println!("{like:?}, {kv:?}, {activations:?}: {} cases in {seconds:.3} s", report.cases.len());
            for part in ["Embed", "Queries", "Attention", "Output", "Experts", "Mlp"] {
                println!("  {part}: worst {:.2e}", report.worst(part));
            }
            assert_eq!(report.failures().count(), 0, "{report}");
            assert!(report.cases.len() > 40, "only {} cases ran", report.cases.len());
            if rounds {
                let reference = || Ok(CpuBackend::plain());
                assert_nearer(&report, &self_test(&device, like, kv, rounds, reference).unwrap());
            }
        }
    }
}

/// Single codes may differ, but not so many that inputs that are not rounded would be as near.
fn assert_nearer(rounded: &Report, unrounded: &Report) {
    for part in ["Queries", "Attention", "Output", "Mlp"] {
        let mean = |report: &Report| {
            let errors: Vec<f64> =
                report.cases.iter().filter(|case| case.name.contains(part)).map(|case| case.error).collect();
            errors.iter().sum::<f64>() / errors.len() as f64
        };
        let (near, far) = (mean(rounded), mean(unrounded));
        println!("  {part}: {near:.2e} from rounded inputs, {far:.2e} from others");
        assert!(near < 0.6 * far, "{part}: {near:.2e} from rounded inputs, {far:.2e} from others");
    }
}
