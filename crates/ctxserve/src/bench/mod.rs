//! `bench`: how fast a model decodes and prefills here, loaded as `serve` loads it.
//!
//! Methods are in [`METHOD`](crate::cli::bench::METHOD), which `bench --help` prints.

mod fit;
mod http;
mod measure;
mod numbers;
mod report;
mod sse;

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use anyhow::Context;
use ctxserve_engine::EngineHandle;
use ctxserve_models::ModelInfo;
use ctxserve_server::PromptDate;

use crate::cli::bench::BenchOptions;
use crate::cli::values::Values;
use crate::start::{Asked, Started};
use http::Server;
use measure::Bench;
use numbers::median;
use report::{
    DecodeCase, EngineLine, HttpCase, ModelLine, PrefillCase, Ready, Report, Settings, Speed, TtftCase,
};

/// Name of standard output.
const STDOUT: &str = "-";

/// Loads a model, measures what was asked for, and prints a table to `out`; or the numbers to `out` and the table to
/// `err` if `--json -` says so.
///
/// # Errors
/// Whatever keeps the model from running, and a case that does not fit or fails.
pub fn bench(
    running: Values,
    measured: &Values,
    out: &mut impl Write,
    err: &mut impl Write,
) -> anyhow::Result<()> {
    let start = Instant::now();
    let mut options = BenchOptions::new(measured)?;
    let mut asked = Asked::read(running)?;
    fit::widen(&mut asked.options.engine, &asked.values, &options)?;
    let sized = asked.values.get("kv-cache-memory-bytes").is_some();
    let mut opened = asked.open()?;
    let info = opened.info.clone().context("a script has no weights to measure; name a model")?;
    fit::fit(&mut opened, &info, &options, sized)?;
    // A file that cannot be written is found out before the measurement, not after.
    let path = options.json.as_deref().filter(|path| *path != Path::new(STDOUT));
    let file = path.map(|path| File::create(path).with_context(|| path.display().to_string())).transpose()?;

    if options.bandwidth.is_none() {
        options.bandwidth = opened.bandwidth()?;
    }
    let started = opened.start()?;
    let ready = Ready::new(start.elapsed(), started.times);
    tracing::info!("ready in {:.1}s ({})", ready.seconds, started.times);
    let report = measure(&started, &info, &options, ready)?;
    match (&options.json, file) {
        (None, _) => report.table(out)?,
        (Some(_), None) => {
            writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
            report.table(err)?;
        }
        (Some(_), Some(mut file)) => {
            writeln!(file, "{}", serde_json::to_string_pretty(&report)?)?;
            report.table(out)?;
        }
    }
    Ok(())
}

/// Measures every case, in the order of the report.
fn measure(
    started: &Started,
    info: &ModelInfo,
    options: &BenchOptions,
    ready: Ready,
) -> anyhow::Result<Report> {
    let facts = started.engine.info();
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        commit: option_env!("GIT_COMMIT"),
        date: PromptDate::Today.date(),
        model: ModelLine {
            source: started.root.clone(),
            description: info.description.clone(),
            weight_bytes: info.weight_bytes,
        },
        device: device_line(&facts.description, &info.description),
        engine: EngineLine {
            max_num_seqs: facts.kv.max_num_seqs,
            max_num_batched_tokens: facts.max_batched_tokens,
            max_model_len: facts.max_model_len,
            kv_cache_bytes: facts.kv.bytes,
        },
        settings: Settings {
            output: options.output,
            repeat: options.repeat,
            seed: options.seed,
            temperature: options.temperature,
            bandwidth_gbs: options.bandwidth.map(|rate| rate / 1e9),
            tflops: options.flops.map(|rate| rate / 1e12),
        },
        ready,
        decode: Vec::new(),
        http: Vec::new(),
        ttft: Vec::new(),
        prefill: Vec::new(),
    };
    let mut bench = Bench::new(&started.engine, options)?;
    for &(batch, prompt) in &options.decode {
        let name = format!("decode {batch} x {prompt}");
        let case = decode(&mut bench, info, (batch, prompt)).context(name.clone())?;
        tracing::info!("{name}: {:.1} tok/s", case.speed.tokens_per_second);
        report.decode.push(case);
    }
    for &prompt in &options.ttft {
        let case = ttft(&mut bench, info, prompt).with_context(|| format!("TTFT {prompt}"))?;
        tracing::info!("TTFT {prompt}: {:.1} ms", case.ms);
        report.ttft.push(case);
    }
    for &(requests, prompt) in &options.prefill {
        let name = format!("prefill {requests} x {prompt}");
        let case = prefill(&mut bench, info, (requests, prompt)).context(name.clone())?;
        tracing::info!("{name}: {:.0} tok/s", case.tokens_per_second);
        report.prefill.push(case);
    }
    // Last, because the engine ends with its server.
    if !options.http.is_empty() {
        let server = Server::start(started.state()?)?;
        for &prompt in &options.http {
            let case = http(&mut bench, &server, prompt).with_context(|| format!("HTTP 1 x {prompt}"))?;
            tracing::info!("HTTP 1 x {prompt}: {:+.1} % over the engine alone", case.overhead_percent);
            report.http.push(case);
        }
        server.stop()?;
    }
    stop(&started.engine)?;
    Ok(report)
}

/// Ends the engine: a process that ends while a step is being issued takes the device's driver away from under it.
fn stop(engine: &EngineHandle) -> anyhow::Result<()> {
    engine.abort_all();
    engine.drain();
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    runtime.block_on(engine.stopped());
    Ok(())
}

/// The runner's line without what it says of the model.
fn device_line(runner: &str, model: &str) -> String {
    let rest = runner.strip_prefix(model).unwrap_or(runner);
    rest.strip_prefix(" on ").unwrap_or(rest).to_owned()
}

fn decode(bench: &mut Bench<'_>, info: &ModelInfo, case: (usize, usize)) -> anyhow::Result<DecodeCase> {
    let options = bench.options;
    let runs = (0..options.repeat).map(|_| bench.decode(case)).collect::<anyhow::Result<Vec<_>>>()?;
    let speed = Speed::new(&runs, options.output).context("nothing was run")?;
    let bytes = info.decode_bytes(case.0, speed.mean_context.round() as usize);
    Ok(DecodeCase {
        batch: case.0,
        prompt: case.1,
        output: options.output,
        bytes_per_step: bytes,
        roofline: options.bandwidth.map(|bandwidth| bytes / bandwidth / (speed.ms_per_step / 1e3)),
        speed,
    })
}

fn ttft(bench: &mut Bench<'_>, info: &ModelInfo, prompt: usize) -> anyhow::Result<TtftCase> {
    let options = bench.options;
    bench.first_token(prompt)?;
    let runs = (0..options.repeat).map(|_| bench.first_token(prompt)).collect::<anyhow::Result<Vec<_>>>()?;
    let seconds = *median(&runs, |&run| run).context("nothing was run")?;
    let flops = info.prefill_flops(prompt);
    Ok(TtftCase {
        prompt,
        ms: seconds * 1e3,
        runs_ms: runs.iter().map(|run| run * 1e3).collect(),
        flops,
        roofline: options.flops.map(|rate| flops / rate / seconds),
    })
}

fn prefill(bench: &mut Bench<'_>, info: &ModelInfo, case: (usize, usize)) -> anyhow::Result<PrefillCase> {
    let options = bench.options;
    let runs = (0..options.repeat).map(|_| bench.prefill(case)).collect::<anyhow::Result<Vec<_>>>()?;
    let seconds = *median(&runs, |&run| run).context("nothing was run")?;
    let (requests, prompt) = case;
    let (tokens, flops) = (requests * prompt, requests as f64 * info.prefill_flops(prompt));
    Ok(PrefillCase {
        requests,
        prompt,
        tokens,
        seconds,
        tokens_per_second: tokens as f64 / seconds,
        flops,
        roofline: options.flops.map(|rate| flops / rate / seconds),
        runs: runs.iter().map(|run| tokens as f64 / run).collect(),
    })
}

/// The engine alone and through the server, in turns: whatever else the machine does then meets both alike.
fn http(bench: &mut Bench<'_>, server: &Server, prompt: usize) -> anyhow::Result<HttpCase> {
    let options = bench.options;
    server.decode(bench, prompt)?;
    let (mut alone, mut through) = (Vec::new(), Vec::new());
    for _ in 0..options.repeat {
        alone.push(bench.decode((1, prompt))?);
        through.push(server.decode(bench, prompt)?);
    }
    let speed = |runs: &[_]| Speed::new(runs, options.output).context("nothing was run");
    let (engine, http) = (speed(&alone)?, speed(&through)?);
    Ok(HttpCase {
        prompt,
        output: options.output,
        overhead_percent: (http.ms_per_step / engine.ms_per_step - 1.0) * 100.0,
        engine,
        http,
    })
}
