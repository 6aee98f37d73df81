use ctxserve_backend::DeviceError;
use ctxserve_cuda::ops::attention::HEAD_DIMS;
use ctxserve_cuda::ops::kv_append::{Call, HeadNorms, KvAppend, StoreCall};

use crate::attention_decode::{KV_HEADS, PAGE, Pool, heads_of};
use crate::harness::{Bench, Work};

pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    if !bench.wants("kv_append") {
        return Ok(());
    }
    HEAD_DIMS.into_iter().try_for_each(|dim| of(bench, dim))
}

fn of(bench: &Bench, dim: usize) -> Result<(), DeviceError> {
    let device = &bench.device;
    let kernel = KvAppend::load_for(device, dim)?;
    let heads = heads_of(dim);
    let width = (heads + 2 * KV_HEADS) * dim;
    let norm = device.upload(&vec![1_f32; dim])?;
    for fp8 in [true, false] {
        let pool = Pool::new(bench, fp8, dim)?;
        for rows in [64, 512, 8192] {
            let values: Vec<f32> = (0..rows * width).map(|_| bench.unit()).collect();
            // Two sets, so that the larger case never finds its rows in L2.
            let qkv = [device.upload(&values)?, device.upload(&values)?];
            let q = [device.allocate(rows * heads * dim)?, device.allocate(rows * heads * dim)?];
            let ints = |value: &dyn Fn(usize) -> usize| {
                device.upload(&(0..rows).map(|row| value(row) as i32).collect::<Vec<_>>())
            };
            let pages = pool.table(bench, rows.div_ceil(PAGE));
            let position = ints(&|row| row + 1000)?;
            let slot = ints(&|row| pages[row / PAGE] as usize * PAGE + row % PAGE)?;
            let live = device.upload(&[rows as i32])?;
            let inv_freq: Vec<f32> =
                (0..dim / 2).map(|i| 150_000_f64.powf(-2.0 * i as f64 / dim as f64) as f32).collect();
            let inv_freq = device.upload(&inv_freq)?;
            let bytes = rows * (width * 4 + heads * dim * 2 + pool.token_bytes());
            let name = format!("kv_append {} {rows}x{width} of {dim}", if fp8 { "e4m3" } else { "bf16" });
            bench.time(&name, Work { bytes: bytes as f64, flops: 0.0 }, 20, |launch| {
                let call = Call {
                    qkv: &qkv[launch % 2],
                    q: &q[launch % 2],
                    cache: pool.cache(None),
                    position: &position,
                    slot: &slot,
                    live: &live,
                    inv_freq: &inv_freq,
                    norms: (dim == 128).then_some(HeadNorms { q: &norm, k: &norm, eps: 1e-6 }),
                    mscale: 1.346_573_6,
                    rows,
                    heads,
                };
                kernel.issue(device, &call)
            })?;
            let kv = 2 * KV_HEADS * dim;
            let bytes = (rows * (kv * 4 + pool.token_bytes())) as f64;
            let name = format!("kv_store {} {rows}x{kv} of {dim}", if fp8 { "e4m3" } else { "bf16" });
            bench.time(&name, Work { bytes, flops: 0.0 }, 20, |launch| {
                let cache = pool.cache(None);
                let call = StoreCall { kv: &qkv[launch % 2], cache, slot: &slot, live: &live, rows };
                kernel.store(device, &call)
            })?;
        }
    }
    Ok(())
}
