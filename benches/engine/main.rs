//! What a decode step costs the host: the engine in front of a model that takes no time. Per step: take the inbox,
//! schedule, describe the batch, hand it over, commit the tokens and send them. Nobody reads the streams meanwhile.
//! And what the prefix cache costs it per prompt: to look one up, to take what is known of it, to keep it.

use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use ctxserve_backend::{
    Batch, DeviceError, KvDtype, KvGroup, KvPlan, KvSpec, SampleError, Sampled, SequenceSlice,
};
use ctxserve_core::{FinishReason, GenerateRequest, RequestId, SamplingParams, StopRules};
use ctxserve_engine::{Engine, EngineConfig, EngineHandle, Runner, RunnerInfo};
use serde_json::json;

/// Measures the engine's own time per decode step.
#[derive(Debug, Parser)]
struct Args {
    /// Sequences that decode together.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 64, 256])]
    sequences: Vec<usize>,
    /// Prompt tokens of each.
    #[arg(long, value_delimiter = ',', default_values_t = [1024, 32_768])]
    context: Vec<usize>,
    /// Steps to measure.
    #[arg(long, default_value_t = 500)]
    steps: usize,
    /// Prompts of each length to look up.
    #[arg(long, default_value_t = 50)]
    prompts: usize,
    /// Positions per KV page.
    #[arg(long, default_value_t = 16)]
    page_size: usize,
}

const VOCAB: usize = 1000;

/// Picks token 1 for everyone, at once, and times the engine between its calls.
struct Idle {
    info: RunnerInfo,
    rows: usize,
    prefill: bool,
    /// When the engine got control back, and what it has used of the current step.
    since: Instant,
    used: Duration,
    times: Arc<Mutex<Vec<Duration>>>,
}

impl Idle {
    fn new(context: usize, page_size: usize, times: Arc<Mutex<Vec<Duration>>>) -> Self {
        // gpt-oss: every second layer sees a window.
        let group = |window, first: usize| {
            let layers = (first..24).step_by(2).collect();
            KvGroup { window, layers, dtype: KvDtype::Bf16 }
        };
        let groups = vec![group(Some(128), 0), group(None, 1)];
        let kv = KvSpec { page_size, kv_heads: 8, head_dim: 64, groups };
        let description = "no model".to_owned();
        let info = RunnerInfo { vocab_size: VOCAB, max_context: context, kv, description };
        Self { info, rows: 0, prefill: true, since: Instant::now(), used: Duration::ZERO, times }
    }
}

impl Runner for Idle {
    fn info(&self) -> &RunnerInfo {
        &self.info
    }

    fn allocate(&mut self, _: &KvPlan) -> Result<(), DeviceError> {
        Ok(())
    }

    fn launch(&mut self, batch: &Batch) -> Result<(), DeviceError> {
        self.used += self.since.elapsed();
        if !self.prefill {
            self.times.lock().unwrap_or_else(PoisonError::into_inner).push(self.used);
        }
        self.used = Duration::ZERO;
        self.prefill = batch.sequences.iter().any(|slice: &SequenceSlice| slice.rows.len() > 1);
        self.rows = batch.sample_rows().count();
        self.since = Instant::now();
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<Result<Sampled, SampleError>>, DeviceError> {
        self.used += self.since.elapsed();
        let outcomes = (0..self.rows).map(|_| Ok(Sampled { id: 1, logprobs: None })).collect();
        self.since = Instant::now();
        Ok(outcomes)
    }
}

/// Times of `steps` decode steps, ascending.
fn measure(args: &Args, sequences: usize, context: usize) -> Result<Vec<Duration>> {
    let times = Arc::new(Mutex::new(Vec::with_capacity(args.steps)));
    let longest = context + args.steps + 2;
    let runner = Idle::new(longest, args.page_size, Arc::clone(&times));
    let config = EngineConfig {
        max_num_seqs: sequences,
        max_batched_tokens: sequences * (context + 1),
        max_model_len: Some(longest),
        // Pages are counted here and never touched.
        kv_bytes: Some(usize::MAX),
        max_queued_requests: sequences,
        max_queued_tokens: usize::MAX,
        prefix_caching: true,
    };
    let engine = Engine::start(Box::new(runner), config)?;
    let prompt: Arc<[u32]> = (0..context).map(|at| (at % VOCAB) as u32).collect();
    let streams =
        engine.submit_all((0..sequences as u64).map(|id| request(id, &prompt, args.steps + 1)).collect())?;
    for mut stream in streams {
        let last = std::iter::from_fn(|| stream.blocking_next()).last().context("no answer")?;
        let ctxserve_core::Event::Finished { reason: FinishReason::Length, .. } = last else {
            anyhow::bail!("an answer ended with {last:?}");
        };
    }
    let mut times = std::mem::take(&mut *times.lock().unwrap_or_else(PoisonError::into_inner));
    anyhow::ensure!(times.len() + 2 >= args.steps, "only {} steps were measured", times.len());
    times.sort_unstable();
    Ok(times)
}

/// Median time of a prompt with one token of answer, from its submission to its end: without a prefix cache, when it is
/// new to one, and when it is known there.
fn measure_prompts(args: &Args, context: usize) -> Result<[Duration; 3]> {
    let median = |engine: &EngineHandle| -> Result<Duration> {
        let mut times = Vec::with_capacity(args.prompts);
        for prompt in 0..args.prompts {
            // The first page tells them apart.
            let ids =
                (0..context).map(|at| if at == 0 { prompt % VOCAB } else { at % VOCAB } as u32).collect();
            let start = Instant::now();
            let mut stream = engine.submit(request(0, &ids, 1))?;
            while stream.blocking_next().is_some() {}
            times.push(start.elapsed());
        }
        times.sort_unstable();
        times.get(times.len() / 2).copied().context("no prompts")
    };
    let start = |prefix_caching| {
        let runner = Idle::new(context + 2, args.page_size, Arc::default());
        let config = EngineConfig {
            max_num_seqs: args.prompts + 1,
            max_batched_tokens: context,
            kv_bytes: Some(usize::MAX),
            max_queued_tokens: usize::MAX,
            prefix_caching,
            ..EngineConfig::default()
        };
        Engine::start(Box::new(runner), config)
    };
    let (without, with) = (start(false)?, start(true)?);
    Ok([median(&without)?, median(&with)?, median(&with)?])
}

fn request(id: u64, prompt: &Arc<[u32]>, max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        id: RequestId(id),
        prompt: Arc::clone(prompt),
        sampling: SamplingParams::greedy(),
        stop: StopRules::default(),
        max_tokens,
        guide: None,
        salt: None,
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let mut out = std::io::stdout().lock();
    writeln!(out, "{:>9} {:>8} {:>12} {:>12}", "sequences", "context", "median, us", "p99, us")?;
    for &context in &args.context {
        for &sequences in &args.sequences {
            let times = measure(&args, sequences, context)?;
            let at = |share: f64| {
                let index = ((times.len() - 1) as f64 * share) as usize;
                times.get(index).map_or(0.0, |time| time.as_secs_f64() * 1e6)
            };
            let (median, p99) = (at(0.5), at(0.99));
            writeln!(out, "{sequences:>9} {context:>8} {median:>12.1} {p99:>12.1}")?;
            let line = json!({
                "bench": "engine-step", "sequences": sequences, "context": context, "page_size": args.page_size,
                "steps": times.len(), "median_us": median, "p99_us": p99,
            });
            writeln!(out, "{line}")?;
        }
    }
    writeln!(out, "{:>8} {:>14} {:>14} {:>14}", "prompt", "no cache, us", "new, us", "known, us")?;
    for &context in &args.context {
        let [without, new, known] = measure_prompts(&args, context)?.map(|time| time.as_secs_f64() * 1e6);
        writeln!(out, "{context:>8} {without:>14.1} {new:>14.1} {known:>14.1}")?;
        let line = json!({
            "bench": "engine-prefix", "prompt": context, "page_size": args.page_size, "prompts": args.prompts,
            "without_us": without, "new_us": new, "known_us": known,
        });
        writeln!(out, "{line}")?;
    }
    Ok(())
}
