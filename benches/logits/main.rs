//! Writes the logits of given token sequences, for comparison with another implementation (`tests/gpu/exact.py`).
//!
//! `dump-logits --model DIR --input FILE --output FILE [--device cpu|cuda] [--kv bf16|fp8|f32] [--chunk N] [--batch N]`
//!
//! The input is JSON: a list of `{"tokens": [...], "from": n}`. Tokens before `from` are prefilled in chunks, the others are fed
//! one by one; logits are written after every chunk's end at `from - 1` and after each single token, float32, row after row.

#![allow(clippy::print_stdout)]

use std::fs;
use std::io::Write;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::Parser;
use ctxserve_backend::{Backend, Batch, KvDtype, KvPlan, PageTable, SampleRow, SequenceSlice};
use ctxserve_checkpoint::Checkpoint;
use ctxserve_core::SamplingParams;
use ctxserve_cpu::{CpuBackend, CpuOptions};
use ctxserve_cuda::driver::Device;
use ctxserve_cuda::{CudaBackend, CudaOptions};
use ctxserve_models::{LoadOptions, Model, load};
use serde_json::Value;

#[derive(Debug, Parser)]
struct Options {
    /// Directory of a checkpoint.
    #[arg(long)]
    model: PathBuf,
    /// JSON list of sequences.
    #[arg(long)]
    input: PathBuf,
    /// Where the logits go.
    #[arg(long)]
    output: PathBuf,
    /// cpu or cuda.
    #[arg(long, default_value = "cuda")]
    device: String,
    /// Storage of keys and values: f32, bf16 or fp8.
    #[arg(long, default_value = "bf16")]
    kv: String,
    /// Most prompt tokens of a step.
    #[arg(long, default_value_t = 8192)]
    chunk: usize,
    /// Sequences computed together.
    #[arg(long, default_value_t = 1)]
    batch: usize,
}

struct Sequence {
    tokens: Vec<u32>,
    from: usize,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let sequences = read(&options)?;
    let checkpoint = Checkpoint::open(&options.model)?;
    let longest = sequences.iter().map(|s| s.tokens.len()).max().unwrap_or(0);
    match options.device.as_str() {
        "cpu" => run(CpuBackend::new(CpuOptions::default())?, &checkpoint, &options, &sequences),
        "cuda" => {
            let max_rows = options.chunk.max(256) + options.batch;
            let options_cuda = CudaOptions {
                max_rows,
                max_sequences: options.batch.max(1),
                max_context: longest + 1,
                graphs: true,
                nvfp4_activations: false,
            };
            run(CudaBackend::new(Device::open(0)?, options_cuda)?, &checkpoint, &options, &sequences)
        }
        other => bail!("--device {other}: cpu or cuda"),
    }
}

fn read(options: &Options) -> anyhow::Result<Vec<Sequence>> {
    let json: Value = serde_json::from_slice(&fs::read(&options.input)?)?;
    let list = json.as_array().context("the input is no list")?;
    let sequence = |entry: &Value| {
        let tokens: Vec<u32> = serde_json::from_value(entry["tokens"].clone())?;
        let from = entry["from"].as_u64().context("from")? as usize;
        if from == 0 || from > tokens.len() {
            bail!("from must be between 1 and the number of tokens");
        }
        Ok(Sequence { tokens, from })
    };
    list.iter().map(sequence).collect()
}

fn run<B: Backend>(
    mut backend: B,
    checkpoint: &Checkpoint,
    options: &Options,
    sequences: &[Sequence],
) -> anyhow::Result<()> {
    let kv_dtype = match options.kv.as_str() {
        "f32" => KvDtype::F32,
        "bf16" => KvDtype::Bf16,
        "fp8" => KvDtype::Fp8E4m3,
        other => bail!("--kv {other}: f32, bf16 or fp8"),
    };
    const PAGE: usize = 64;
    let model = load(checkpoint, &mut backend, &LoadOptions { page_size: PAGE, kv_dtype }, &mut |_| {})?;
    let longest = sequences.iter().map(|s| s.tokens.len()).max().unwrap_or(1);
    let pages = longest.div_ceil(PAGE);
    let spec = model.info().kv.clone();
    let plan = KvPlan { pages: vec![pages * options.batch.max(1); spec.groups.len()], spec };
    let mut kv = backend.allocate_kv(&plan)?;
    println!("{}, {}", backend.describe(), model.info().description);
    let mut output = std::io::BufWriter::new(fs::File::create(&options.output)?);
    for group in sequences.chunks(options.batch.max(1)) {
        for row in compute(&mut backend, &*model, &mut kv, &plan, group, options.chunk)? {
            output.write_all(&row.iter().flat_map(|z| z.to_le_bytes()).collect::<Vec<_>>())?;
        }
    }
    output.flush()?;
    Ok(())
}

/// Logits of every sequence, sequence after sequence. Pages of neighbours alternate, so that tables matter.
fn compute<B: Backend>(
    backend: &mut B,
    model: &dyn Model<B>,
    kv: &mut B::Kv,
    plan: &KvPlan,
    group: &[Sequence],
    chunk: usize,
) -> anyhow::Result<Vec<Vec<f32>>> {
    let groups = plan.spec.groups.len();
    let vocab = model.info().vocab_size;
    // What a step reads and writes, and no pages that have slid out of a window.
    let size = plan.spec.page_size;
    let tables = |at: usize, positions: Range<usize>| -> Vec<PageTable> {
        let end = positions.end.div_ceil(size);
        let table = |first: usize| PageTable {
            first,
            pages: (first..end).map(|page| (page * group.len() + at) as u32).collect(),
        };
        (0..groups).map(|of| table(plan.spec.first_visible(of, positions.start) / size)).collect()
    };
    let mut done = vec![0; group.len()];
    let mut rows: Vec<Vec<Vec<f32>>> = vec![Vec::new(); group.len()];
    let params = Arc::new(SamplingParams::greedy());
    loop {
        let mut batch = Batch::default();
        let mut wanted = Vec::new();
        let mut room = chunk;
        // Single tokens first: that is how steps are laid out.
        for decode in [true, false] {
            for (at, sequence) in group.iter().enumerate() {
                let start = done[at];
                if start == sequence.tokens.len() || (start >= sequence.from) != decode {
                    continue;
                }
                let count = if decode { 1 } else { (sequence.from - start).min(room) };
                if count == 0 {
                    continue;
                }
                room -= if decode { 0 } else { count };
                let first = batch.tokens.len();
                batch.tokens.extend_from_slice(&sequence.tokens[start..start + count]);
                let sample = (start + count >= sequence.from).then(|| SampleRow::new(Arc::clone(&params)));
                if sample.is_some() {
                    wanted.push(at);
                }
                batch.sequences.push(SequenceSlice {
                    key: at as u64,
                    rows: first..batch.tokens.len(),
                    start,
                    feed: None,
                    tables: Arc::new(tables(at, start..start + count)),
                    sample,
                });
                done[at] = start + count;
            }
        }
        if batch.sequences.is_empty() {
            return Ok(rows.into_iter().flatten().collect());
        }
        let logits = model.forward(backend, kv, &batch)?;
        let values = backend.read_logits(&logits)?;
        for (&at, row) in wanted.iter().zip(values.chunks(vocab)) {
            rows[at].push(row.to_vec());
        }
    }
}
