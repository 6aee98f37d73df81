use ctxserve_backend::DeviceError;
use ctxserve_cuda::ops::gemv_out::{Call, Dims, GemvOut};

use crate::gemv_qkv::{LAYERS, distinct, layers};
use crate::harness::{Bench, Work};

const Q: usize = 4096;
const HIDDEN: usize = 2880;

pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    if !bench.wants("gemv_out") {
        return Ok(());
    }
    let device = &bench.device;
    let weights = layers(bench, HIDDEN * Q)?;
    let values: Vec<f32> = (0..16 * HIDDEN).map(|_| bench.unit()).collect();
    let (x, bias) = (device.upload(&values)?, device.upload(&values[..HIDDEN])?);
    // Small, so that the residual stream stays finite over many launches.
    let heads = device.upload(&vec![0x3c00_u16; 16 * Q])?;
    let work = |rows: usize| Work {
        bytes: (HIDDEN * Q * 2 + rows * (Q * 2 + HIDDEN * 8)) as f64,
        flops: (2 * HIDDEN * Q * rows) as f64,
    };
    let dims = |rows| Dims { rows, q_width: Q, hidden: HIDDEN };
    for rows in [1, 8, 16] {
        let live = device.upload(&[rows as i32])?;
        for plan in distinct(GemvOut::plans(device, dims(rows))?) {
            let kernel = GemvOut::with_plan(device, dims(rows), plan)?;
            bench.time(&format!("gemv_out {rows} rows, {plan}"), work(rows), 2 * LAYERS, |layer| {
                let weights = &weights[layer % LAYERS];
                kernel.issue(device, &Call { weights, bias: &bias, heads: &heads, x: &x, live: &live })
            })?;
        }
    }
    Ok(())
}
