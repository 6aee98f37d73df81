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

const OTHERS: [[((usize, usize), usize); 4]; 2] = [
    [((1, 8), 192), ((1, 8), 160), ((1, 8), 244), ((1, 8), 160)],
    [((2, 8), 128), ((2, 8), 80), ((1, 8), 244), ((2, 8), 80)],
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
        let mut kernels = Vec::new();
        for (at, product) in PRODUCTS.iter().enumerate() {
            let dims = dims(product, rows);
            for (turn, plan) in Plan::all(&dims, device.facts())?.into_iter().enumerate() {
                let kernel = GemvNvfp4::with_plan(device, dims, plan)?;
                let name = format!("gemv_nvfp4 {rows} rows, {}, {plan}", product.name);
                bench.time(&name, work(&[*product], rows), 4 * LAYERS, |layer| {
                    issue(bench, &data, &live, &kernel, layer, at)
                })?;
                if turn == 0 {
                    kernels.push(kernel);
                }
            }
        }
        let name = format!("gemv_nvfp4 {rows} rows, a layer");
        bench.time(&name, work(&PRODUCTS, rows), 4 * LAYERS, |layer| {
            kernels
                .iter()
                .enumerate()
                .try_for_each(|(at, kernel)| issue(bench, &data, &live, kernel, layer, at))
        })?;
        // Other whole layers: of each product blocks of a cluster, pieces, clusters.
        for other in OTHERS {
            let mut kernels = Vec::new();
            for (product, (way, clusters)) in PRODUCTS.iter().zip(other) {
                let dims = dims(product, rows);
                let plan = Plan::new(&dims, device.facts(), way, clusters, 0);
                kernels.extend(plan.map(|plan| GemvNvfp4::with_plan(device, dims, plan)).transpose()?);
            }
            let name = format!("gemv_nvfp4 {rows} rows, a layer, {other:?}");
            bench.time(&name, work(&PRODUCTS, rows), 4 * LAYERS, |layer| {
                kernels
                    .iter()
                    .enumerate()
                    .try_for_each(|(at, kernel)| issue(bench, &data, &live, kernel, layer, at))
            })?;
        }
    }
    Ok(())
}
