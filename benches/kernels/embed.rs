use ctxserve_backend::DeviceError;
use ctxserve_cuda::ops::embed::{Call, Embed};

use crate::harness::{Bench, Work};

pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    const HIDDEN: usize = 2880;
    const VOCAB: usize = 201_088;
    if !bench.wants("embed") {
        return Ok(());
    }
    let device = &bench.device;
    let (table, kernel) = (device.zeros(VOCAB * HIDDEN)?, Embed::load(device)?);
    for rows in [1, 2048] {
        let tokens: Vec<i32> = (0..rows).map(|_| (bench.bits() % VOCAB as u64) as i32).collect();
        let (tokens, live) = (device.upload(&tokens)?, device.upload(&[rows as i32])?);
        let x = device.zeros(rows * HIDDEN)?;
        let call = Call {
            table: &table,
            capacity: None,
            tokens: &tokens,
            feed: None,
            live: &live,
            x: &x,
            rows,
            vocab: VOCAB,
            hidden: HIDDEN,
            cols: HIDDEN,
        };
        let work = Work { bytes: (rows * HIDDEN * 6) as f64, flops: 0.0 };
        bench.time(&format!("embed {rows} rows"), work, 20, |_| kernel.issue(device, &call))?;
    }
    Ok(())
}
