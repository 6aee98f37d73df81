use ctxserve_backend::DeviceError;
use ctxserve_cuda::driver::Buffer;
use ctxserve_cuda::ops::gemv_nvfp4::{Call, Dims, GemvNvfp4, Input, Output, Plan};
use ctxserve_cuda::ops::pack_nvfp4::strip_bytes;

use crate::harness::{Bench, Work};

/// Layers of weights: 454 MB.
const LAYERS: usize = 8;
const ROWS: usize = 16;
const HIDDEN: usize = 2560;
const INNER: usize = 9728;

/// One of a layer's products.
#[derive(Clone, Copy, Debug)]
struct Product {
    name: &'static str,
    cols: usize,
    outputs: usize,
    normed: bool,
}

const PRODUCTS: [Product; 4] = [
    Product { name: "qkv", cols: HIDDEN, outputs: 6144, normed: true },
    Product { name: "out", cols: 4096, outputs: HIDDEN, normed: false },
    Product { name: "gate/up", cols: HIDDEN, outputs: 2 * INNER, normed: true },
    Product { name: "down", cols: INNER, outputs: HIDDEN, normed: false },
];

struct Data {
    /// Of each layer the four products' strips.
    layers: Vec<Vec<Buffer<u8>>>,
    factors: Buffer<f32>,
    norm: Buffer<f32>,
    x: Buffer<f32>,
    qkv: Buffer<f32>,
    plain: Buffer<u16>,
    inner: Buffer<u16>,
}

fn issue(
    bench: &Bench,
    data: &Data,
    live: &Buffer<i32>,
    kernel: &GemvNvfp4,
    layer: usize,
    at: usize,
) -> Result<(), DeviceError> {
    let normed = Input::Normed { x: &data.x, weight: &data.norm, norm_cols: HIDDEN, eps: 1e-6 };
    let (input, output) = match at {
        0 => (normed, Output::F32(&data.qkv)),
        1 => (Input::Plain(&data.plain), Output::Add(&data.x)),
        2 => (normed, Output::SwiGlu(&data.inner)),
        _ => (Input::Plain(&data.inner), Output::Add(&data.x)),
    };
    let weights = &data.layers[layer % LAYERS][at];
    kernel.issue(&bench.device, &Call { weights, factors: &data.factors, live, input, output })
}

pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    if !bench.wants("gemv_nvfp4") {
        return Ok(());
    }
    let device = &bench.device;
    let mut layers = Vec::new();
    // Any codes will do; scale bytes as of values near one.
    let sample = |product: &Product| -> Vec<u8> {
        let tiles = product.cols / 64;
        let mut strip = vec![0; strip_bytes(product.outputs, product.cols)];
        for part in strip.chunks_mut(8) {
            part.copy_from_slice(&bench.bits().to_le_bytes());
        }
        for strip in strip.chunks_mut(tiles * 576) {
            strip[tiles * 512..].iter_mut().for_each(|byte| *byte = 168 + (*byte & 31));
        }
        strip
    };
    let samples: Vec<Vec<u8>> = PRODUCTS.iter().map(sample).collect();
    for _ in 0..LAYERS {
        layers.push(samples.iter().map(|bytes| device.upload(bytes)).collect::<Result<Vec<_>, _>>()?);
    }
    let units = |count: usize| (0..count).map(|_| bench.unit()).collect::<Vec<f32>>();
    let data = Data {
        layers,
        // Small, so that the residual stream stays finite over many launches.
        factors: device.upload(&vec![1e-6_f32; 2 * INNER])?,
        norm: device.upload(&units(HIDDEN))?,
        x: device.upload(&units(ROWS * HIDDEN))?,
        qkv: device.zeros(ROWS * 6144)?,
        plain: device.upload(&vec![0x3c00_u16; ROWS * 4096])?,
        inner: device.zeros(ROWS * INNER)?,
    };
    let bytes = |product: &Product, rows: usize| {
        (product.outputs * product.cols * 9 / 16 + rows * (product.cols * 2 + product.outputs * 4)) as f64
    };
    let work = |products: &[Product], rows: usize| Work {
        bytes: products.iter().map(|product| bytes(product, rows)).sum(),
        flops: products.iter().map(|product| 2.0 * (product.outputs * product.cols * rows) as f64).sum(),
    };
    let dims = |product: &Product, rows: usize| Dims {
        rows,
        cols: product.cols,
        outputs: product.outputs,
        normed: product.normed,
    };
    for rows in [1, 2, 4, 8, 16] {
        let live = device.upload(&[rows as i32])?;
        let mut best = Vec::new();
        for (at, product) in PRODUCTS.iter().enumerate() {
            let mut timed = Vec::new();
            for plan in plans(bench, &dims(product, rows))? {
                let kernel = GemvNvfp4::with_plan(device, dims(product, rows), plan)?;
                let name = format!("gemv_nvfp4 {rows} rows, {}, {plan}", product.name);
                let us = bench.time(&name, work(&[*product], rows), 4 * LAYERS, |layer| {
                    issue(bench, &data, &live, &kernel, layer, at)
                })?;
                timed.push((us, kernel));
            }
            timed.sort_by(|a, b| a.0.total_cmp(&b.0));
            best.push(timed);
        }
        let whole = work(&PRODUCTS, rows);
        let time = |what: &str, kernels: [&GemvNvfp4; 4]| {
            let name = format!("gemv_nvfp4 {rows} rows, a layer, {what}");
            bench.time(&name, whole, 4 * LAYERS, |layer| {
                (0..4).try_for_each(|at| issue(bench, &data, &live, kernels[at], layer, at))
            })
        };
        let fastest = |at: usize| &best[at][0].1;
        time("fastest of each", [fastest(0), fastest(1), fastest(2), fastest(3)])?;
        // One of the four in another way.
        for at in 0..4 {
            for (_, other) in &best[at][1..] {
                let mut kernels = [fastest(0), fastest(1), fastest(2), fastest(3)];
                kernels[at] = other;
                time(&format!("but {} {}", PRODUCTS[at].name, other.plan()), kernels)?;
            }
        }
    }
    Ok(())
}

/// What is compared: of one and of 16 rows also other numbers of clusters, and when the next kernel may start.
fn plans(bench: &Bench, dims: &Dims) -> Result<Vec<Plan>, DeviceError> {
    let facts = bench.device.facts();
    let all = Plan::all(dims, facts)?;
    if dims.rows != 1 && dims.rows != 16 {
        return Ok(all);
    }
    let strips = dims.outputs / 16;
    let mut found = Vec::new();
    for plan in all {
        let mut counts = vec![plan.clusters];
        for each in [1, 2, 3, 4, 5, 6] {
            let clusters = strips.div_ceil(each);
            if (plan.clusters + 1..=660 / plan.split).contains(&clusters) {
                counts.push(clusters);
            }
        }
        for clusters in counts {
            for launch in [0, 2, 99] {
                found.extend(Plan::new(dims, facts, plan.split, plan.pieces, clusters, launch));
            }
        }
    }
    Ok(found)
}
