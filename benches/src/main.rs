//! Decode and prefill speed of the CPU backend on gpt-oss-20b's shape with synthetic weights, beside the memory
//! bandwidth that decode is bound by. Prints a table and one JSON line per precision.

mod model;
mod probe;

use std::io::Write;
use std::num::NonZeroUsize;
use std::time::Instant;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use ctxserve_backend::Backend;
use ctxserve_cpu::{CpuBackend, CpuOptions, Isa, Precision};
use serde_json::json;

use model::{LAYERS, Model};

/// Measures the CPU backend on gpt-oss-20b's shape.
#[derive(Debug, Parser)]
struct Args {
    /// Layers to build; below 24 the whole model's speed is extrapolated from the layers' and the head's times.
    #[arg(long, default_value_t = LAYERS)]
    layers: usize,
    /// What to measure.
    #[arg(long, value_enum, default_value_t = Which::Both)]
    precision: Which,
    /// Worker threads; all cores by default.
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// Instructions; the best of the machine by default.
    #[arg(long, value_enum)]
    isa: Option<Instructions>,
    /// Prompt tokens, prefilled in one step.
    #[arg(long, default_value_t = 128)]
    prompt: usize,
    /// Tokens decoded after the prompt.
    #[arg(long, default_value_t = 32)]
    decode: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Which {
    Exact,
    Int8,
    Both,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Instructions {
    Portable,
    Avx2,
    Avx512,
    Neon,
}

impl From<Instructions> for Isa {
    fn from(instructions: Instructions) -> Self {
        match instructions {
            Instructions::Portable => Self::Portable,
            Instructions::Avx2 => Self::Avx2,
            Instructions::Avx512 => Self::Avx512,
            Instructions::Neon => Self::Neon,
        }
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let threads = args.threads.or_else(|| std::thread::available_parallelism().ok());
    let cores = threads.map_or(1, NonZeroUsize::get);
    let asked = args.isa.map(Isa::from).filter(|isa| Isa::available().contains(isa));
    let (isa, commit) = (asked.unwrap_or_else(Isa::detect), commit());
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}, {cores} threads, {isa}, commit {commit}", device(),)?;
    writeln!(
        out,
        "{:<6} {:>6} {:>10} {:>9} {:>8} {:>9} {:>6} {:>11} {:>6} {:>7}",
        "",
        "layers",
        "decode t/s",
        "ms/token",
        "GB/token",
        "read GB/s",
        "share",
        "prefill t/s",
        "load s",
        "RSS GiB"
    )?;
    for (name, precision) in [("exact", Precision::Exact), ("int8", Precision::Int8)] {
        let skipped = if precision == Precision::Exact { Which::Int8 } else { Which::Exact };
        if args.precision == skipped {
            continue;
        }
        let backend =
            CpuBackend::new(CpuOptions { threads, precision, isa: Some(isa), ..CpuOptions::default() })?;
        let description = backend.describe();
        let started = Instant::now();
        let mut model = Model::new(backend, args.layers, args.prompt + args.decode)?;
        let load = started.elapsed().as_secs_f64();
        // Probed on both sides of the measurement: a neighbour on the machine may slow either.
        let before = probe::read_bandwidth(cores);
        let timings = model.measure(args.prompt, args.decode)?;
        let bandwidth = probe::read_bandwidth(cores).max(before);
        let bytes = model::bytes_per_token(precision);
        let (decode, prefill) = (timings.decode(args.layers), timings.prefill(args.layers));
        let share = bytes / decode / bandwidth;
        let prefill_speed = args.prompt as f64 / prefill;
        writeln!(
            out,
            "{name:<6} {:>6} {:>10.2} {:>9.1} {:>8.2} {:>9.1} {:>5.0}% {prefill_speed:>11.1} {load:>6.1} {:>7.1}",
            args.layers,
            1.0 / decode,
            decode * 1e3,
            bytes / 1e9,
            bandwidth / 1e9,
            share * 100.0,
            probe::resident_bytes() as f64 / (1_u64 << 30) as f64,
        )?;
        let record = json!({
            "bench": "cpu-gpt-oss-20b", "device": device(), "cores": cores, "isa": isa.to_string(),
            "commit": commit, "backend": description, "precision": name, "layers": args.layers,
            "extrapolated": args.layers != LAYERS, "prompt": args.prompt, "decoded": args.decode,
            "decode_tok_s": 1.0 / decode, "prefill_tok_s": prefill_speed, "bytes_per_token": bytes,
            "read_bandwidth_bytes_s": bandwidth, "bandwidth_share": share,
            "rss_bytes": probe::resident_bytes(), "ops_ms": timings.ops_ms(),
        });
        writeln!(out, "{record}")?;
    }
    Ok(())
}

/// The processor's own name.
fn device() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix("model name"));
    line.map_or("unknown CPU", |name| name.trim_start_matches([' ', '\t', ':'])).to_owned()
}

/// The commit of the working directory, marked when files differ from it.
fn commit() -> String {
    let git = |args: &[&str]| {
        let output = std::process::Command::new("git").args(args).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(head) = git(&["rev-parse", "--short", "HEAD"]) else { return "unknown".to_owned() };
    let dirty =
        git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|files| !files.is_empty());
    if dirty { format!("{head}+") } else { head }
}
