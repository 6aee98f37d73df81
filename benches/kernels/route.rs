use ctxserve_backend::DeviceError;
use ctxserve_cuda::ops::route::{Call, Normed, Route, Split};

use crate::harness::{Bench, Work};

const HIDDEN: usize = 2880;
const EXPERTS: usize = 32;
const TOP_K: usize = 4;
/// Routers, so that none stays in L2: 2 MB of other reads lie between two uses in a model, not 200.
const ROUTERS: usize = 48;

pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    if !bench.wants("route") {
        return Ok(());
    }
    let device = &bench.device;
    let kernel = Route::load(device)?;
    let routers = (0..ROUTERS)
        .map(|_| {
            let bits = (0..EXPERTS * HIDDEN).map(|_| (bench.unit() * 0.1).to_bits().wrapping_shr(16) as u16);
            device.upload(&bits.collect::<Vec<u16>>())
        })
        .collect::<Result<Vec<_>, _>>()?;
    let all = [
        (Split::Spread, true),
        (Split::Split, true),
        (Split::Split, false),
        (Split::Some, false),
        (Split::Many, false),
    ];
    for rows in [1, 16, 32, 64, 256, 512, 1024, 2048, 8192] {
        let values: Vec<f32> = (0..rows * HIDDEN).map(|_| bench.unit()).collect();
        let (x, norm) = (device.upload(&values)?, device.upload(&values[..HIDDEN])?);
        let (bias, live) = (device.upload(&values[..EXPERTS])?, device.upload(&[rows as i32])?);
        let (choice, weight) = (device.zeros(rows * TOP_K)?, device.zeros(rows * TOP_K)?);
        let (h, scale) = (device.zeros(rows * HIDDEN)?, device.zeros(rows)?);
        for (split, of_rows) in all {
            let (least, most) = match split {
                Split::Spread | Split::One => (1, 32),
                Split::Split if of_rows => (16, 64),
                Split::Split => (64, 512),
                Split::Some => (512, 2048),
                Split::Many => (2048, usize::MAX),
            };
            if rows < least || rows > most {
                continue;
            }
            let call = |i: usize| Call {
                x: &x,
                norm: &norm,
                router: &routers[i % ROUTERS],
                bias: &bias,
                live: &live,
                choice: &choice,
                weight: &weight,
                normed: if of_rows { Normed::Rows(&h) } else { Normed::Scales(&scale) },
                rows,
                hidden: HIDDEN,
                experts: EXPERTS,
                top_k: TOP_K,
                eps: 1e-5,
            };
            let work = Work {
                bytes: (rows * HIDDEN * if of_rows { 6 } else { 4 } + EXPERTS * HIDDEN * 2) as f64,
                flops: (2 * rows * HIDDEN * EXPERTS) as f64,
            };
            let written = if of_rows { "rows" } else { "scales" };
            bench.time(&format!("route {split:?}, {written}, {rows}x{HIDDEN}"), work, ROUTERS, |i| {
                kernel.issue_as(device, &call(i), split)
            })?;
        }
    }
    Ok(())
}
