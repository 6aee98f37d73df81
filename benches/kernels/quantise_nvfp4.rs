use ctxserve_backend::DeviceError;
use ctxserve_cuda::ops::quantise_nvfp4::{Call, NormedCall, QuantiseNvfp4, Rounding};

use crate::harness::{Bench, Work};

/// A layer of a 4B model: what is normed, attention's output, what is between the dense layer's products.
const HIDDEN: usize = 2560;
const OTHERS: [usize; 2] = [4096, 9728];

pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    if !bench.wants("quantise_nvfp4") {
        return Ok(());
    }
    let device = &bench.device;
    let kernel = QuantiseNvfp4::load(device)?;
    let rounding = Rounding { factors: &[2e-3], scaled: false };
    let weight = device.upload(&(0..HIDDEN).map(|_| bench.unit()).collect::<Vec<f32>>())?;
    for rows in [1, 8, 64, 8192] {
        let live = device.upload(&[rows as i32])?;
        let capacity = (rows > 8).then_some(rows);
        let x = device.upload(&(0..rows * HIDDEN).map(|_| bench.unit()).collect::<Vec<f32>>())?;
        let y = device.zeros(rows * HIDDEN)?;
        let call = NormedCall {
            x: &x,
            weight: &weight,
            y: &y,
            live: &live,
            index: None,
            rows,
            cols: HIDDEN,
            capacity,
            eps: 1e-6,
            rounding,
        };
        let work = Work { bytes: (rows * HIDDEN * 6) as f64, flops: 0.0 };
        let name = format!("quantise_nvfp4 normed {rows}x{HIDDEN}");
        bench.time(&name, work, 20, |_| kernel.normed(device, &call))?;
        for cols in OTHERS {
            let values: Vec<u16> = (0..rows * cols).map(|_| (bench.unit().to_bits() >> 16) as u16).collect();
            // In place: what is rounded once is as long to round again.
            let x = device.upload(&values)?;
            let call = Call { x: &x, live: &live, rows, cols, capacity, rounding };
            let work = Work { bytes: (rows * cols * 4) as f64, flops: 0.0 };
            let name = format!("quantise_nvfp4 {rows}x{cols}");
            bench.time(&name, work, 20, |_| kernel.issue(device, &call))?;
        }
    }
    Ok(())
}
