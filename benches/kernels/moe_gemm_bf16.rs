//! The experts' products with bf16 weights, at the sizes of gpt-oss-20b, on unevenly spread choices.

use ctxserve_backend::DeviceError;
use ctxserve_cuda::driver::{Buffer, Device};
use ctxserve_cuda::ops::moe_gemm_bf16::{Call, MoeGemmBf16, height};
use ctxserve_cuda::ops::sorted_rows::{Output, SortedRows};
use half::bf16;

use crate::harness::{Bench, Work};

const NAME: &str = "moe_gemm_bf16";
const EXPERTS: usize = 32;
const SLOTS: usize = 4;
const HIDDEN: usize = 2880;
/// Lists of tiles to rotate among: with few rows each touches other experts.
const CHOICES: usize = 8;
const MOST_ROWS: usize = 8192;

/// Rows by expert, as `moe_sort` would put them.
struct Sorted {
    tiles: Buffer<i32>,
    counts: Buffer<i32>,
    most_tiles: usize,
    touched: usize,
}

impl Sorted {
    fn new(bench: &Bench, popularity: &[f32], rows: usize, height: usize) -> Result<Self, DeviceError> {
        let mut of_expert = [0_usize; EXPERTS];
        for _ in 0..rows {
            let mut chosen = Vec::with_capacity(SLOTS);
            while chosen.len() < SLOTS {
                let expert = bench.bits() as usize % EXPERTS;
                if bench.unit().abs() * 1.3 < popularity[expert] && !chosen.contains(&expert) {
                    chosen.push(expert);
                    of_expert[expert] += 1;
                }
            }
        }
        let (mut tiles, mut first) = (Vec::new(), 0);
        for (expert, &count) in of_expert.iter().enumerate() {
            let end = first + count.next_multiple_of(8);
            while first < end {
                let left = end - first;
                let rows = match left {
                    left if left <= height => left,
                    left if left <= 2 * height => left.div_ceil(16) * 8,
                    _ => height,
                };
                tiles.extend([expert as i32, first as i32, rows as i32, 0]);
                first += rows;
            }
        }
        let count = tiles.len() / 4;
        Ok(Self {
            counts: bench.device.upload(&[first as i32, count as i32])?,
            tiles: bench.device.upload(&tiles)?,
            most_tiles: count,
            touched: of_expert.iter().filter(|&&rows| rows > 0).count(),
        })
    }
}

/// Repeats a block of random numbers, which the device does not mind.
fn fill(device: &Device, block: &[u16], count: usize) -> Result<Buffer<u16>, DeviceError> {
    let mut values = Vec::with_capacity(count);
    while values.len() < count {
        values.extend_from_slice(&block[..block.len().min(count - values.len())]);
    }
    device.upload(&values)
}

pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    if !bench.wants(NAME) {
        return Ok(());
    }
    let device = &bench.device;
    let gemm = MoeGemmBf16::load(device)?;
    let block: Vec<u16> =
        (0..(1 << 20) + 24).map(|_| bf16::from_f32(bench.unit() * 0.05).to_bits()).collect();
    let gate_up = fill(device, &block, EXPERTS * 2 * HIDDEN * HIDDEN)?;
    let down = fill(device, &block, EXPERTS * HIDDEN * HIDDEN)?;
    let bias = device.upload(&vec![0.5_f32; EXPERTS * 2 * HIDDEN])?;
    let most = MOST_ROWS * SLOTS + 8 * EXPERTS;
    let x = fill(device, &block, most * HIDDEN)?;
    let (act, y) = (device.zeros::<u16>(most * HIDDEN)?, device.zeros::<u16>(most * HIDDEN)?);
    let popularity: Vec<f32> = (0..EXPERTS).map(|_| 1.0 + 0.3 * bench.unit()).collect();
    for rows in [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, MOST_ROWS] {
        let own = height(rows, SLOTS, EXPERTS);
        let heights: &[usize] = match rows {
            1..=16 => &[16, 64],
            128..=512 => &[64, 128],
            1024..=2048 => &[128, 256],
            _ => &[own],
        };
        for &height in heights {
            let lists = (0..CHOICES)
                .map(|_| Sorted::new(bench, &popularity, rows, height))
                .collect::<Result<Vec<_>, _>>()?;
            let touched = lists.iter().map(|list| list.touched).sum::<usize>() as f64 / CHOICES as f64;
            let capacity = (rows * SLOTS + 8 * EXPERTS).next_multiple_of(8);
            let product = |up: bool, at: usize| {
                let list = &lists[at % CHOICES];
                let call = Call {
                    w: if up { &gate_up } else { &down },
                    rows: SortedRows {
                        bias: &bias,
                        x: if up { &x } else { &act },
                        y: match up {
                            true => Output::SwiGlu { y: &act, alpha: 1.702, limit: 7.0 },
                            false => Output::Bf16(&y),
                        },
                        tiles: &list.tiles,
                        counts: &list.counts,
                        experts: EXPERTS,
                        rows: if up { 2 * HIDDEN } else { HIDDEN },
                        cols: HIDDEN,
                        capacity,
                        height,
                        most_tiles: list.most_tiles,
                    },
                };
                gemm.issue(device, &call)
            };
            let work = |weight_rows: usize| Work {
                bytes: touched * (weight_rows * HIDDEN * 2) as f64 + (rows * SLOTS * HIDDEN * 4) as f64,
                flops: 2.0 * (rows * SLOTS * weight_rows * HIDDEN) as f64,
            };
            let launches = if rows > 1000 { 4 } else { 16 };
            let name = |what: &str| format!("{NAME} {what} {rows} rows, height {height}");
            bench.time(&name("gate_up"), work(2 * HIDDEN), launches, |at| product(true, at))?;
            bench.time(&name("down"), work(HIDDEN), launches, |at| product(false, at))?;
            bench.time(&name("both"), work(3 * HIDDEN), launches, |at| {
                product(true, at)?;
                product(false, at)
            })?;
        }
    }
    Ok(())
}
