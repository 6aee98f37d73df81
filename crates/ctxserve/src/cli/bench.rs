//! The flags of `ctxserve bench` beyond those that say how a model is run, and what they mean.

use std::path::PathBuf;

use super::numbers::{count, tokens};
use super::table::{Flag, Takes, honoured};
use super::values::{OptionError, Values};

use Takes::{Switch, Value};

/// What is measured and how, for people.
pub const METHOD: &str = "\
Prompts are random token ids from --seed, a new one for every request, and answers run past end-of-turn tokens.

Decode (each --batch with each --prompt): all requests are submitted at once. The clock starts when the last of them has its \
first token and stops when each has --output more, so that prefill and the ramp before it do not count; every sequence \
decodes in every step of that time. `tok/s` is batch x output by that time, `ms/step` that time by output, `ITL` the times \
between a sequence's tokens.
TTFT: one request on an idle engine, from its submission to its first token.
Prefill: N requests of one answer token submitted at once; prompt tokens by the time until the last has ended.
HTTP: decode of one sequence by a streaming client of the real server on loopback, from its second token on, in turns with \
the engine alone; the percentage is the server's time a token beyond the engine's.
Each is run --repeat times, after a first run of TTFT and HTTP that does not count; the table shows the median run.

`roofline` of decode is the time that the weights and the keys and values of a step take at --bandwidth-gbs, by the measured \
time: weights as the checkpoint stores them, of the experts as many as uniform routing is expected to touch. Of prefill it \
is the time that its products take at --tflops.

Decode is measured where --batch is given, or --prompt without --http, and where nothing else is asked for.";

/// The flags.
pub const BENCH: &[Flag] = &[
    honoured("batch", Value("N,..."), "Decode: sequences at once, a list [default: 1]"),
    honoured("prompt", Value("TOKENS,..."), "Decode and HTTP: prompt lengths, a list [default: 1024]"),
    honoured("output", Value("TOKENS"), "Decode and HTTP: tokens measured of each sequence [default: 256]"),
    honoured("ttft", Value("TOKENS,..."), "Time to first token: prompt lengths, a list"),
    honoured(
        "prefill",
        Value("NxTOKENS,..."),
        "Prefill throughput: requests and their prompt lengths, a list",
    ),
    honoured("http", Switch, "Decode of one sequence through the HTTP server, beside the engine alone"),
    honoured("repeat", Value("N"), "Runs of each measurement [default: 3]"),
    honoured("seed", Value("N"), "Seed of prompts and sampling [default: 1]"),
    honoured("temperature", Value("T"), "Sampling temperature; 0 is greedy [default: 0]"),
    honoured(
        "json",
        Value("FILE"),
        "Write every number as JSON; - is standard output, the table goes to standard error then",
    ),
    honoured(
        "bandwidth-gbs",
        Value("GB/S"),
        "Read bandwidth of the device's memory, 10^9 bytes a second, for the roofline [default: measured on a GPU]",
    ),
    honoured(
        "tflops",
        Value("TFLOP/S"),
        "Matrix products of the device, 10^12 operations a second, for the roofline",
    ),
];

/// Most sequences of one measurement: beyond any device, below what would make the bench itself slow.
const MOST_SEQUENCES: usize = 65_536;

/// What to measure.
#[derive(Clone, Debug, PartialEq)]
pub struct BenchOptions {
    /// Decode: sequences at once, and prompt tokens of each.
    pub decode: Vec<(usize, usize)>,
    /// HTTP: prompt tokens.
    pub http: Vec<usize>,
    /// Time to first token: prompt tokens.
    pub ttft: Vec<usize>,
    /// Prefill: requests, and prompt tokens of each.
    pub prefill: Vec<(usize, usize)>,
    /// Tokens measured of each decoding sequence.
    pub output: usize,
    /// Runs of each measurement.
    pub repeat: usize,
    /// Seed of everything drawn.
    pub seed: u64,
    /// 0 is greedy.
    pub temperature: f32,
    /// Where the numbers go; `-` is standard output.
    pub json: Option<PathBuf>,
    /// Bytes a second.
    pub bandwidth: Option<f64>,
    /// Operations a second.
    pub flops: Option<f64>,
}

impl BenchOptions {
    /// Gives every flag its type.
    ///
    /// # Errors
    /// The first that cannot be read.
    pub fn new(values: &Values) -> Result<Self, OptionError> {
        let batches = values.read("batch", |text| list(text, sequences))?;
        let prompts = values.read("prompt", |text| list(text, tokens))?;
        let ttft = values.read("ttft", |text| list(text, tokens))?.unwrap_or_default();
        let prefill = values.read("prefill", |text| list(text, load))?.unwrap_or_default();
        let http = values.switch("http")?.unwrap_or(false);
        let decodes = batches.is_some() || prompts.is_some() && !http;
        let decodes = decodes || (ttft.is_empty() && prefill.is_empty() && !http);
        let prompts = prompts.unwrap_or_else(|| vec![1024]);
        let batches = if decodes { batches.unwrap_or_else(|| vec![1]) } else { Vec::new() };
        let each = |batch: usize| prompts.iter().map(move |&prompt| (batch, prompt));
        Ok(Self {
            decode: batches.into_iter().flat_map(each).collect(),
            http: if http { prompts.clone() } else { Vec::new() },
            ttft,
            prefill,
            output: values.read("output", tokens)?.unwrap_or(256),
            repeat: values.read("repeat", count)?.unwrap_or(3),
            seed: values.read("seed", seed)?.unwrap_or(1),
            temperature: values.read("temperature", temperature)?.unwrap_or(0.0),
            json: values.text("json").map(PathBuf::from),
            bandwidth: values.read("bandwidth-gbs", rate)?.map(|giga| giga * 1e9),
            flops: values.read("tflops", rate)?.map(|tera| tera * 1e12),
        })
    }
}

/// A list with commas, of at least one.
fn list<T>(text: &str, read: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
    text.split(',').map(|item| read(item.trim())).collect()
}

fn sequences(text: &str) -> Result<usize, String> {
    match count(text)? {
        number if number <= MOST_SEQUENCES => Ok(number),
        number => Err(format!("{number} sequences at once are more than {MOST_SEQUENCES}")),
    }
}

/// `256x1024`: requests by prompt tokens.
fn load(text: &str) -> Result<(usize, usize), String> {
    let wrong = || format!("expected requests x prompt tokens, such as 256x1024, got {text:?}");
    let (requests, prompt) = text.split_once('x').ok_or_else(wrong)?;
    Ok((sequences(requests).map_err(|what| format!("{}: {what}", wrong()))?, tokens(prompt)?))
}

fn seed(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("expected a whole number, got {text:?}"))
}

fn temperature(text: &str) -> Result<f32, String> {
    let most = ctxserve_core::limits::MAX_TEMPERATURE;
    let number = text.parse().ok().filter(|number| (0.0..=most).contains(number));
    number.ok_or_else(|| format!("expected a number from 0 to {most}, got {text:?}"))
}

fn rate(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|&number: &f64| number.is_finite() && number > 0.0);
    number.ok_or_else(|| format!("expected a positive number, got {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::super::table;
    use super::super::{Invocation, parse};
    use super::*;

    fn options(line: &str) -> Result<BenchOptions, String> {
        let args = ["ctxserve", "bench"].into_iter().chain(line.split_whitespace()).map(str::to_owned);
        match parse(args).unwrap() {
            Invocation::Bench { measured, .. } => {
                BenchOptions::new(&measured).map_err(|error| error.to_string())
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn names_are_not_those_of_running_a_model() {
        for flag in BENCH {
            assert!(table::RUNNING.iter().all(|other| other.name != flag.name), "{}", flag.name);
            assert!(!flag.help.is_empty() && !flag.help.ends_with('.'), "{}", flag.name);
        }
    }

    #[test]
    fn every_batch_meets_every_prompt() {
        let found =
            options("--batch 1,16 --prompt 512,8K --output 32 --ttft 1k --prefill 4x2K,1x5 --http").unwrap();
        assert_eq!(found.decode, [(1, 512), (1, 8192), (16, 512), (16, 8192)]);
        assert_eq!((found.http, found.ttft), (vec![512, 8192], vec![1000]));
        assert_eq!(found.prefill, [(4, 2048), (1, 5)]);
        assert_eq!((found.output, found.repeat, found.seed, found.temperature), (32, 3, 1, 0.0));
    }

    #[test]
    fn decode_is_measured_unless_only_something_else_is_asked_for() {
        assert_eq!(options("").unwrap().decode, [(1, 1024)]);
        assert_eq!(options("--prompt 5").unwrap().decode, [(1, 5)]);
        assert_eq!(options("--ttft 5 --batch 2").unwrap().decode, [(2, 1024)]);
        assert_eq!(options("--http --prompt 7").unwrap().decode, []);
        for line in ["--ttft 5", "--prefill 1x5", "--http"] {
            assert_eq!(options(line).unwrap().decode, [], "{line}");
        }
        assert_eq!(options("--bandwidth-gbs 4610 --tflops 0.5").unwrap().bandwidth, Some(4.61e12));
    }

    #[test]
    fn mistakes_name_the_flag() {
        for line in [
            "--batch 0",
            "--batch 1,,2",
            "--batch many",
            "--batch 70000",
            "--prompt 0",
            "--prompt -5",
            "--output 0",
            "--repeat 0",
            "--ttft 1k,0",
            "--prefill 16",
            "--prefill 0x5",
            "--prefill 5x0",
            "--prefill x",
            "--seed -1",
            "--temperature 3",
            "--temperature NaN",
            "--bandwidth-gbs 0",
            "--bandwidth-gbs inf",
            "--tflops -1",
        ] {
            let error = options(line).unwrap_err();
            assert!(error.starts_with(line.split(' ').next().unwrap()), "{line}: {error}");
        }
    }
}
