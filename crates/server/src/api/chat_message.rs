//! A whole chat choice.

use super::chat::Head;
use super::logprobs;
use crate::generate::gathered::Gathered;
use crate::generate::run::Generation;
use crate::state::ServerState;
use crate::wire::chat_response::{ChatChoice, ChatMessage, WireCall, WireCallFunction};

/// The choice as the route answers it.
pub(crate) fn choice(
    state: &ServerState,
    head: &Head,
    generation: &Generation,
    index: usize,
    gathered: Gathered,
) -> ChatChoice {
    let message = gathered.message.into_message();
    let call = |(number, call): (usize, ctxserve_chat::ParsedCall)| WireCall {
        id: generation.call_id(index, number).to_owned(),
        kind: "function",
        function: WireCallFunction { name: call.name, arguments: call.arguments },
    };
    let (finish_reason, stop_reason) = match gathered.end {
        Some(end) => (end.finish_reason, end.stop_reason),
        None => ("stop", None),
    };
    let (reasoning, reasoning_content) = state.config().reasoning_names.of(message.reasoning);
    ChatChoice {
        index,
        message: ChatMessage {
            role: "assistant",
            content: message.content,
            refusal: None,
            reasoning,
            reasoning_content,
            tool_calls: message.calls.into_iter().enumerate().map(call).collect(),
        },
        logprobs: head.logprobs.then(|| logprobs::chat(state.tokenizer(), &gathered.logprobs)),
        finish_reason,
        stop_reason,
        token_ids: head.prompt_ids.is_some().then_some(gathered.token_ids),
    }
}
