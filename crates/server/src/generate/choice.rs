//! One choice: tokens in, pieces of the answer out.

use std::sync::Arc;

use ctxserve_chat::{Delta, End, Finish, Outcome, Place, StreamParser};
use ctxserve_core::{FinishReason, StopCause, StopRules, TokenEvent, TokenId, TokenLogprobs, Usage};

use super::align::Alignment;
use super::scribe::Scribe;
use super::stop::StopMatcher;
use crate::error::ApiError;
use crate::wire::chat_response::StopReason;

/// How a choice is read. The same for every choice of a request.
#[derive(Clone, Debug)]
pub(crate) struct ChoiceOptions {
    /// Stop strings, matched against content only.
    pub(crate) stop: StopMatcher,
    /// What the engine stops on.
    pub(crate) rules: StopRules,
    /// Of those, ids whose text is not part of the answer when they stop it. Control tokens that frame a
    /// message are not among them: the parser needs to see them.
    pub(crate) silent_stops: Vec<TokenId>,
    /// Report log-probabilities of tokens without visible text too.
    pub(crate) all_logprobs: bool,
    /// End after the first complete call.
    pub(crate) one_call: bool,
    /// Drop reasoning from the answer; it is still counted.
    pub(crate) hide_reasoning: bool,
}

/// What one event made certain.
#[derive(Debug, Default)]
pub(crate) struct Step {
    /// Text and calls, in order.
    pub(crate) deltas: Vec<Delta>,
    /// Entries of content that is now shown.
    pub(crate) logprobs: Vec<TokenLogprobs>,
    /// Generated ids, whatever became of their text.
    pub(crate) token_ids: Vec<TokenId>,
    /// Present in the choice's last step.
    pub(crate) end: Option<ChoiceEnd>,
}

/// How a choice ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ChoiceEnd {
    /// API spelling.
    pub(crate) finish_reason: &'static str,
    /// The stop string or id that matched.
    pub(crate) stop_reason: Option<StopReason>,
    /// Parser recoveries, by name.
    pub(crate) recoveries: Vec<&'static str>,
}

/// Token counts of a choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ChoiceUsage {
    /// Prompt tokens found in the prefix cache.
    pub(crate) cached: usize,
    /// Generated tokens, stop token included.
    pub(crate) generated: usize,
    /// Of those, reasoning.
    pub(crate) reasoning: usize,
}

/// The state of one choice.
pub(crate) struct Choice {
    parser: Box<dyn StreamParser>,
    options: ChoiceOptions,
    stop_strings: Arc<[String]>,
    align: Alignment,
    /// A token that may be the one that stopped the sequence; the next event tells.
    pending: Option<TokenEvent>,
    usage: ChoiceUsage,
    /// Every id, kept for the log of a recovery when that is on.
    ids: Option<Vec<TokenId>>,
    /// Only in a conversation.
    scribe: Option<Scribe>,
}

/// Why the rest of an answer is not read.
enum Cut {
    StopString(usize),
    OneCall,
}

impl Choice {
    pub(crate) fn new(
        parser: Box<dyn StreamParser>,
        options: ChoiceOptions,
        stop_strings: Arc<[String]>,
    ) -> Self {
        let align = Alignment::default();
        let ids = tracing::enabled!(tracing::Level::DEBUG).then(Vec::new);
        let usage = ChoiceUsage::default();
        Self { parser, options, stop_strings, align, pending: None, usage, ids, scribe: None }
    }

    /// With a scribe, who names calls and keeps the turn.
    pub(crate) fn written_by(self, scribe: Scribe) -> Self {
        Self { scribe: Some(scribe), ..self }
    }

    /// The id of a call that was delivered.
    pub(crate) fn call_id(&self, index: usize) -> &str {
        self.scribe.as_ref().map_or("", |scribe| scribe.call_id(index))
    }

    /// Counts so far.
    pub(crate) fn usage(&self) -> ChoiceUsage {
        self.usage
    }

    /// Takes a sampled token. When the step has an end, the sequence is of no more use.
    pub(crate) fn token(&mut self, token: TokenEvent) -> Step {
        self.usage.generated += 1;
        if let Some(ids) = &mut self.ids {
            ids.push(token.id);
        }
        if let Some(scribe) = &mut self.scribe {
            scribe.token(token.id);
        }
        let mut step = Step { token_ids: vec![token.id], ..Step::default() };
        let stops = self.options.rules.stops_on(token.id);
        let earlier = self.pending.take();
        if let Some(ready) = earlier {
            self.read(ready, &mut step);
        }
        if stops {
            self.pending = Some(token);
        } else if step.end.is_none() {
            self.read(token, &mut step);
        }
        step
    }

    /// Takes the engine's end.
    ///
    /// # Errors
    /// The sequence failed or was aborted.
    pub(crate) fn finish(&mut self, reason: FinishReason, usage: Usage) -> Result<Step, ApiError> {
        self.usage.cached = usage.cached;
        let (end, cause) = match reason {
            FinishReason::Stop(cause) => (End::Stop, Some(cause)),
            FinishReason::Length => (End::Cut, None),
            FinishReason::Abort => {
                return Err(ApiError::unavailable("The request was aborted by the server."));
            }
            FinishReason::Error(message) => return Err(ApiError::internal(message)),
            FinishReason::Fault(message) => return Err(ApiError::fault(message)),
        };
        let mut step = Step::default();
        if let Some(last) = self.pending.take() {
            if cause.is_none() || !self.options.silent_stops.contains(&last.id) {
                self.read(last, &mut step);
            } else if self.options.all_logprobs {
                self.align.token(last.logprobs);
            }
        }
        if step.end.is_none() {
            let stop_reason = match cause {
                Some(StopCause::TokenId(id)) => Some(StopReason::Token(id)),
                Some(StopCause::Eos(_)) | None => None,
            };
            let mut deltas = Vec::new();
            let outcome = self.parser.finish(end, &mut deltas);
            self.write(&deltas);
            match self.deliver(deltas, &mut step) {
                Some(cut) => self.end_by(&cut, outcome, &mut step),
                None => {
                    self.release_held(&mut step);
                    self.keep(&outcome);
                    step.end = Some(self.ended(outcome, stop_reason));
                }
            }
        }
        Ok(step)
    }

    fn read(&mut self, token: TokenEvent, step: &mut Step) {
        let mut deltas = Vec::new();
        let place = self.parser.push(token.id, &mut deltas);
        self.write(&deltas);
        if place == Place::Reasoning {
            self.usage.reasoning += 1;
        }
        if place == Place::Content || self.options.all_logprobs {
            self.align.token(token.logprobs);
        }
        if let Some(cut) = self.deliver(deltas, step) {
            let outcome = self.parser.finish(End::Stop, &mut Vec::new());
            self.end_by(&cut, outcome, step);
        }
    }

    fn write(&mut self, deltas: &[Delta]) {
        if let Some(scribe) = &mut self.scribe {
            scribe.deltas(deltas);
        }
    }

    /// The answer is whole.
    fn keep(&mut self, outcome: &Outcome) {
        if let Some(scribe) = &mut self.scribe {
            scribe.ended(outcome);
        }
    }

    /// Passes deltas on, content through the stop matcher.
    fn deliver(&mut self, deltas: Vec<Delta>, step: &mut Step) -> Option<Cut> {
        for delta in deltas {
            match delta {
                // Says that the content is empty and not absent.
                Delta::Content(text) if text.is_empty() => step.deltas.push(Delta::Content(text)),
                Delta::Content(text) => {
                    self.align.produced(text.len());
                    let released = self.options.stop.push(&text);
                    self.show(released.text, step);
                    if let Some(index) = released.matched {
                        return Some(Cut::StopString(index));
                    }
                }
                Delta::Reasoning(_) if self.options.hide_reasoning => {}
                Delta::CallStart { index, .. } if self.options.one_call && index > 0 => {
                    return Some(Cut::OneCall);
                }
                Delta::CallEnd { index } if self.options.one_call => {
                    step.deltas.push(Delta::CallEnd { index });
                    return Some(Cut::OneCall);
                }
                Delta::CallStart { index, name } => {
                    if let Some(scribe) = &mut self.scribe {
                        scribe.call();
                    }
                    step.deltas.push(Delta::CallStart { index, name });
                }
                other => step.deltas.push(other),
            }
        }
        None
    }

    fn show(&mut self, text: String, step: &mut Step) {
        step.logprobs.extend(self.align.released(text.len()));
        if !text.is_empty() {
            step.deltas.push(Delta::Content(text));
        }
    }

    fn release_held(&mut self, step: &mut Step) {
        let held = self.options.stop.finish();
        self.show(held, step);
        step.logprobs.extend(self.align.finish());
    }

    fn end_by(&mut self, cut: &Cut, mut outcome: Outcome, step: &mut Step) {
        let stop_reason = match cut {
            Cut::StopString(index) => {
                // The match may lie in what `max_tokens` cut.
                if outcome.finish == Finish::Length {
                    outcome.finish = Finish::Stop;
                }
                self.stop_strings.get(*index).cloned().map(StopReason::Text)
            }
            Cut::OneCall => {
                self.release_held(step);
                self.keep(&outcome);
                None
            }
        };
        step.end = Some(self.ended(outcome, stop_reason));
    }

    fn ended(&self, outcome: Outcome, stop_reason: Option<StopReason>) -> ChoiceEnd {
        if let Some(ids) = &self.ids
            && !outcome.recoveries.is_empty()
        {
            tracing::debug!(recoveries = ?outcome.recoveries, ids = ?ids, "the parser recovered");
        }
        ChoiceEnd { finish_reason: outcome.finish.as_str(), stop_reason, recoveries: outcome.recoveries }
    }
}
