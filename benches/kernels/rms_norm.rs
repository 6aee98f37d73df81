use ctxserve_backend::DeviceError;
use ctxserve_cuda::ops::rms_norm::{Call, RmsNorm};

use crate::harness::{Bench, Work};

pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    const COLS: usize = 2880;
    if !bench.wants("rms_norm") {
        return Ok(());
    }
    let device = &bench.device;
    let kernel = RmsNorm::load(device)?;
    for rows in [64, 8192] {
        let values: Vec<f32> = (0..rows * COLS).map(|_| bench.unit()).collect();
        let (x, y) = (device.upload(&values)?, device.zeros(rows * COLS)?);
        let (weight, live) = (device.upload(&values[..COLS])?, device.upload(&[rows as i32])?);
        let call = Call {
            x: &x,
            weight: &weight,
            y: &y,
            live: &live,
            index: None,
            rows,
            cols: COLS,
            capacity: rows,
            eps: 1e-5,
        };
        let work = Work { bytes: (rows * COLS * 6) as f64, flops: 0.0 };
        bench.time(&format!("rms_norm {rows}x{COLS}"), work, 20, |_| kernel.issue(device, &call))?;
    }
    Ok(())
}
