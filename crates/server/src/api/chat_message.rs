//! A whole chat choice from its steps.

use ctxserve_chat::Collector;
use ctxserve_core::{TokenId, TokenLogprobs};

use super::chat::Head;
use super::logprobs;
use crate::generate::choice::{ChoiceEnd, Step};
use crate::state::ServerState;
use crate::wire::chat_response::{ChatChoice, ChatMessage, WireCall, WireCallFunction};

/// Steps of one choice, gathered.
#[derive(Debug, Default)]
pub(crate) struct Gathered {
    message: Collector,
    logprobs: Vec<TokenLogprobs>,
    token_ids: Vec<TokenId>,
    end: Option<ChoiceEnd>,
}

impl Gathered {
    pub(crate) fn add(&mut self, step: Step) {
        for delta in &step.deltas {
            self.message.add(delta);
        }
        self.logprobs.extend(step.logprobs);
        self.token_ids.extend(step.token_ids);
        self.end = step.end.or(self.end.take());
    }

    pub(crate) fn finish(self, state: &ServerState, head: &Head, index: usize) -> ChatChoice {
        let message = self.message.into_message();
        let call = |call: ctxserve_chat::ParsedCall| WireCall {
            id: state.random_name("call_"),
            kind: "function",
            function: WireCallFunction { name: call.name, arguments: call.arguments },
        };
        let (finish_reason, stop_reason) = match self.end {
            Some(end) => (end.finish_reason, end.stop_reason),
            None => ("stop", None),
        };
        ChatChoice {
            index,
            message: ChatMessage {
                role: "assistant",
                content: message.content,
                refusal: None,
                reasoning: message.reasoning.clone(),
                reasoning_content: message.reasoning,
                tool_calls: message.calls.into_iter().map(call).collect(),
            },
            logprobs: head.logprobs.then(|| logprobs::chat(state.tokenizer(), &self.logprobs)),
            finish_reason,
            stop_reason,
            token_ids: head.prompt_ids.is_some().then_some(self.token_ids),
        }
    }
}
