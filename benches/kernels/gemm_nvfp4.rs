use ctxserve_backend::DeviceError;
use ctxserve_cuda::ops::gemm::{self, Gemm};
use ctxserve_cuda::ops::gemm_nvfp4::{Call, GemmNvfp4, Output, Plan, Spread, plan};

use crate::harness::{Bench, Work};

/// More than L2 holds, so that weights come from memory in every launch.
const ROTATION: usize = 160 << 20;

/// Tokens.
const COUNTS: [usize; 9] = [17, 32, 64, 128, 256, 512, 1024, 2048, 8192];

/// The products of a block of FastContext-1.0-4B: name, columns, rows.
const CASES: [(&str, usize, usize); 5] = [
    ("qkv", 2560, 6144),
    ("o", 4096, 2560),
    ("gate_up", 2560, 19_456),
    ("down", 9728, 2560),
    // What a launch takes where there is next to nothing to multiply.
    ("tiny", 512, 2560),
];

/// What else is worth a look beside the plan.
fn others(tokens: usize) -> Vec<Plan> {
    let mut ways = Vec::new();
    for spread in GemmNvfp4::shared_ways() {
        let Spread::Few { tokens: most, .. } = spread else { continue };
        if (tokens <= 64 && most == 64) || (tokens > 64 && tokens <= 256 && most == 128) {
            ways.push(Plan::of(spread));
        }
    }
    let of = |spread, height| Plan { height, tail: height, ..Plan::of(spread) };
    ways.extend(match tokens {
        0..=64 => [of(Spread::Low, 64), of(Spread::Middle, 64), of(Spread::High, 64)],
        65..=256 => [of(Spread::Middle, 128), of(Spread::Middle, 96), of(Spread::High, 128)],
        _ => [of(Spread::Middle, 160), of(Spread::High, 192), of(Spread::High, 256)],
    });
    ways
}

pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    let cases = CASES.iter().filter(|(name, ..)| bench.wants(&format!("gemm_nvfp4_{name}")));
    let cases: Vec<_> = cases.copied().collect();
    if cases.is_empty() {
        return Ok(());
    }
    let device = &bench.device;
    let (gemm, dense) = (GemmNvfp4::load(device)?, Gemm::load(device)?);
    let block: Vec<u16> = (0..1 << 16).map(|_| half::bf16::from_f32(bench.unit()).to_bits()).collect();
    let bits = |count: usize| -> Vec<u16> { block.iter().copied().cycle().take(count).collect() };
    for (name, cols, rows) in cases {
        let strip = cols / 64 * 576;
        let strips: Vec<u8> = (0..16 * strip)
            .map(|at| {
                let bits = bench.bits();
                if at % strip >= cols / 64 * 512 { 160 + (bits % 24) as u8 } else { bits as u8 }
            })
            .collect();
        let sets = (ROTATION / (rows / 16 * strip)).clamp(2, 16);
        let strips: Vec<u8> = strips.iter().copied().cycle().take(rows / 16 * strip).collect();
        let w = (0..sets).map(|_| device.upload(&strips)).collect::<Result<Vec<_>, _>>()?;
        let wide_sets = (ROTATION / (rows * cols * 2)).clamp(2, 8);
        let wide = bits(rows * cols);
        let wide = (0..wide_sets).map(|_| device.upload(&wide)).collect::<Result<Vec<_>, _>>()?;
        let factors = device.upload(&vec![0.01_f32; rows])?;
        let counts: &[usize] = if name == "tiny" { &[17, 64, 128] } else { &COUNTS };
        for &tokens in counts {
            let capacity = tokens.next_multiple_of(8);
            let x = device.upload(&bits(capacity * cols))?;
            let live = device.upload(&[tokens as i32])?;
            let y32 = device.zeros::<f32>(tokens * rows)?;
            let y16 = device.zeros::<u16>(capacity * rows / 2)?;
            let (y, of_dense, moved) = match name {
                "qkv" => (Output::F32(&y32), gemm::Output::F32(&y32), 4 * rows),
                "gate_up" => (Output::SwiGlu(&y16), gemm::Output::F32(&y32), rows),
                _ => (Output::Add(&y32), gemm::Output::Add(&y32), 8 * rows),
            };
            let work = Work {
                bytes: (rows / 16 * strip + tokens * (cols * 2 + moved)) as f64,
                flops: 2.0 * (tokens * cols * rows) as f64,
            };
            let planned = plan(tokens, rows, cols, device.facts().multiprocessors as usize);
            let plans =
                std::iter::once(planned).chain(others(tokens).into_iter().filter(|&way| way != planned));
            for (at, plan) in plans.enumerate() {
                let issue = |at: usize| {
                    let (w, stride) = (&w[at % sets], rows);
                    let call = Call {
                        w,
                        factors: &factors,
                        x: &x,
                        y,
                        live: &live,
                        tokens,
                        cols,
                        rows,
                        capacity,
                        stride,
                    };
                    gemm.issue_as(device, &call, plan)
                };
                let mark = if at == 0 { "*" } else { " " };
                let launches = if tokens > 1024 { sets.min(4) } else { sets };
                bench.time(&format!("gemm_nvfp4_{name} {tokens}{mark} {plan}"), work, launches, issue)?;
            }
            if tokens <= 256 {
                let issue = |_: usize| {
                    let (w, stride) = (&w[0], rows);
                    let call = Call {
                        w,
                        factors: &factors,
                        x: &x,
                        y,
                        live: &live,
                        tokens,
                        cols,
                        rows,
                        capacity,
                        stride,
                    };
                    gemm.issue_as(device, &call, planned)
                };
                bench.time(&format!("gemm_nvfp4_{name} {tokens}  in L2, {planned}"), work, 8, issue)?;
            }
            let issue = |at: usize| {
                let call = gemm::Call {
                    w: &wide[at % wide_sets],
                    x: &x,
                    bias: None,
                    y: of_dense,
                    live: &live,
                    tokens,
                    cols,
                    w_rows: rows,
                    outs: rows,
                    capacity,
                    stride: rows,
                };
                dense.issue(device, &call)
            };
            let bytes = (rows * cols * 2 + tokens * (cols * 2 + 4 * rows)) as f64;
            let work = Work { bytes, ..work };
            bench.time(&format!("gemm_nvfp4_{name} {tokens}  bf16 weights"), work, wide_sets, issue)?;
        }
    }
    Ok(())
}
