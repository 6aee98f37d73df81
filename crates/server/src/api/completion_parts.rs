//! Text completions from their steps: the same parts make whole answers and frames.

use std::sync::Arc;

use ctxserve_chat::Delta;
use ctxserve_core::TokenId;

use super::chat::usage;
use super::logprobs::Legacy;
use crate::generate::choice::Step;
use crate::generate::run::Generation;
use crate::http::sse::{self, Frame, Framer, frame};
use crate::state::ServerState;
use crate::validate::options::StreamUsage;
use crate::wire::completion_response::{CompletionChoice, CompletionLogprobs, CompletionResponse};
use crate::wire::usage::WireUsage;

/// What frames and whole answers both carry.
pub(crate) struct Head {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) fingerprint: String,
    /// Present when the client wants ids back.
    pub(crate) prompts: Option<Vec<Arc<[TokenId]>>>,
    /// Texts of the prompts, when they are repeated.
    pub(crate) echo: Option<Vec<String>>,
    pub(crate) logprobs: bool,
    /// Control tokens are left out of the text.
    pub(crate) skip_special: bool,
    /// Choices of each prompt.
    pub(crate) n: usize,
}

impl Head {
    fn echoed(&self, index: usize) -> &str {
        let texts = self.echo.as_deref().unwrap_or_default();
        texts.get(index / self.n).map_or("", String::as_str)
    }
}

/// Carries what a choice needs from step to step.
#[derive(Debug)]
pub(crate) struct Parts {
    index: usize,
    logprobs: Legacy,
}

impl Parts {
    pub(crate) fn new(head: &Head, index: usize) -> Self {
        Self { index, logprobs: Legacy::new(head.echoed(index), head.skip_special) }
    }

    /// The choice before its first token: the echoed prompt, and the prompt's ids if wanted.
    pub(crate) fn begin(&self, head: &Head) -> CompletionChoice {
        let ids = head.prompts.as_ref().and_then(|prompts| prompts.get(self.index / head.n));
        CompletionChoice {
            text: head.echoed(self.index).to_owned(),
            prompt_token_ids: ids.map(|ids| ids.to_vec()),
            ..self.empty(head)
        }
    }

    /// A choice that says nothing yet.
    pub(crate) fn empty(&self, head: &Head) -> CompletionChoice {
        CompletionChoice {
            index: self.index,
            text: String::new(),
            logprobs: head.logprobs.then(CompletionLogprobs::default),
            finish_reason: None,
            stop_reason: None,
            prompt_token_ids: None,
            token_ids: head.prompts.is_some().then(Vec::new),
        }
    }

    /// Appends a step to a choice.
    pub(crate) fn add(
        &mut self,
        state: &ServerState,
        head: &Head,
        step: Step,
        choice: &mut CompletionChoice,
    ) {
        debug_assert_eq!(head.logprobs, choice.logprobs.is_some());
        for delta in step.deltas {
            if let Delta::Content(text) = delta {
                choice.text.push_str(&text);
            }
        }
        if let Some(out) = &mut choice.logprobs {
            self.logprobs.add(state.tokenizer(), &step.logprobs, out);
        }
        if let Some(ids) = &mut choice.token_ids {
            ids.extend(step.token_ids);
        }
        if let Some(end) = step.end {
            choice.finish_reason = Some(end.finish_reason);
            choice.stop_reason = end.stop_reason;
        }
    }
}

/// Makes frames of steps that say something.
pub(crate) struct CompletionFramer {
    state: ServerState,
    head: Head,
    usage: StreamUsage,
    parts: Vec<Parts>,
    begun: Vec<bool>,
}

impl CompletionFramer {
    pub(crate) fn new(state: ServerState, head: Head, count: usize, usage: StreamUsage) -> Self {
        let parts = (0..count).map(|index| Parts::new(&head, index)).collect();
        Self { state, head, usage, parts, begun: vec![false; count] }
    }

    fn chunk(&self, choices: Vec<CompletionChoice>, usage: Option<Option<WireUsage>>) -> Frame {
        let head = &self.head;
        Frame::data(frame(&CompletionResponse {
            id: &head.id,
            object: "text_completion",
            created: head.created,
            model: &head.model,
            system_fingerprint: &head.fingerprint,
            choices,
            usage,
        }))
    }
}

impl Framer for CompletionFramer {
    fn step(&mut self, index: usize, step: Step, generation: &Generation) -> Vec<Frame> {
        let (Some(parts), Some(begun)) = (self.parts.get_mut(index), self.begun.get_mut(index)) else {
            return Vec::new();
        };
        let first = !std::mem::replace(begun, true);
        let mut choice = if first { parts.begin(&self.head) } else { parts.empty(&self.head) };
        parts.add(&self.state, &self.head, step, &mut choice);
        let silent = choice.text.is_empty()
            && choice.finish_reason.is_none()
            && choice.prompt_token_ids.is_none()
            && choice.token_ids.as_ref().is_none_or(Vec::is_empty)
            && choice.logprobs.as_ref().is_none_or(|logprobs| logprobs.tokens.is_empty());
        if silent {
            return Vec::new();
        }
        if choice.logprobs.as_ref().is_some_and(|logprobs| logprobs.tokens.is_empty()) {
            choice.logprobs = None;
        }
        let usage = match self.usage {
            StreamUsage::Off => None,
            StreamUsage::Last => Some(None),
            StreamUsage::Every => Some(Some(usage(generation))),
        };
        vec![self.chunk(vec![choice], usage)]
    }

    fn last(&mut self, generation: &Generation) -> Vec<Frame> {
        match self.usage {
            StreamUsage::Off => vec![sse::done()],
            StreamUsage::Last | StreamUsage::Every => {
                vec![self.chunk(Vec::new(), Some(Some(usage(generation)))), sse::done()]
            }
        }
    }
}
