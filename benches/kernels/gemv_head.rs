use ctxserve_backend::DeviceError;
use ctxserve_cuda::ops::gemv_head::{Call, Dims, GemvHead};
use half::bf16;

use crate::harness::{Bench, Work};

const COLS: usize = 2880;
const VOCAB: usize = 201_088;

pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    if !bench.wants("gemv_head") {
        return Ok(());
    }
    let device = &bench.device;
    let part: Vec<u16> =
        (0..VOCAB * COLS / 32).map(|_| bf16::from_f32(bench.unit() * 0.02).to_bits()).collect();
    let mut weights = device.allocate::<u16>(VOCAB * COLS)?;
    for at in 0..32 {
        weights.write(at * part.len(), &part)?;
    }
    let values: Vec<f32> = (0..16 * COLS).map(|_| bench.unit()).collect();
    let (x, norm) = (device.upload(&values)?, device.upload(&values[..COLS])?);
    let logits = device.zeros(16 * VOCAB)?;
    let index = device.upload(&(0..16).collect::<Vec<i32>>())?;
    let work = |rows: usize| Work {
        bytes: (VOCAB * COLS * 2 + rows * (COLS + VOCAB) * 4) as f64,
        flops: (2 * VOCAB * COLS * rows) as f64,
    };
    let dims = |rows| Dims { rows, cols: COLS, vocab: VOCAB, stride: VOCAB };
    let time = |name: &str, rows: usize, kernel: &GemvHead| {
        let live = device.upload(&[rows as i32])?;
        println!("  {}", kernel.plan());
        bench.time(name, work(rows), 3, |_| {
            let call = Call {
                weights: &weights,
                norm: &norm,
                x: &x,
                index: Some(&index),
                live: &live,
                logits: &logits,
                norm_cols: COLS,
                eps: 1e-5,
            };
            kernel.issue(device, &call)
        })
    };
    for rows in [1, 2, 4, 8, 16] {
        time(&format!("gemv_head {rows} rows"), rows, &GemvHead::load(device, dims(rows))?)?;
    }
    Ok(())
}
