//! One line and one set of metrics a request, whatever becomes of it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use ctxserve_core::RequestId;

use crate::generate::choice::{ChoiceEnd, ChoiceUsage};
use crate::metrics::{Ended, Spans};
use crate::state::ServerState;

/// What is known when a request is accepted.
#[derive(Clone, Debug)]
pub(crate) struct Accepted {
    pub(crate) id: RequestId,
    /// The name in the response (`chatcmpl-…`).
    pub(crate) name: String,
    /// The sanitised `X-Request-Id`.
    pub(crate) http_id: String,
    pub(crate) route: &'static str,
    pub(crate) model: String,
    pub(crate) stream: bool,
    pub(crate) prompt_tokens: usize,
    pub(crate) max_tokens: usize,
    pub(crate) choices: usize,
    /// When the request's head had been read.
    pub(crate) arrived: Instant,
}

/// Follows a request from acceptance to its end. Dropped early, it records an abort: the client went away.
pub(crate) struct Record {
    state: ServerState,
    accepted: Accepted,
    queued: Instant,
    admitted: Option<Instant>,
    first_token: Option<Instant>,
    /// Last token of each choice.
    last_token: Vec<Option<Instant>>,
    finish: Vec<&'static str>,
    open: usize,
    recoveries: BTreeSet<&'static str>,
    usage: ChoiceUsage,
    failed: Option<String>,
}

impl Record {
    pub(crate) fn new(state: ServerState, accepted: Accepted) -> Self {
        state.metrics().accepted(accepted.prompt_tokens, accepted.max_tokens, accepted.choices);
        Self {
            queued: Instant::now(),
            admitted: None,
            first_token: None,
            last_token: vec![None; accepted.choices],
            finish: Vec::new(),
            open: accepted.choices,
            recoveries: BTreeSet::new(),
            usage: ChoiceUsage::default(),
            failed: None,
            accepted,
            state,
        }
    }

    pub(crate) fn admitted(&mut self) {
        if self.admitted.is_none() {
            let now = Instant::now();
            self.admitted = Some(now);
            self.state.metrics().queue_time((now - self.queued).as_secs_f64());
        }
    }

    pub(crate) fn token(&mut self, choice: usize) {
        let now = Instant::now();
        if self.first_token.is_none() {
            self.first_token = Some(now);
            self.state.metrics().first_token((now - self.accepted.arrived).as_secs_f64());
        }
        if let Some(last) = self.last_token.get_mut(choice)
            && let Some(before) = last.replace(now)
        {
            self.state.metrics().between_tokens((now - before).as_secs_f64());
        }
    }

    /// A choice ended by itself.
    pub(crate) fn ended(&mut self, end: &ChoiceEnd) {
        let how = if end.finish_reason == "length" { Ended::Length } else { Ended::Stop };
        self.state.metrics().ended(how);
        self.finish.push(end.finish_reason);
        self.open = self.open.saturating_sub(1);
        for name in &end.recoveries {
            self.state.metrics().recovery(name);
            self.recoveries.insert(name);
        }
    }

    /// The request failed as a whole.
    pub(crate) fn failed(&mut self, message: &str) {
        self.failed = Some(message.to_owned());
    }

    /// Counts so far, summed over choices.
    pub(crate) fn usage(&mut self, usage: ChoiceUsage) {
        self.usage = usage;
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let (how, finish) = match (&self.failed, self.open) {
            (Some(_), _) => (Ended::Error, "error".to_owned()),
            (None, 0) => (Ended::Stop, self.finish.join(",")),
            (None, _) => (Ended::Abort, "abort".to_owned()),
        };
        let metrics = self.state.metrics();
        for _ in 0..self.open {
            metrics.ended(how);
        }
        let total = self.accepted.arrived.elapsed();
        let last_token = self.last_token.iter().flatten().max();
        let span = |from: Option<&Instant>, to: Option<&Instant>| Some((*to? - *from?).as_secs_f64());
        let spans = Spans {
            total: total.as_secs_f64(),
            prefill: span(self.admitted.as_ref(), self.first_token.as_ref()),
            decode: span(self.first_token.as_ref(), last_token),
            decoded: (self.usage.generated / self.accepted.choices.max(1)).saturating_sub(1),
        };
        metrics.request_end(&spans, self.usage.generated);
        metrics.cached_tokens.increment(self.usage.cached as u64);
        let since = |from: Instant, to: Option<Instant>| to.map(|to| milliseconds(to - from));
        let a = &self.accepted;
        let recoveries: Vec<_> = self.recoveries.iter().copied().collect();
        tracing::info!(
            request = %a.id,
            id = a.name,
            http_id = a.http_id,
            route = a.route,
            model = a.model,
            stream = a.stream,
            choices = a.choices,
            prompt_tokens = a.prompt_tokens,
            cached_tokens = self.usage.cached,
            generated_tokens = self.usage.generated,
            reasoning_tokens = self.usage.reasoning,
            queue_ms = since(self.queued, self.admitted),
            ttft_ms = since(a.arrived, self.first_token),
            total_ms = milliseconds(total),
            finish,
            error = self.failed,
            recoveries = recoveries.join(","),
            "request"
        );
    }
}

/// Rounded to a microsecond, for people.
fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
