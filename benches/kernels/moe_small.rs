//! The small-batch mixture of experts: each product alone, and the two in a row as a layer has them.

use ctxserve_backend::DeviceError;
use ctxserve_cuda::driver::{Buffer, Device};
use ctxserve_cuda::ops::moe_down::{Call as DownCall, MoeDown};
use ctxserve_cuda::ops::moe_gate_up::{Call, MoeGateUp, Shape, Split};
use ctxserve_cuda::ops::pack_mxfp4::{Rows, Strips};

use crate::harness::{Bench, Work};

const SHAPE: Shape = Shape { experts: 32, top_k: 4, hidden: 2880, inner: 2880 };
/// Choices to rotate among: with few rows each touches other experts.
const CHOICES: usize = 16;
const MOST_ROWS: usize = 96;

struct Inputs {
    gate_up: Buffer<u8>,
    down: Buffer<u8>,
    gate_up_bias: Buffer<f32>,
    down_bias: Buffer<f32>,
    h: Buffer<u16>,
    a: Buffer<u16>,
    x: Buffer<f32>,
    weight: Buffer<f32>,
    products: Buffer<f32>,
}

/// Strips of random codes with scales near one.
fn strips(bench: &Bench, strips: Strips) -> Result<Buffer<u8>, DeviceError> {
    let mut bytes = vec![0_u8; SHAPE.experts * strips.bytes()];
    for strip in bytes.chunks_exact_mut(strips.tiles * 544) {
        let (codes, scales) = strip.split_at_mut(strips.tiles * 512);
        codes.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&bench.bits().to_le_bytes()));
        scales.chunks_exact_mut(8).for_each(|word| {
            let bits = bench.bits() & 0x0303_0303_0303_0303;
            word.copy_from_slice(&(bits + 0x7676_7676_7676_7676).to_le_bytes());
        });
    }
    bench.device.upload(&bytes)
}

fn inputs(bench: &Bench) -> Result<Inputs, DeviceError> {
    let device = &bench.device;
    let Shape { experts, top_k, hidden, inner } = SHAPE;
    let floats = |count: usize| device.upload(&(0..count).map(|_| bench.unit()).collect::<Vec<f32>>());
    // fp16 numbers in [1, 2) of either sign.
    let halves = |count: usize| {
        device.upload(&(0..count).map(|_| (bench.bits() as u16 & 0x83ff) | 0x3c00).collect::<Vec<u16>>())
    };
    Ok(Inputs {
        gate_up: strips(bench, Strips::of(Rows::GateUp, 2 * inner, hidden))?,
        down: strips(bench, Strips::of(Rows::Down, hidden, inner))?,
        gate_up_bias: floats(experts * 2 * inner)?,
        down_bias: floats(experts * hidden)?,
        h: halves(MOST_ROWS * hidden)?,
        a: halves(MOST_ROWS * top_k * inner)?,
        x: floats(MOST_ROWS * hidden)?,
        weight: floats(MOST_ROWS * top_k)?,
        products: device.zeros(MOST_ROWS * top_k * hidden)?,
    })
}

/// Uniform choices of `rows` rows, and how many experts they touch.
fn choose(bench: &Bench, device: &Device, rows: usize) -> Result<(Buffer<i32>, usize), DeviceError> {
    let mut choice: Vec<i32> = Vec::new();
    while choice.len() < rows * SHAPE.top_k {
        let row = choice.len() / SHAPE.top_k * SHAPE.top_k;
        let expert = (bench.bits() % SHAPE.experts as u64) as i32;
        if !choice[row..].contains(&expert) {
            choice.push(expert);
        }
    }
    let mut active = choice.clone();
    active.sort_unstable();
    active.dedup();
    Ok((device.upload(&choice)?, active.len()))
}

pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    if !["moe_gate_up", "moe_down", "moe_pair"].iter().any(|name| bench.wants(name)) {
        return Ok(());
    }
    let device = &bench.device;
    let (gate_up, down) = (MoeGateUp::load(device)?, MoeDown::load(device)?);
    let held = inputs(bench)?;
    let Shape { top_k, hidden, inner, .. } = SHAPE;
    for rows in [1, 2, 4, 8, 16, 24, 32, 48, 64, 96] {
        let choices =
            (0..CHOICES).map(|_| choose(bench, device, rows)).collect::<Result<Vec<_>, DeviceError>>()?;
        let active = choices.iter().map(|(_, active)| active).sum::<usize>() as f64 / CHOICES as f64;
        let live = device.upload(&[rows as i32])?;
        let gate_up_call = |i: usize| Call {
            weights: &held.gate_up,
            bias: &held.gate_up_bias,
            h: &held.h,
            choice: &choices[i % CHOICES].0,
            live: &live,
            a: &held.a,
            rows,
            shape: SHAPE,
            alpha: 1.702,
            limit: 7.0,
        };
        let down_call = |i: usize| DownCall {
            weights: &held.down,
            bias: &held.down_bias,
            a: &held.a,
            choice: &choices[i % CHOICES].0,
            weight: &held.weight,
            live: &live,
            x: &held.x,
            products: &held.products,
            rows,
            shape: SHAPE,
        };
        let pairs = rows * top_k;
        let each = |kind, rows, cols| Strips::of(kind, rows, cols).bytes() as f64;
        let gate_up_work = Work {
            bytes: active * (each(Rows::GateUp, 2 * inner, hidden) + (8 * inner) as f64)
                + (2 * (rows * hidden + pairs * inner)) as f64,
            flops: (4 * pairs * hidden * inner) as f64,
        };
        let down_work = Work {
            bytes: active * (each(Rows::Down, hidden, inner) + (4 * hidden) as f64)
                + (2 * pairs * inner + 8 * rows * hidden) as f64,
            flops: (2 * pairs * hidden * inner) as f64,
        };
        let both =
            Work { bytes: gate_up_work.bytes + down_work.bytes, flops: gate_up_work.flops + down_work.flops };
        let other = if rows <= 8 { (Split::Piece, "pieces") } else { (Split::Strip, "strips") };
        for (split, way) in [other, (Split::Pipe, "pipe")] {
            let split = Some(split);
            let name = |what: &str| format!("{what} {rows} rows, {active:.1} experts, {way}");
            if bench.wants("moe_gate_up") {
                bench.time(&name("moe_gate_up"), gate_up_work, CHOICES, |i| {
                    gate_up.issue_as(device, &gate_up_call(i), split)
                })?;
            }
            if bench.wants("moe_down") {
                bench.time(&name("moe_down"), down_work, CHOICES, |i| {
                    down.issue_as(device, &down_call(i), split)
                })?;
            }
            if bench.wants("moe_pair") {
                bench.time(&name("moe_pair"), both, CHOICES, |i| {
                    gate_up.issue_as(device, &gate_up_call(i), split)?;
                    down.issue_as(device, &down_call(i), split)
                })?;
            }
        }
    }
    Ok(())
}
