use ctxserve_backend::DeviceError;
use ctxserve_cuda::ops::gemv_gate_up::{Call, Dims, GemvGateUp};
use ctxserve_cuda::ops::gemv_out::{self, GemvOut};

use crate::gemv_qkv::{distinct, layers_of};
use crate::harness::{Bench, Work};

/// Of Qwen3-4B.
const COLS: usize = 2560;
const INNER: usize = 9728;
/// More than L2 holds.
const LAYERS: usize = 4;

pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    if !bench.wants("gemv_gate_up") {
        return Ok(());
    }
    let device = &bench.device;
    let values: Vec<f32> = (0..16 * COLS).map(|_| bench.unit()).collect();
    let weights = layers_of(bench, LAYERS, 2 * INNER * COLS)?;
    let of_down = layers_of(bench, 2 * LAYERS, INNER * COLS)?;
    let (x, vector) = (device.upload(&values)?, device.upload(&values[..COLS])?);
    let (zeros, sum) = (device.zeros::<f32>(COLS)?, device.zeros::<f32>(16 * COLS)?);
    let y = device.zeros::<u16>(16 * INNER)?;
    for rows in [1, 4, 8, 16] {
        let live = device.upload(&[rows as i32])?;
        let dims = Dims { rows, cols: COLS, inner: INNER };
        let work = Work {
            bytes: (2 * INNER * COLS * 2 + rows * (COLS * 4 + INNER * 2)) as f64,
            flops: (4 * INNER * COLS * rows) as f64,
        };
        for plan in GemvGateUp::plans(device, dims)?.into_iter().filter(|plan| plan.lines == rows) {
            let kernel = GemvGateUp::with_plan(device, dims, plan)?;
            bench.time(&format!("gemv_gate_up {rows} rows, {plan}"), work, 4 * LAYERS, |layer| {
                let weights = &weights[layer % LAYERS];
                let (norm, x, live, y) = (&vector, &x, &live, &y);
                kernel.issue(device, &Call { weights, norm, x, live, y, norm_cols: COLS, eps: 1e-6 })
            })?;
        }
        let dims = gemv_out::Dims { rows, q_width: INNER, hidden: COLS };
        let work = Work {
            bytes: (INNER * COLS * 2 + rows * (INNER * 2 + COLS * 8)) as f64,
            flops: (2 * INNER * COLS * rows) as f64,
        };
        for plan in distinct(GemvOut::plans(device, dims)?) {
            let kernel = GemvOut::with_plan(device, dims, plan)?;
            bench.time(&format!("gemv_gate_up's down {rows} rows, {plan}"), work, 4 * LAYERS, |layer| {
                let weights = &of_down[layer % (2 * LAYERS)];
                let call = gemv_out::Call { weights, bias: &zeros, heads: &y, x: &sum, live: &live };
                kernel.issue(device, &call)
            })?;
        }
    }
    Ok(())
}
