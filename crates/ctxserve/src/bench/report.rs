//! What was measured, as a table for people and as JSON for programs.

use std::io::{self, Write};
use std::time::Duration;

use serde::Serialize;

use super::measure::Decoded;
use super::numbers::{median, quantile};
use crate::start::StartTimes;

/// Everything. Fields are in the order of the JSON.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    pub(super) version: &'static str,
    /// Of the build, where it was told.
    pub(super) commit: Option<&'static str>,
    /// Of the measurement, UTC.
    pub(super) date: Option<String>,
    pub(super) model: ModelLine,
    pub(super) device: String,
    pub(super) engine: EngineLine,
    pub(super) settings: Settings,
    pub(super) ready: Ready,
    pub(super) decode: Vec<DecodeCase>,
    pub(super) http: Vec<HttpCase>,
    pub(super) ttft: Vec<TtftCase>,
    pub(super) prefill: Vec<PrefillCase>,
}

/// The model.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ModelLine {
    pub(super) source: String,
    pub(super) description: String,
    pub(super) weight_bytes: u64,
}

/// The engine's limits.
#[derive(Clone, Debug, Serialize)]
pub(super) struct EngineLine {
    pub(super) max_num_seqs: usize,
    pub(super) max_num_batched_tokens: usize,
    pub(super) max_model_len: usize,
    pub(super) kv_cache_bytes: usize,
}

/// How it was measured.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Settings {
    pub(super) output: usize,
    pub(super) repeat: usize,
    pub(super) seed: u64,
    pub(super) temperature: f32,
    pub(super) bandwidth_gbs: Option<f64>,
    pub(super) tflops: Option<f64>,
}

/// Seconds from the program's start to the first token, and their parts.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Ready {
    pub(super) seconds: f64,
    pub(super) open: f64,
    pub(super) weights: f64,
    pub(super) kv_cache: f64,
    pub(super) first_token: f64,
}

impl Ready {
    pub(super) fn new(all: Duration, times: StartTimes) -> Self {
        Self {
            seconds: all.as_secs_f64(),
            open: times.open.as_secs_f64(),
            weights: times.weights.as_secs_f64(),
            kv_cache: times.engine.as_secs_f64(),
            first_token: times.first_token.as_secs_f64(),
        }
    }
}

/// Speed of decode: the median run.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Speed {
    /// Counted tokens over all sequences.
    pub(super) tokens: usize,
    pub(super) seconds: f64,
    pub(super) tokens_per_second: f64,
    pub(super) ms_per_step: f64,
    /// Times between tokens of a sequence; absent with one token each.
    pub(super) itl_ms: Option<Quantiles>,
    /// Mean length of the sequences.
    pub(super) mean_context: f64,
    /// Tokens per second of every run, in order.
    pub(super) runs: Vec<f64>,
}

/// Nearest ranks.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Quantiles {
    pub(super) p50: f64,
    pub(super) p99: f64,
}

impl Speed {
    /// `None` of no run. Each run decoded `output` steps.
    pub(super) fn new(runs: &[Decoded], output: usize) -> Option<Self> {
        let rate = |run: &Decoded| run.tokens as f64 / run.seconds;
        let run = median(runs, |run| run.seconds)?;
        let at = |share| quantile(&run.gaps, share).map(|gap| gap * 1e3);
        Some(Self {
            tokens: run.tokens,
            seconds: run.seconds,
            tokens_per_second: rate(run),
            ms_per_step: run.seconds * 1e3 / output as f64,
            itl_ms: at(0.5).zip(at(0.99)).map(|(p50, p99)| Quantiles { p50, p99 }),
            mean_context: run.context,
            runs: runs.iter().map(rate).collect(),
        })
    }
}

/// Decode of a batch.
#[derive(Clone, Debug, Serialize)]
pub(super) struct DecodeCase {
    pub(super) batch: usize,
    pub(super) prompt: usize,
    pub(super) output: usize,
    #[serde(flatten)]
    pub(super) speed: Speed,
    /// Bytes that a step is expected to read at least.
    pub(super) bytes_per_step: f64,
    /// The time that those take by the measured time.
    pub(super) roofline: Option<f64>,
}

/// Decode of one sequence with and without the server.
#[derive(Clone, Debug, Serialize)]
pub(super) struct HttpCase {
    pub(super) prompt: usize,
    pub(super) output: usize,
    pub(super) engine: Speed,
    pub(super) http: Speed,
    /// Time a token through the server beyond that without.
    pub(super) overhead_percent: f64,
}

/// Time to first token.
#[derive(Clone, Debug, Serialize)]
pub(super) struct TtftCase {
    pub(super) prompt: usize,
    /// The median run.
    pub(super) ms: f64,
    pub(super) runs_ms: Vec<f64>,
    pub(super) flops: f64,
    pub(super) roofline: Option<f64>,
}

/// Prefill of many prompts: the median run.
#[derive(Clone, Debug, Serialize)]
pub(super) struct PrefillCase {
    pub(super) requests: usize,
    pub(super) prompt: usize,
    /// Prompt tokens of all requests.
    pub(super) tokens: usize,
    pub(super) seconds: f64,
    pub(super) tokens_per_second: f64,
    pub(super) flops: f64,
    pub(super) roofline: Option<f64>,
    /// Tokens per second of every run, in order.
    pub(super) runs: Vec<f64>,
}

const COLUMNS: [&str; 7] = ["case", "tok/s", "ms/step", "ITL p50", "ITL p99", "TTFT ms", "roofline"];

impl Report {
    /// Writes the table.
    ///
    /// # Errors
    /// The writer's.
    pub(super) fn table(&self, out: &mut impl Write) -> io::Result<()> {
        let commit = self.commit.map(|commit| format!(" ({commit})")).unwrap_or_default();
        let date = self.date.as_deref().unwrap_or("an unknown day");
        let Ready { seconds, open, weights, kv_cache, first_token } = &self.ready;
        writeln!(out, "ctxserve {}{commit}, {date}", self.version)?;
        writeln!(out, "model:  {}: {}", self.model.source, self.model.description)?;
        writeln!(out, "device: {}", self.device)?;
        writeln!(
            out,
            "ready in {seconds:.2} s (open {open:.2}, weights {weights:.2}, KV cache {kv_cache:.2}, first token \
             {first_token:.2})"
        )?;
        let mut rows = vec![COLUMNS.map(str::to_owned)];
        rows.extend(self.decode.iter().map(|case| {
            speed_row(format!("decode {} x {}", case.batch, case.prompt), &case.speed, case.roofline)
        }));
        for case in &self.http {
            rows.push(speed_row(format!("engine 1 x {}", case.prompt), &case.engine, None));
            let name = format!("HTTP 1 x {} ({:+.1} %)", case.prompt, case.overhead_percent);
            rows.push(speed_row(name, &case.http, None));
        }
        rows.extend(self.ttft.iter().map(|case| {
            let name = format!("TTFT {}", case.prompt);
            [name, dash(), dash(), dash(), dash(), number(case.ms), share(case.roofline)]
        }));
        rows.extend(self.prefill.iter().map(|case| {
            let name = format!("prefill {} x {}", case.requests, case.prompt);
            let (rate, roofline) = (number(case.tokens_per_second), share(case.roofline));
            [name, rate, dash(), dash(), dash(), dash(), roofline]
        }));
        let width = rows.iter().map(|row| row[0].chars().count()).max().unwrap_or(0);
        for [name, cells @ ..] in &rows {
            write!(out, "{name:<width$}")?;
            cells.iter().try_for_each(|cell| write!(out, "  {cell:>9}"))?;
            writeln!(out)?;
        }
        Ok(())
    }
}

fn speed_row(name: String, speed: &Speed, roofline: Option<f64>) -> [String; 7] {
    let itl = |of: fn(&Quantiles) -> f64| speed.itl_ms.as_ref().map_or_else(dash, |itl| number(of(itl)));
    let (rate, step) = (number(speed.tokens_per_second), number(speed.ms_per_step));
    [name, rate, step, itl(|itl| itl.p50), itl(|itl| itl.p99), dash(), share(roofline)]
}

/// Three digits or more.
fn number(value: f64) -> String {
    let digits = if value < 10.0 { 3 } else { usize::from(value < 1000.0) };
    format!("{value:.digits$}")
}

fn share(value: Option<f64>) -> String {
    value.map_or_else(dash, |value| format!("{:.1} %", value * 100.0))
}

fn dash() -> String {
    "-".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(seconds: f64) -> Decoded {
        Decoded { tokens: 40, seconds, gaps: vec![0.001, 0.002, 0.003], context: 10.0 }
    }

    #[test]
    fn the_speed_is_that_of_the_median_run() {
        let speed = Speed::new(&[run(4.0), run(1.0), run(2.0)], 20).unwrap();
        assert_eq!((speed.tokens, speed.seconds, speed.tokens_per_second), (40, 2.0, 20.0));
        assert_eq!((speed.ms_per_step, speed.runs.as_slice()), (100.0, &[10.0, 40.0, 20.0][..]));
        let itl = speed.itl_ms.unwrap();
        assert_eq!((itl.p50, itl.p99), (2.0, 3.0));
        assert!(Speed::new(&[], 20).is_none());
    }

    #[test]
    fn unknown_numbers_are_dashes() {
        let speed = Speed::new(&[Decoded { gaps: Vec::new(), ..run(2.0) }], 20).unwrap();
        assert_eq!(speed_row("x".to_owned(), &speed, None), ["x", "20.0", "100.0", "-", "-", "-", "-"]);
        assert_eq!(
            (number(0.1234), number(12.34), number(81_234.5)),
            ("0.123".into(), "12.3".into(), "81234".into())
        );
        assert_eq!(share(Some(0.5)), "50.0 %");
    }
}
