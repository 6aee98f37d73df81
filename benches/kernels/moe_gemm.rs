use ctxserve_backend::DeviceError;
use ctxserve_cuda::driver::{Buffer, Device};
use ctxserve_cuda::ops::moe_combine::{self, MoeCombine, Outputs};
use ctxserve_cuda::ops::moe_gemm::{Call, MoeGemm, height};
use ctxserve_cuda::ops::moe_scatter::{self, MoeScatter};
use ctxserve_cuda::ops::moe_sort::{self, MoeSort, Shape};
use ctxserve_cuda::ops::sorted_rows::{Output, SortedRows};

use crate::harness::{Bench, Work};

const EXPERTS: usize = 32;
const SLOTS: usize = 4;
const HIDDEN: usize = 2880;
/// Bytes of a strip.
const STRIP: usize = 45 * 544;

/// Repeats a block of random bytes.
fn fill(device: &Device, block: &[u8], bytes: usize) -> Result<Buffer<u8>, DeviceError> {
    device.upload(&block.iter().copied().cycle().take(bytes).collect::<Vec<u8>>())
}

/// Sorting, both products and the sum, at the sizes of gpt-oss-20b, on evenly spread choices.
pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    let wants = |op: &str, rows: usize| bench.wants(&format!("{op}_{rows}_rows"));
    let all = ["moe_sort", "moe_scatter", "moe_gemm", "moe_combine"];
    let sizes = [32, 64, 128, 256, 512, 1024, 2048, 8192];
    let sizes = sizes.into_iter().filter(|&rows| all.iter().any(|op| wants(op, rows))).collect::<Vec<_>>();
    if sizes.is_empty() {
        return Ok(());
    }
    let device = &bench.device;
    let (sort, scatter) = (MoeSort::load(device)?, MoeScatter::load(device)?);
    let (gemm, combine) = (MoeGemm::load(device)?, MoeCombine::load(device)?);
    // Some strips of random codes and of scales in a plain range, repeated: the host is slow, the device does not mind.
    let block: Vec<u8> = (0..22 * STRIP)
        .map(|at| {
            let bits = bench.bits();
            if at % STRIP >= 45 * 512 { 118 + (bits % 5) as u8 } else { bits as u8 }
        })
        .collect();
    let strips = |rows: usize| fill(device, &block, EXPERTS * rows / 16 * STRIP);
    let (gate_up, down) = (strips(2 * HIDDEN)?, strips(HIDDEN)?);
    let (of_gate_up, of_down) =
        (device.zeros::<u8>(EXPERTS * 2 * HIDDEN)?, device.zeros::<u8>(EXPERTS * HIDDEN)?);
    gemm.exponents(device, &gate_up, &of_gate_up, EXPERTS * 2 * HIDDEN, HIDDEN)?;
    gemm.exponents(device, &down, &of_down, EXPERTS * HIDDEN, HIDDEN)?;
    let bias = device.upload(&vec![0.5_f32; EXPERTS * 2 * HIDDEN])?;
    let popularity: Vec<f32> = (0..EXPERTS).map(|_| 1.0 + 0.3 * bench.unit()).collect();
    for rows in sizes {
        let shape = Shape { rows, slots: SLOTS, experts: EXPERTS, height: height(rows, SLOTS, EXPERTS) };
        // Experts of unequal popularity, distinct in a row.
        let choice: Vec<i32> = (0..rows)
            .flat_map(|_| {
                let mut chosen = Vec::with_capacity(SLOTS);
                while chosen.len() < SLOTS {
                    let expert = bench.bits() as usize % EXPERTS;
                    if bench.unit().abs() * 1.3 < popularity[expert] && !chosen.contains(&(expert as i32)) {
                        chosen.push(expert as i32);
                    }
                }
                chosen
            })
            .collect();
        let touched = choice.iter().collect::<std::collections::BTreeSet<_>>().len();
        let (choice, live) = (device.upload(&choice)?, device.upload(&[rows as i32])?);
        let (position, source) = (device.zeros::<i32>(rows * SLOTS)?, device.zeros::<i32>(shape.sorted())?);
        let (tiles, counts) = (device.zeros::<i32>(4 * shape.tiles())?, device.zeros::<i32>(2)?);
        let sorting = moe_sort::Call {
            choice: &choice,
            live: &live,
            position: &position,
            source: &source,
            tiles: &tiles,
            counts: &counts,
            shape,
        };
        let work = Work { bytes: (rows * SLOTS * 12) as f64, flops: 0.0 };
        bench.time(&format!("moe_sort {rows}x{SLOTS}"), work, 20, |_| sort.issue(device, &sorting))?;

        let capacity = shape.sorted();
        let values: Vec<u16> = (0..1 << 16).map(|_| half::f16::from_f32(bench.unit()).to_bits()).collect();
        let x = device.upload(&values.into_iter().cycle().take(capacity * HIDDEN).collect::<Vec<u16>>())?;
        let act = device.zeros::<u16>(capacity * HIDDEN)?;
        let (y32, y16) = (device.zeros::<f32>(capacity * HIDDEN)?, device.zeros::<u16>(capacity * HIDDEN)?);
        let residual = device.zeros::<f32>(rows * HIDDEN)?;
        let scale = device.upload(&vec![0.5_f32; rows])?;
        // Into the outputs' place, so that the operand keeps its random numbers.
        let sorting = moe_scatter::Sort { choice: &choice, tiles: &tiles, counts: &counts, shape };
        for sort in [None, Some(sorting).filter(|_| moe_scatter::can_sort(&shape))] {
            let scattering = moe_scatter::Call {
                x: &residual,
                weight: &bias,
                scale: &scale,
                y: &act,
                bf16: false,
                position: &position,
                live: &live,
                rows,
                cols: HIDDEN,
                capacity,
                slots: SLOTS,
                sort,
            };
            let work = Work { bytes: (rows * HIDDEN * (4 + 2 * SLOTS)) as f64, flops: 0.0 };
            let sorts = if sort.is_some() { " and sort" } else { "" };
            bench.time(&format!("moe_scatter{sorts} {rows} rows"), work, 10, |_| {
                scatter.issue(device, &scattering)
            })?;
        }
        let cases = [
            ("gate_up", 2 * HIDDEN, Output::SwiGlu { y: &act, alpha: 1.702, limit: 7.0 }, 2),
            ("down f32", HIDDEN, Output::F32(&y32), 4),
            ("down bf16", HIDDEN, Output::Bf16(&y16), 2),
        ];
        for (name, weight_rows, y, moved) in cases {
            let is_up = weight_rows > HIDDEN;
            let call = Call {
                w: if is_up { &gate_up } else { &down },
                exponents: if is_up { &of_gate_up } else { &of_down },
                rows: SortedRows {
                    bias: &bias,
                    x: &x,
                    y,
                    tiles: &tiles,
                    counts: &counts,
                    experts: EXPERTS,
                    rows: weight_rows,
                    cols: HIDDEN,
                    capacity,
                    height: shape.height,
                    most_tiles: shape.tiles(),
                },
            };
            let pairs = rows * SLOTS;
            let work = Work {
                bytes: (touched * weight_rows * 45 * 34 + pairs * HIDDEN * (2 + moved)) as f64,
                flops: 2.0 * (pairs * weight_rows * HIDDEN) as f64,
            };
            let name = format!("moe_gemm {name} {rows} rows, height {}", shape.height);
            bench.time(&name, work, 4, |_| gemm.issue(device, &call))?;
        }

        if !wants("moe_combine", rows) {
            continue;
        }
        let weight = device.upload(&vec![0.25_f32; rows * SLOTS])?;
        let normed = device.zeros::<u16>(rows.next_multiple_of(8) * HIDDEN)?;
        let norm =
            moe_combine::Norm { weight: &bias, eps: 1.0, y: &normed, capacity: rows.next_multiple_of(8) };
        for (name, y, bytes, norm) in [
            ("f32", Outputs::F32(&y32), 4, None),
            ("f32 and norm", Outputs::F32(&y32), 4, Some(norm)),
            ("bf16", Outputs::Bf16(&y16), 2, None),
            ("bf16 and norm", Outputs::Bf16(&y16), 2, Some(norm)),
        ] {
            let call = moe_combine::Call {
                x: &residual,
                y,
                position: Some(&position),
                weight: &weight,
                live: &live,
                rows,
                sorted: capacity,
                cols: HIDDEN,
                stride: HIDDEN,
                slots: SLOTS,
                norm,
            };
            let written = if norm.is_some() { 10 } else { 8 };
            let work = Work { bytes: (rows * HIDDEN * (written + SLOTS * bytes)) as f64, flops: 0.0 };
            bench.time(&format!("moe_combine {name} {rows} rows"), work, 10, |_| {
                combine.issue(device, &call)
            })?;
        }
    }
    Ok(())
}
