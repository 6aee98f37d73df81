use std::sync::Arc;

use ctxserve_backend::{Batch, DeviceError, SampleRow, SequenceSlice};
use ctxserve_core::SamplingParams;
use ctxserve_cuda::sampler::Sampler;

use crate::harness::{Bench, Work};

pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    const VOCAB: usize = 201_088;
    if !bench.wants("sampler") {
        return Ok(());
    }
    let device = &bench.device;
    // Logits like a model's: a few stand out of a broad rest.
    let normal = || (bench.unit() + bench.unit() + bench.unit() + bench.unit()) * 2.5;
    let values: Vec<f32> = (0..VOCAB + 4096)
        .map(|_| normal() + if bench.unit() > 0.9998 { 6.0 + normal().abs() } else { 0.0 })
        .collect();
    let base = SamplingParams::default;
    let cases = [
        ("greedy", SamplingParams::greedy()),
        ("draw", base()),
        ("top_p 0.95", SamplingParams { top_p: 0.95, ..base() }),
        ("top_k 20", SamplingParams { top_k: 20, ..base() }),
        ("min_p 0.05", SamplingParams { min_p: 0.05, ..base() }),
        ("top_p 0.999 at 2", SamplingParams { temperature: 2.0, top_p: 0.999, ..base() }),
        ("greedy, 20 log-probabilities", SamplingParams { logprobs: Some(20), ..SamplingParams::greedy() }),
    ];
    for rows in [1, 16, 64, 256] {
        let mut logits = device.zeros::<f32>(rows * VOCAB)?;
        for row in 0..rows {
            let shift = bench.bits() as usize % 1024 * 4;
            logits.write(row * VOCAB, &values[shift..shift + VOCAB])?;
        }
        for (name, params) in &cases {
            let params = Arc::new(params.clone());
            let slice = |at: usize| SequenceSlice {
                key: at as u64,
                rows: at..at + 1,
                start: 0,
                feed: None,
                tables: Arc::default(),
                sample: Some(SampleRow { seed: bench.bits(), ..SampleRow::new(Arc::clone(&params)) }),
            };
            let batch = Batch { tokens: vec![0; rows], sequences: (0..rows).map(slice).collect() };
            let mut sampler = Sampler::new(device, rows, VOCAB, VOCAB)?;
            sampler.upload(&batch)?;
            device.synchronize()?;
            let work = Work { bytes: (rows * VOCAB * 4) as f64, flops: 0.0 };
            // In L2, as after the product that makes them, where they fit.
            bench
                .time(&format!("sampler {name}, {rows} rows"), work, 10, |_| sampler.issue(&logits, rows))?;
        }
    }
    Ok(())
}
