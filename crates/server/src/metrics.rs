//! Prometheus metrics: vLLM's names where the meaning is the same, the prefix `ctxserve:` for our own. Labels
//! come from fixed sets only, so that no request can add a series.

use std::sync::atomic::{AtomicU64, Ordering};

use ctxserve_engine::{EngineHandle, MissCause, Snapshot};
use metrics::{Counter, Gauge, Histogram, Key, KeyName, Label, Level, Metadata, Recorder};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

/// Buckets of time to first token, seconds.
const FIRST_TOKEN: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
/// Buckets of time between tokens, seconds.
const BETWEEN: [f64; 19] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
/// The same, for decode steps faster than vLLM's smallest bucket.
const BETWEEN_FINE: [f64; 14] =
    [0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 1.0];
/// Buckets of request durations, seconds.
const REQUEST: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
const CHOICES: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];

/// Histogram samples are kept until someone reads them; without a scraper they are folded after this many.
const FOLD_AFTER: u64 = 4096;

static METADATA: Metadata<'static> = Metadata::new("ctxserve", Level::INFO, None);

/// Why a sequence ended, as vLLM's label has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    Stop,
    Length,
    Abort,
    Error,
}

/// Durations of one request, seconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Spans {
    /// Arrival to end.
    pub(crate) total: f64,
    /// Admission to first token.
    pub(crate) prefill: Option<f64>,
    /// First token to last.
    pub(crate) decode: Option<f64>,
    /// Tokens of a choice after its first, on average.
    pub(crate) decoded: usize,
}

/// Handles of every metric. One per server: nothing is global.
pub(crate) struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    base: Vec<Label>,
    observations: AtomicU64,
    running: Gauge,
    waiting: Gauge,
    kv_usage: Gauge,
    legacy_kv_usage: Gauge,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    preemptions: Counter,
    steps: Counter,
    pub(crate) cached_tokens: Counter,
    replayed_turns: Counter,
    canonical_turns: Counter,
    prefix_queries: [Counter; 2],
    prefix_hits: [Counter; 2],
    prefix_hit_rate: Gauge,
    prefix_misses: [Counter; MissCause::ALL.len()],
    prefix_usage: Gauge,
    ended: [Counter; 4],
    rejected_requests: Counter,
    rejected_tokens: Counter,
    responses: [Counter; 5],
    first_token: Histogram,
    between: Histogram,
    between_fine: Histogram,
    per_token: Histogram,
    end_to_end: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    inference: Histogram,
    request_prompt: Histogram,
    request_generation: Histogram,
    request_max_tokens: Histogram,
    request_choices: Histogram,
}

impl Metrics {
    /// Registers everything, so that a fresh server already shows every name.
    ///
    /// # Errors
    /// Only a bug in the bucket tables.
    pub(crate) fn new(
        model: &str,
        engine: &EngineHandle,
    ) -> Result<Self, metrics_exporter_prometheus::BuildError> {
        let tokens = one_two_five(engine.info().max_model_len);
        let buckets: [(&str, &[f64]); 13] = [
            ("vllm:time_to_first_token_seconds", &FIRST_TOKEN),
            ("vllm:inter_token_latency_seconds", &BETWEEN),
            ("ctxserve:inter_token_latency_seconds", &BETWEEN_FINE),
            ("vllm:e2e_request_latency_seconds", &REQUEST),
            ("vllm:request_queue_time_seconds", &REQUEST),
            ("vllm:request_prefill_time_seconds", &REQUEST),
            ("vllm:request_decode_time_seconds", &REQUEST),
            ("vllm:request_inference_time_seconds", &REQUEST),
            ("vllm:request_time_per_output_token_seconds", &BETWEEN),
            ("vllm:request_prompt_tokens", &tokens),
            ("vllm:request_generation_tokens", &tokens),
            ("vllm:request_params_max_tokens", &tokens),
            ("vllm:request_params_n", &CHOICES),
        ];
        let mut builder = PrometheusBuilder::new();
        for (name, values) in buckets {
            builder = builder.set_buckets_for_metric(Matcher::Full(name.to_owned()), values)?;
        }
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        let base = vec![Label::new("model_name", model.to_owned()), Label::new("engine", "0")];
        let register = Register { recorder: &recorder, base: &base };
        let ended = ["stop", "length", "abort", "error"]
            .map(|reason| register.counter("vllm:request_success_total", &[("finished_reason", reason)]));
        let rejected = |reason| register.counter("vllm:admission_rejections_total", &[("reason", reason)]);
        let history = |form| register.counter("ctxserve:history_turns_total", &[("form", form)]);
        let responses = ["1xx", "2xx", "3xx", "4xx", "5xx"]
            .map(|class| register.counter("ctxserve:http_responses_total", &[("class", class)]));
        let both = |names: [&'static str; 2]| names.map(|name| register.counter(name, &[]));
        let misses = MissCause::ALL
            .map(|cause| register.counter("ctxserve:prefix_cache_misses_total", &[("cause", cause.name())]));
        let metrics = Self {
            running: register.gauge("vllm:num_requests_running", &[]),
            waiting: register.gauge("vllm:num_requests_waiting", &[]),
            kv_usage: register.gauge("vllm:kv_cache_usage_perc", &[]),
            legacy_kv_usage: register.gauge("vllm:gpu_cache_usage_perc", &[]),
            prompt_tokens: register.counter("vllm:prompt_tokens_total", &[]),
            generation_tokens: register.counter("vllm:generation_tokens_total", &[]),
            preemptions: register.counter("vllm:num_preemptions_total", &[]),
            steps: register.counter("ctxserve:engine_steps_total", &[]),
            cached_tokens: register.counter("vllm:prompt_tokens_cached_total", &[]),
            replayed_turns: history("replayed"),
            canonical_turns: history("canonical"),
            prefix_queries: both(["vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total"]),
            prefix_hits: both(["vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"]),
            prefix_hit_rate: register.gauge("vllm:gpu_prefix_cache_hit_rate", &[]),
            prefix_misses: misses,
            prefix_usage: register.gauge("ctxserve:prefix_cache_usage_perc", &[]),
            ended,
            rejected_requests: rejected("max_num_queued_reqs"),
            rejected_tokens: rejected("max_num_queued_tokens"),
            responses,
            first_token: register.histogram("vllm:time_to_first_token_seconds"),
            between: register.histogram("vllm:inter_token_latency_seconds"),
            between_fine: register.histogram("ctxserve:inter_token_latency_seconds"),
            per_token: register.histogram("vllm:request_time_per_output_token_seconds"),
            end_to_end: register.histogram("vllm:e2e_request_latency_seconds"),
            queue: register.histogram("vllm:request_queue_time_seconds"),
            prefill: register.histogram("vllm:request_prefill_time_seconds"),
            decode: register.histogram("vllm:request_decode_time_seconds"),
            inference: register.histogram("vllm:request_inference_time_seconds"),
            request_prompt: register.histogram("vllm:request_prompt_tokens"),
            request_generation: register.histogram("vllm:request_generation_tokens"),
            request_max_tokens: register.histogram("vllm:request_params_max_tokens"),
            request_choices: register.histogram("vllm:request_params_n"),
            observations: AtomicU64::new(0),
            recorder,
            handle,
            base,
        };
        metrics.cache_info(engine);
        describe(&metrics.recorder);
        Ok(metrics)
    }

    /// The labels are what readers want; the value is always 1.
    fn cache_info(&self, engine: &EngineHandle) {
        let kv = &engine.info().kv;
        let blocks: usize = engine.snapshot().total_pages.iter().sum();
        let labels = [("block_size", kv.page_size.to_string()), ("num_gpu_blocks", blocks.to_string())];
        let labels = labels.each_ref().map(|(name, value)| (*name, value.as_str()));
        Register { recorder: &self.recorder, base: &self.base }
            .gauge("vllm:cache_config_info", &labels)
            .set(1.0);
    }

    /// The exposition text.
    pub(crate) fn render(&self, snapshot: &Snapshot) -> String {
        self.running.set(count(snapshot.running));
        self.waiting.set(count(snapshot.waiting));
        let total: usize = snapshot.total_pages.iter().sum();
        let share = |pages: usize| if total == 0 { 0.0 } else { count(pages) / count(total) };
        let usage = share(snapshot.used_pages.iter().sum());
        self.kv_usage.set(usage);
        self.legacy_kv_usage.set(usage);
        self.prompt_tokens.absolute(snapshot.prompt_tokens);
        self.generation_tokens.absolute(snapshot.generation_tokens);
        self.preemptions.absolute(snapshot.preemptions);
        self.steps.absolute(snapshot.steps);
        let prefixes = snapshot.prefixes;
        self.prefix_queries.iter().for_each(|counter| counter.absolute(prefixes.queries));
        self.prefix_hits.iter().for_each(|counter| counter.absolute(prefixes.hits));
        self.prefix_hit_rate.set(prefixes.hits as f64 / prefixes.queries.max(1) as f64);
        for (counter, tokens) in self.prefix_misses.iter().zip(prefixes.misses) {
            counter.absolute(tokens);
        }
        self.prefix_usage.set(share(snapshot.kept_pages.iter().sum()));
        self.handle.render()
    }

    /// One sequence ended.
    pub(crate) fn ended(&self, how: Ended) {
        self.ended[how as usize].increment(1);
    }

    /// The parser had to recover; `name` is one of the parser's fixed names.
    pub(crate) fn recovery(&self, name: &'static str) {
        Register { recorder: &self.recorder, base: &self.base }
            .counter("ctxserve:parser_recoveries_total", &[("recovery", name)])
            .increment(1);
    }

    /// A submission was refused because `unit` ran out.
    pub(crate) fn rejected(&self, unit: &str) {
        if unit == "sequences" { &self.rejected_requests } else { &self.rejected_tokens }.increment(1);
    }

    /// A prompt was rendered with so many turns of the assistant, of which so many as the model wrote them.
    pub(crate) fn history(&self, replayed: usize, turns: usize) {
        self.replayed_turns.increment(replayed as u64);
        self.canonical_turns.increment(turns.saturating_sub(replayed) as u64);
    }

    /// A response of this status left.
    pub(crate) fn response(&self, status: u16) {
        if let Some(counter) = self.responses.get(usize::from(status / 100).saturating_sub(1)) {
            counter.increment(1);
        }
    }

    /// What is known as a request is accepted.
    pub(crate) fn accepted(&self, prompt: usize, max_tokens: usize, choices: usize) {
        self.observe(&self.request_prompt, count(prompt));
        self.observe(&self.request_max_tokens, count(max_tokens));
        self.observe(&self.request_choices, count(choices));
    }

    pub(crate) fn queue_time(&self, seconds: f64) {
        self.observe(&self.queue, seconds);
    }

    pub(crate) fn first_token(&self, seconds: f64) {
        self.observe(&self.first_token, seconds);
    }

    pub(crate) fn between_tokens(&self, seconds: f64) {
        self.observe(&self.between, seconds);
        self.observe(&self.between_fine, seconds);
    }

    /// A request is over. Spans are present as far as it came.
    pub(crate) fn request_end(&self, spans: &Spans, generated: usize) {
        self.observe(&self.end_to_end, spans.total);
        self.observe(&self.request_generation, count(generated));
        let observed = [(&self.prefill, spans.prefill), (&self.decode, spans.decode)];
        for (histogram, value) in observed {
            if let Some(value) = value {
                self.observe(histogram, value);
            }
        }
        if let (Some(prefill), Some(decode)) = (spans.prefill, spans.decode) {
            self.observe(&self.inference, prefill + decode);
        }
        if let Some(decode) = spans.decode
            && spans.decoded > 0
        {
            self.observe(&self.per_token, decode / count(spans.decoded));
        }
    }

    fn observe(&self, histogram: &Histogram, value: f64) {
        histogram.record(value);
        if self.observations.fetch_add(1, Ordering::Relaxed) % FOLD_AFTER == FOLD_AFTER - 1 {
            self.handle.run_upkeep();
        }
    }
}

/// Counts are far below 2^53.
#[expect(clippy::cast_precision_loss, reason = "metrics are floating point")]
fn count(value: usize) -> f64 {
    value as f64
}

struct Register<'a> {
    recorder: &'a PrometheusRecorder,
    base: &'a [Label],
}

impl Register<'_> {
    fn key(&self, name: &'static str, extra: &[(&'static str, &str)]) -> Key {
        let extra = extra.iter().map(|(name, value)| Label::new(*name, (*value).to_owned()));
        Key::from_parts(name, self.base.iter().cloned().chain(extra).collect::<Vec<_>>())
    }

    fn counter(&self, name: &'static str, extra: &[(&'static str, &str)]) -> Counter {
        self.recorder.register_counter(&self.key(name, extra), &METADATA)
    }

    fn gauge(&self, name: &'static str, extra: &[(&'static str, &str)]) -> Gauge {
        self.recorder.register_gauge(&self.key(name, extra), &METADATA)
    }

    fn histogram(&self, name: &'static str) -> Histogram {
        self.recorder.register_histogram(&self.key(name, &[]), &METADATA)
    }
}

fn describe(recorder: &PrometheusRecorder) {
    let texts = [
        ("vllm:num_requests_running", "Sequences being computed."),
        ("vllm:num_requests_waiting", "Sequences accepted and not running."),
        ("vllm:kv_cache_usage_perc", "Share of KV pages in use; 1 is all."),
        (
            "ctxserve:prefix_cache_usage_perc",
            "Share of KV pages kept for later prompts; they give way where needed.",
        ),
    ];
    for (name, text) in texts {
        recorder.describe_gauge(KeyName::from(name), None, text.into());
    }
    let texts = [
        ("vllm:request_success_total", "Sequences that ended, by reason."),
        ("vllm:admission_rejections_total", "Requests refused because the queue was full."),
        ("ctxserve:parser_recoveries_total", "Malformed answers that the parser repaired, by kind."),
        (
            "ctxserve:history_turns_total",
            "Turns of the assistant in prompts: as the model wrote them, or rendered anew.",
        ),
        ("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."),
        ("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache."),
        ("ctxserve:prefix_cache_misses_total", "Prompt tokens that had to be computed, by cause."),
        ("ctxserve:http_responses_total", "Responses by status class."),
    ];
    for (name, text) in texts {
        recorder.describe_counter(KeyName::from(name), None, text.into());
    }
}

/// 1, 2, 5, 10, 20, 50, … up to and including the first that reaches `most`.
fn one_two_five(most: usize) -> Vec<f64> {
    let most = count(most.max(1));
    let mut values = Vec::new();
    let mut decade = 1.0;
    loop {
        for step in [1.0, 2.0, 5.0] {
            values.push(step * decade);
            if step * decade >= most {
                return values;
            }
        }
        decade *= 10.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_buckets_follow_the_series() {
        assert_eq!(one_two_five(30), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]);
        assert_eq!(one_two_five(1), [1.0]);
    }
}
