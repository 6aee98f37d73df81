//! Chat answers as frames of a stream.

use ctxserve_chat::Delta;
use ctxserve_core::{TokenId, TokenLogprobs};

use super::chat::{Head, usage};
use super::logprobs;
use crate::generate::choice::Step;
use crate::generate::run::Generation;
use crate::http::sse::{self, Frame, Framer, frame};
use crate::state::ServerState;
use crate::validate::options::StreamUsage;
use crate::wire::chat_response::{CallDelta, ChatChunk, ChunkChoice, ChunkDelta, FunctionDelta};
use crate::wire::usage::WireUsage;

/// Makes frames: a role first, one delta each, then the finish reason, then usage if asked for.
pub(crate) struct ChatFramer {
    state: ServerState,
    head: Head,
    usage: StreamUsage,
    /// Whether each choice has had its first frame.
    begun: Vec<bool>,
    /// The prompt's ids go into the very first frame.
    prompt_sent: bool,
}

impl ChatFramer {
    pub(crate) fn new(state: ServerState, head: Head, n: usize, usage: StreamUsage) -> Self {
        Self { state, head, usage, begun: vec![false; n], prompt_sent: false }
    }

    fn chunk(&mut self, choices: Vec<ChunkChoice>, usage: Option<Option<WireUsage>>) -> Frame {
        let first = !std::mem::replace(&mut self.prompt_sent, true);
        let head = &self.head;
        Frame::data(frame(&ChatChunk {
            id: &head.id,
            object: "chat.completion.chunk",
            created: head.created,
            model: &head.model,
            system_fingerprint: &head.fingerprint,
            choices,
            usage,
            prompt_token_ids: head.prompt_ids.as_deref().filter(|_| first),
        }))
    }

    fn usage_field(&self, generation: &Generation) -> Option<Option<WireUsage>> {
        match self.usage {
            StreamUsage::Off => None,
            StreamUsage::Last => Some(None),
            StreamUsage::Every => Some(Some(usage(generation))),
        }
    }

    fn delta(&self, choice: usize, delta: Delta, generation: &Generation) -> Option<ChunkDelta> {
        let call = |index, id, name, arguments| ChunkDelta {
            tool_calls: Some([CallDelta {
                index,
                kind: name_is_first(&name),
                id,
                function: FunctionDelta { name, arguments },
            }]),
            ..ChunkDelta::default()
        };
        Some(match delta {
            Delta::Content(text) => ChunkDelta { content: Some(text), ..ChunkDelta::default() },
            Delta::Reasoning(text) => {
                let (reasoning, reasoning_content) = self.state.config().reasoning_names.of(Some(text));
                ChunkDelta { reasoning, reasoning_content, ..ChunkDelta::default() }
            }
            Delta::CallStart { index, name } => {
                let id = generation.call_id(choice, index).to_owned();
                call(index, Some(id), Some(name), String::new())
            }
            Delta::CallArguments { index, text } => call(index, None, None, text),
            Delta::CallEnd { .. } => return None,
        })
    }

    /// Log-probabilities and ids travel with the first frame of their step.
    fn choice(
        &self,
        index: usize,
        delta: ChunkDelta,
        logprobs: &mut Vec<TokenLogprobs>,
        ids: &mut Vec<TokenId>,
    ) -> ChunkChoice {
        let entries = std::mem::take(logprobs);
        let ids = std::mem::take(ids);
        ChunkChoice {
            index,
            delta,
            logprobs: (!entries.is_empty()).then(|| logprobs::chat(self.state.tokenizer(), &entries)),
            finish_reason: None,
            stop_reason: None,
            token_ids: (self.head.prompt_ids.is_some() && !ids.is_empty()).then_some(ids),
        }
    }
}

fn name_is_first(name: &Option<String>) -> Option<&'static str> {
    name.as_ref().map(|_| "function")
}

impl Framer for ChatFramer {
    fn step(&mut self, index: usize, step: Step, generation: &Generation) -> Vec<Frame> {
        let Step { deltas, mut logprobs, token_ids: mut ids, end } = step;
        let usage = self.usage_field(generation);
        let mut frames = Vec::new();
        if let Some(begun) = self.begun.get_mut(index)
            && !std::mem::replace(begun, true)
        {
            let role =
                ChunkDelta { role: Some("assistant"), content: Some(String::new()), ..ChunkDelta::default() };
            let choice = self.choice(index, role, &mut Vec::new(), &mut Vec::new());
            frames.push(self.chunk(vec![choice], usage));
        }
        for delta in deltas {
            if let Some(delta) = self.delta(index, delta, generation) {
                let choice = self.choice(index, delta, &mut logprobs, &mut ids);
                frames.push(self.chunk(vec![choice], usage));
            }
        }
        let wanted_ids = self.head.prompt_ids.is_some() && !ids.is_empty();
        if let Some(end) = end {
            let choice = self.choice(index, ChunkDelta::default(), &mut logprobs, &mut ids);
            let choice = ChunkChoice {
                finish_reason: Some(end.finish_reason),
                stop_reason: end.stop_reason,
                ..choice
            };
            frames.push(self.chunk(vec![choice], usage));
        } else if !logprobs.is_empty() || wanted_ids {
            let choice = self.choice(index, ChunkDelta::default(), &mut logprobs, &mut ids);
            frames.push(self.chunk(vec![choice], usage));
        }
        frames
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
