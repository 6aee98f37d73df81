use std::sync::Arc;

use ctxserve_backend::{Batch, DeviceError, SampleRow, SequenceSlice};
use ctxserve_core::SamplingParams;
use ctxserve_cuda::driver::Buffer;
use ctxserve_cuda::sampler::Sampler;

use crate::harness::{Bench, Work};

const VOCAB: usize = 201_088;

/// Rows whose n-th best logit is `-slope * ln n`, in random places: at slope 2 a nucleus of 0.95 has a dozen tokens, at 1.5 a few
/// hundred, at 0.6 most of the vocabulary.
fn logits(bench: &Bench, rows: usize, slope: f32) -> Result<Buffer<f32>, DeviceError> {
    let mut values: Vec<f32> = (1..=VOCAB).map(|rank| 20.0 - slope * (rank as f32).ln()).collect();
    for at in (1..VOCAB).rev() {
        values.swap(at, bench.bits() as usize % (at + 1));
    }
    let mut logits = bench.device.zeros(rows * VOCAB)?;
    for row in 0..rows {
        values.rotate_left(12_345);
        logits.write(row * VOCAB, &values)?;
    }
    Ok(logits)
}

fn time(
    bench: &Bench,
    name: &str,
    params: SamplingParams,
    logits: &Buffer<f32>,
    rows: usize,
) -> Result<(), DeviceError> {
    let params = Arc::new(params);
    let slice = |at: usize| SequenceSlice {
        key: at as u64,
        rows: at..at + 1,
        start: 0,
        feed: None,
        tables: Arc::default(),
        sample: Some(SampleRow { seed: bench.bits(), ..SampleRow::new(Arc::clone(&params)) }),
    };
    let batch = Batch { tokens: vec![0; rows], sequences: (0..rows).map(slice).collect() };
    let mut sampler = Sampler::new(&bench.device, rows, VOCAB, VOCAB)?;
    sampler.upload(&batch)?;
    bench.device.synchronize()?;
    let work = Work { bytes: (rows * VOCAB * 4) as f64, flops: 0.0 };
    // Up to some 64 rows lie in L2, as they do after the product that makes them.
    bench.time(&format!("sampler {name}, {rows} rows"), work, 10, |_| sampler.issue(logits, rows))?;
    Ok(())
}

pub(crate) fn run(bench: &Bench) -> Result<(), DeviceError> {
    if !bench.wants("sampler") {
        return Ok(());
    }
    let base = SamplingParams::default;
    let nucleus = || SamplingParams { top_p: 0.95, ..base() };
    for rows in [1, 16, 64, 256] {
        let peaked = logits(bench, rows, 2.0)?;
        let cases = [
            ("greedy", SamplingParams::greedy()),
            ("draw", base()),
            ("top_p 0.95", nucleus()),
            ("top_k 20", SamplingParams { top_k: 20, ..base() }),
            ("min_p 0.05", SamplingParams { min_p: 0.05, ..base() }),
            (
                "greedy, 20 log-probabilities",
                SamplingParams { logprobs: Some(20), ..SamplingParams::greedy() },
            ),
        ];
        for (name, params) in cases {
            time(bench, name, params, &peaked, rows)?;
        }
        time(bench, "top_p 0.95, wide", nucleus(), &logits(bench, rows, 1.5)?, rows)?;
        time(bench, "top_p 0.95, flat", nucleus(), &logits(bench, rows, 0.6)?, rows)?;
    }
    Ok(())
}
