use ctxserve_backend::DeviceError;
use ctxserve_cuda::ops::gemm::{Call, Gemm, Output, Plan, Spread, plan};

use crate::harness::{Bench, Work};

/// More than L2 holds, so that weights come from memory in every launch.
const ROTATION: usize = 256 << 20;

pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    if !bench.wants("gemm dense") {
        return Ok(());
    }
    let device = &bench.device;
    let gemm = Gemm::load(device)?;
    let cases = [("qkv", 2880, 5120), ("o", 4096, 2880), ("head", 2880, 201_088)];
    for (name, cols, outs) in cases {
        for tokens in [16, 32, 64, 128, 256, 1024, 8192] {
            if name == "head" && tokens > 512 {
                continue;
            }
            let sets = (ROTATION / (outs * cols * 2)).clamp(1, 8);
            let bits = |count: usize| -> Vec<u16> {
                // A repeated block of random numbers: the host is slow, the device does not mind.
                let block: Vec<u16> =
                    (0..1 << 16).map(|_| half::bf16::from_f32(bench.unit()).to_bits()).collect();
                block.into_iter().cycle().take(count).collect()
            };
            let w = (0..sets).map(|_| device.upload(&bits(outs * cols))).collect::<Result<Vec<_>, _>>()?;
            let x = device.upload(&bits(tokens * cols))?;
            let bias = device.upload(&vec![1.0_f32; outs])?;
            let live = device.upload(&[tokens as i32])?;
            let y32 = device.zeros::<f32>(tokens * outs)?;
            let y16 = device.zeros::<u16>(tokens * outs)?;
            let outputs: &[(&str, Output<'_>)] = match name {
                "qkv" => &[("f32", Output::F32(&y32)), ("bf16", Output::Bf16(&y16))],
                "o" => &[("add", Output::Add(&y32))],
                _ => &[("f32", Output::F32(&y32))],
            };
            for &(kind, y) in outputs {
                let moved = match kind {
                    "f32" => 4,
                    "bf16" => 2,
                    _ => 8,
                };
                let work = Work {
                    bytes: (outs * cols * 2 + tokens * cols * 2 + tokens * outs * moved) as f64,
                    flops: 2.0 * (tokens * cols * outs) as f64,
                };
                let planned = plan(tokens, outs, cols, device.facts().multiprocessors as usize);
                let others: &[(Spread, usize)] = match tokens {
                    0..=64 => &[(Spread::Few64, 64), (Spread::Narrow, 128)],
                    65..=256 => &[(Spread::Few128, 128), (Spread::Narrow, 128), (Spread::Wide, 192)],
                    _ => &[
                        (Spread::Narrow, 128),
                        (Spread::Wide, 176),
                        (Spread::Wide, 192),
                        (Spread::Wide, 208),
                        (Spread::Wide, 256),
                    ],
                };
                let others = others.iter().map(|&(spread, height)| Plan { height, ..Plan::of(spread) });
                let plans = std::iter::once(planned).chain(others.filter(|&plan| plan != planned));
                for plan in plans {
                    // The head is large: only as planned.
                    if name == "head" && plan != planned {
                        continue;
                    }
                    let issue = |at: usize| {
                        let call = Call {
                            w: &w[at % sets],
                            x: &x,
                            bias: Some(&bias),
                            y,
                            live: &live,
                            tokens,
                            cols,
                            w_rows: outs,
                            outs,
                            capacity: tokens,
                            stride: outs,
                        };
                        gemm.issue_as(device, &call, plan)
                    };
                    bench.time(&format!("gemm {name} {kind} {tokens}, {plan}"), work, 2 * sets, issue)?;
                }
            }
        }
    }
    Ok(())
}
