//! Measurements on the engine alone.

use std::cell::Cell;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ctxserve_core::{Event, FinishReason, GenerateRequest, RequestId, SamplingParams, StopRules};
use ctxserve_engine::{EngineHandle, EngineState, EventStream};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::runtime::{Builder, Runtime};

use super::numbers::Random;
use crate::cli::bench::BenchOptions;

/// Between two looks at whether the engine is idle.
const PAUSE: Duration = Duration::from_millis(1);

/// One run of a decode measurement.
#[derive(Clone, Debug)]
pub(super) struct Decoded {
    /// Tokens counted, over all sequences.
    pub(super) tokens: usize,
    /// The time that they took.
    pub(super) seconds: f64,
    /// Seconds between the tokens of a sequence, over all sequences.
    pub(super) gaps: Vec<f64>,
    /// Mean length of the sequences while they were counted, tokens.
    pub(super) context: f64,
}

impl Decoded {
    /// From the time of the last first token and the times of each sequence's counted tokens.
    pub(super) fn new(zero: Instant, times: &[Vec<Instant>], context: f64) -> Self {
        let end = times.iter().flatten().max().copied().unwrap_or(zero);
        let gap = |pair: &[Instant]| pair[1].duration_since(pair[0]).as_secs_f64();
        Self {
            tokens: times.iter().map(Vec::len).sum(),
            seconds: end.duration_since(zero).as_secs_f64(),
            gaps: times.iter().flat_map(|times| times.windows(2).map(gap)).collect(),
            context,
        }
    }
}

/// An engine under measurement.
pub(super) struct Bench<'a> {
    pub(super) engine: &'a EngineHandle,
    pub(super) options: &'a BenchOptions,
    random: Random,
    /// One thread, that of the caller: readers must not take cores from the engine.
    runtime: Runtime,
    requests: u64,
}

impl<'a> Bench<'a> {
    pub(super) fn new(engine: &'a EngineHandle, options: &'a BenchOptions) -> anyhow::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build().context("async runtime")?;
        Ok(Self { engine, options, random: Random::new(options.seed), runtime, requests: 0 })
    }

    /// Runs something beside the engine, on the caller's thread.
    pub(super) fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    /// A prompt that was never sent before.
    pub(super) fn prompt(&mut self, length: usize) -> Vec<u32> {
        self.random.prompt(length, self.engine.info().vocab_size)
    }

    fn requests(&mut self, count: usize, prompt: usize, max_tokens: usize) -> Vec<GenerateRequest> {
        (0..count).map(|_| self.request(prompt, max_tokens)).collect()
    }

    fn request(&mut self, prompt: usize, max_tokens: usize) -> GenerateRequest {
        self.requests += 1;
        let temperature = self.options.temperature;
        let seed = (temperature > 0.0).then(|| self.random.next());
        GenerateRequest {
            id: RequestId(self.requests),
            prompt: self.prompt(prompt).into(),
            sampling: SamplingParams { temperature, seed, ..SamplingParams::default() },
            stop: StopRules { ignore_eos: true, ..StopRules::default() },
            max_tokens,
            guide: None,
            salt: None,
        }
    }

    /// Waits until nothing runs.
    ///
    /// # Errors
    /// The engine failed.
    pub(super) fn settle(&self) -> anyhow::Result<()> {
        loop {
            let snapshot = self.engine.snapshot();
            match snapshot.state {
                EngineState::Faulted(what) => bail!("the engine failed: {what}"),
                _ if snapshot.running == 0 && snapshot.waiting == 0 => return Ok(()),
                _ => std::thread::sleep(PAUSE),
            }
        }
    }

    /// Decodes `batch` sequences at once, each after `prompt` tokens.
    ///
    /// # Errors
    /// A sequence that failed, gave way to another, or ended before its time.
    pub(super) fn decode(&mut self, (batch, prompt): (usize, usize)) -> anyhow::Result<Decoded> {
        let info = self.engine.info();
        let output = self.options.output;
        // As long as the context allows: they end when they have been measured, not before the slowest reader has begun.
        let requests = self.requests(batch, prompt, info.max_model_len.saturating_sub(prompt));
        self.settle()?;
        let preemptions = self.engine.snapshot().preemptions;
        let window = Window { batch, output, begun: Cell::new(0), zero: Cell::new(None) };
        let followed: Vec<Followed> = self.block_on(async {
            let streams = self.engine.submit_all(requests)?;
            let followed: FuturesUnordered<_> =
                streams.into_iter().map(|stream| window.follow(stream)).collect();
            // No stream is dropped before the last is done: every step has the whole batch.
            followed.collect::<Vec<_>>().await.into_iter().collect::<anyhow::Result<_>>()
        })?;
        if self.engine.snapshot().preemptions != preemptions {
            bail!("sequences gave way to others: the KV cache is too small; see --kv-cache-memory-bytes");
        }
        let zero = window.zero.get().context("no sequence has begun")?;
        let before: usize = followed.iter().map(|sequence| sequence.before).sum();
        let context = prompt as f64 + before as f64 / batch as f64 + (output - 1) as f64 / 2.0;
        let times: Vec<_> = followed.into_iter().map(|sequence| sequence.times).collect();
        Ok(Decoded::new(zero, &times, context))
    }

    /// Seconds from submission to the first token of one request.
    ///
    /// # Errors
    /// The sequence failed.
    pub(super) fn first_token(&mut self, prompt: usize) -> anyhow::Result<f64> {
        let request = self.request(prompt, 1);
        self.settle()?;
        self.block_on(async {
            let start = Instant::now();
            let mut events = self.engine.submit(request)?;
            while let Some(event) = events.next().await {
                match event {
                    Event::Token(_) => return Ok(start.elapsed().as_secs_f64()),
                    Event::Finished { reason, .. } => bail!("ended before its first token: {}", why(&reason)),
                    Event::Admitted => {}
                }
            }
            bail!("ended before its first token")
        })
    }

    /// Seconds from the submission of `count` requests to the end of the last, each with one answer token.
    ///
    /// # Errors
    /// A sequence failed.
    pub(super) fn prefill(&mut self, (count, prompt): (usize, usize)) -> anyhow::Result<f64> {
        let requests = self.requests(count, prompt, 1);
        self.settle()?;
        self.block_on(async {
            let start = Instant::now();
            let streams = self.engine.submit_all(requests)?;
            let ends: FuturesUnordered<_> = streams.into_iter().map(end).collect();
            ends.collect::<Vec<_>>().await.into_iter().collect::<anyhow::Result<Vec<()>>>()?;
            Ok(start.elapsed().as_secs_f64())
        })
    }
}

/// The time in which all sequences of a batch decode, shared by those who read them.
struct Window {
    batch: usize,
    output: usize,
    /// Sequences that have their first token.
    begun: Cell<usize>,
    /// When the last of them got it.
    zero: Cell<Option<Instant>>,
}

/// What was seen of one sequence.
struct Followed {
    /// Tokens up to the beginning of the window.
    before: usize,
    /// When the counted tokens came.
    times: Vec<Instant>,
    /// Held, because dropping it would cancel the sequence.
    _events: EventStream,
}

impl Window {
    async fn follow(&self, mut events: EventStream) -> anyhow::Result<Followed> {
        let mut before = 0;
        let mut times = Vec::with_capacity(self.output);
        while let Some(event) = events.next().await {
            match event {
                Event::Token(_) if self.zero.get().is_some() => {
                    times.push(Instant::now());
                    if times.len() == self.output {
                        return Ok(Followed { before, times, _events: events });
                    }
                }
                Event::Token(_) => {
                    before += 1;
                    if before == 1 {
                        self.begin();
                    }
                }
                Event::Finished { reason, .. } => {
                    let (seen, wanted) = (times.len(), self.output);
                    bail!("a sequence ended after {seen} of {wanted} measured tokens: {}", why(&reason));
                }
                Event::Admitted => {}
            }
        }
        bail!("a sequence ended without a word")
    }

    fn begin(&self) {
        self.begun.set(self.begun.get() + 1);
        if self.begun.get() == self.batch {
            self.zero.set(Some(Instant::now()));
        }
    }
}

async fn end(mut events: EventStream) -> anyhow::Result<()> {
    while let Some(event) = events.next().await {
        match event {
            Event::Finished { reason: FinishReason::Length, .. } => return Ok(()),
            Event::Finished { reason, .. } => bail!("a sequence ended early: {}", why(&reason)),
            Event::Admitted | Event::Token(_) => {}
        }
    }
    bail!("a sequence ended without a word")
}

fn why(reason: &FinishReason) -> &str {
    match reason {
        FinishReason::Stop(_) => "a stop token",
        FinishReason::Length => "its length",
        FinishReason::Abort => "cancelled",
        FinishReason::Error(what) | FinishReason::Fault(what) => what,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::bench::BenchOptions;
    use crate::cli::values::Values;
    use ctxserve_engine::{Engine, EngineConfig, ScriptedRunner};

    const OUTPUT: usize = 20;

    fn options() -> BenchOptions {
        BenchOptions { output: OUTPUT, ..BenchOptions::new(&Values::default()).unwrap() }
    }

    fn engine(chunk: usize, line: usize, depth: usize) -> EngineHandle {
        // At this pace a reader must sleep for seconds before sequences end unread.
        let runner = ScriptedRunner::new(64, 8192, vec![vec![1; line]])
            .with_pace(Duration::from_millis(1))
            .with_steps_in_flight(depth);
        let config = EngineConfig { max_num_seqs: 8, max_batched_tokens: chunk, ..EngineConfig::default() };
        Engine::start(Box::new(runner), config).unwrap()
    }

    #[test]
    fn every_sequence_is_counted_for_the_same_number_of_tokens() {
        for depth in [1, 2] {
            let (engine, options) = (engine(16, 8192, depth), options());
            let mut bench = Bench::new(&engine, &options).unwrap();
            for batch in [1, 3, 8] {
                let run = bench.decode((batch, 50)).unwrap();
                assert_eq!((run.tokens, run.gaps.len()), (batch * OUTPUT, batch * (OUTPUT - 1)));
                assert!(run.seconds > 0.0 && run.gaps.iter().all(|&gap| gap >= 0.0));
                // One sequence has its first token when the window begins; earlier ones of a batch have more.
                let least = 50.0 + 1.0 + (OUTPUT - 1) as f64 / 2.0;
                assert!(
                    if batch > 1 { run.context > least } else { run.context == least },
                    "{}",
                    run.context
                );
            }
            bench.settle().unwrap();
            assert_eq!(engine.snapshot().used_pages.iter().sum::<usize>(), 0);
        }
    }

    #[test]
    fn first_tokens_and_prefills_are_of_the_whole_prompts() {
        let (engine, options) = (engine(64, 8192, 1), options());
        let mut bench = Bench::new(&engine, &options).unwrap();
        assert!(bench.first_token(300).unwrap() > 0.0);
        assert!(bench.prefill((20, 100)).unwrap() > 0.0);
        bench.settle().unwrap();
        let snapshot = engine.snapshot();
        assert_eq!((snapshot.prompt_tokens, snapshot.generation_tokens), (300 + 20 * 100, 21));
    }

    #[test]
    fn a_sequence_that_ends_early_is_an_error() {
        let (engine, options) = (engine(64, 5, 1), options());
        let mut bench = Bench::new(&engine, &options).unwrap();
        let error = bench.decode((1, 200)).unwrap_err().to_string();
        assert!(error.contains("4 of 20 measured tokens"), "{error}");
    }
}
