use ctxserve_backend::DeviceError;
use ctxserve_cuda::ops::pack_panels::{Call, PackPanels, Source};

use crate::harness::{Bench, Work};

pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    const COLS: usize = 2880;
    const ROWS: usize = 201_088;
    if !bench.wants("pack_panels") {
        return Ok(());
    }
    let device = &bench.device;
    let (source, panels) = (device.zeros(ROWS * COLS)?, device.zeros(ROWS * COLS)?);
    let call = Call {
        source: Source::Bf16(&source),
        rows: ROWS,
        cols: COLS,
        panels: &panels,
        capacity: ROWS,
        padded: COLS,
        first: 0,
        count: ROWS,
        row_map: None,
        column_map: None,
    };
    let kernel = PackPanels::load(device)?;
    let work = Work { bytes: (ROWS * COLS * 4) as f64, flops: 0.0 };
    bench.time(&format!("pack_panels {ROWS}x{COLS}"), work, 2, |_| kernel.issue(device, &call))?;
    Ok(())
}
