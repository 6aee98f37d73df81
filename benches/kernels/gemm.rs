use ctxserve_backend::DeviceError;
use ctxserve_cuda::ops::gemm::{Call, Gemm, Heads, Output, Plan, Spread, plan};

use crate::harness::{Bench, Work};

/// More than L2 holds, so that weights come from memory in every launch.
const ROTATION: usize = 256 << 20;

pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    let device = &bench.device;
    let gemm = Gemm::load(device)?;
    let cases = [
        ("qkv", 2880, 5120),
        ("o", 4096, 2880),
        ("head", 2880, 201_088),
        // Of Qwen3-4B.
        ("qkv 4b", 2560, 6144),
        ("o 4b", 4096, 2560),
        ("gate_up 4b", 2560, 19_456),
        ("down 4b", 9728, 2560),
    ];
    for (name, cols, outs) in cases {
        let of_qwen = name.ends_with("4b");
        for tokens in [16, 32, 64, 128, 256, 1024, 8192] {
            if (name == "head" && tokens > 512)
                || !bench.wants(&format!("gemm_dense_{name}_{tokens}").replace(' ', "_"))
            {
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
            let turns = device.zeros::<f32>(tokens * 64)?;
            let kv = device.zeros::<f32>(tokens * 1024)?;
            let heads = Heads { q: &y16, kv: &kv, turns: &turns, q_width: 4096, kv_width: 512, head_dim: 64 };
            let outputs: &[(&str, Output<'_>)] = match name {
                "qkv" => &[
                    ("f32", Output::F32(&y32)),
                    ("bf16", Output::Bf16(&y16)),
                    ("heads", Output::Qkv(heads)),
                    ("f32 again", Output::F32(&y32)),
                    ("heads again", Output::Qkv(heads)),
                ],
                "o" | "o 4b" | "down 4b" => &[("add", Output::Add(&y32))],
                "gate_up 4b" => &[("swiglu", Output::SwiGlu(&y16)), ("bf16", Output::Bf16(&y16))],
                _ => &[("f32", Output::F32(&y32))],
            };
            for &(kind, y) in outputs {
                // Bytes of ten outputs.
                let moved = match y {
                    Output::F32(_) => 40,
                    Output::Bf16(_) => 20,
                    Output::Add(_) => 80,
                    Output::SwiGlu(_) => 10,
                    Output::Qkv(_) => 24,
                };
                let work = Work {
                    bytes: (outs * cols * 2 + tokens * cols * 2 + tokens * outs * moved / 10) as f64,
                    flops: 2.0 * (tokens * cols * outs) as f64,
                };
                let planned = plan(tokens, outs, cols, device.facts().multiprocessors as usize);
                let others: &[(Spread, usize)] = match tokens {
                    0..=64 => &[(Spread::Few64, 64), (Spread::Narrow, 128)],
                    65..=256 => &[(Spread::Few128, 128), (Spread::Narrow, 128), (Spread::Wide, 192)],
                    _ => &[(Spread::Wide, 192), (Spread::Wide, 208), (Spread::Wide, 256)],
                };
                let others = others.iter().map(|&(spread, height)| Plan { height, ..Plan::of(spread) });
                let plans = std::iter::once(planned).chain(others.filter(|&plan| plan != planned));
                for plan in plans {
                    // What is large or not compared only as planned.
                    if (name == "head" || of_qwen || kind.ends_with("again")) && plan != planned {
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
