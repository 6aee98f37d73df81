use ctxserve_backend::DeviceError;
use ctxserve_cuda::ops::attention::HEAD_DIM;
use ctxserve_cuda::ops::kv_append::{Call, KvAppend};

use crate::attention_decode::{HEADS, KV_HEADS, PAGE, Pool};
use crate::harness::{Bench, Work};

pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    if !bench.wants("kv_append") {
        return Ok(());
    }
    let device = &bench.device;
    let kernel = KvAppend::load(device)?;
    let width = (HEADS + 2 * KV_HEADS) * HEAD_DIM;
    for fp8 in [true, false] {
        let pool = Pool::new(bench, fp8)?;
        for rows in [64, 512, 8192] {
            let values: Vec<f32> = (0..rows * width).map(|_| bench.unit()).collect();
            // Two sets, so that the larger case never finds its rows in L2.
            let qkv = [device.upload(&values)?, device.upload(&values)?];
            let q = [device.allocate(rows * HEADS * HEAD_DIM)?, device.allocate(rows * HEADS * HEAD_DIM)?];
            let ints = |value: &dyn Fn(usize) -> usize| {
                device.upload(&(0..rows).map(|row| value(row) as i32).collect::<Vec<_>>())
            };
            let pages = pool.table(bench, rows.div_ceil(PAGE));
            let position = ints(&|row| row + 1000)?;
            let slot = ints(&|row| pages[row / PAGE] as usize * PAGE + row % PAGE)?;
            let live = device.upload(&[rows as i32])?;
            let inv_freq: Vec<f32> = (0..32).map(|i| 150_000_f64.powf(-f64::from(i) / 32.0) as f32).collect();
            let inv_freq = device.upload(&inv_freq)?;
            let bytes = rows * (width * 4 + HEADS * HEAD_DIM * 2 + pool.token_bytes());
            let name = format!("kv_append {} {rows}x{width}", if fp8 { "e4m3" } else { "bf16" });
            bench.time(&name, Work { bytes: bytes as f64, flops: 0.0 }, 20, |launch| {
                let call = Call {
                    qkv: &qkv[launch % 2],
                    q: &q[launch % 2],
                    cache: pool.cache(None),
                    position: &position,
                    slot: &slot,
                    live: &live,
                    inv_freq: &inv_freq,
                    mscale: 1.346_573_6,
                    rows,
                    heads: HEADS,
                };
                kernel.issue(device, &call)
            })?;
        }
    }
    Ok(())
}
