//! A response as it comes into being: steps of a generation in, output items and events out. Whole answers, streams and
//! background responses are all made here, so they cannot disagree.

use ctxserve_chat::Delta;

use super::log::Log;
use super::sealed;
use crate::api::logprobs;
use crate::error::ApiError;
use crate::generate::choice::Step;
use crate::generate::run::Generation;
use crate::state::{ServerState, unix_seconds};
use crate::wire::chat_response::ChatLogprob;
use crate::wire::responses_output::{OutputItem, ReasoningPart, Status, TextPart};
use crate::wire::responses_response::{
    Echo, EventBody, IncompleteDetails, InputDetails, OutputDetails, ResponseError, ResponsesUsage, WirePart,
    WireResponse,
};

/// What a response is made with beside its steps.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) id: String,
    pub(super) echo: Echo,
    /// Give `encrypted_content`.
    pub(super) sealed: bool,
    /// Give log-probabilities.
    pub(super) logprobs: bool,
}

/// A response so far.
pub(super) struct Answer {
    state: ServerState,
    plan: Plan,
    created_at: u64,
    completed_at: Option<u64>,
    status: Status,
    error: Option<ResponseError>,
    incomplete: Option<IncompleteDetails>,
    output: Vec<OutputItem>,
    /// The last item of `output` still grows.
    open: bool,
    usage: Option<ResponsesUsage>,
    log: Log,
}

impl Answer {
    /// A response of which nothing is there yet; `log` takes its events.
    pub(super) fn new(state: ServerState, plan: Plan, log: Log) -> Self {
        let status = if plan.echo.background { Status::Queued } else { Status::InProgress };
        Self {
            state,
            plan,
            created_at: unix_seconds(),
            completed_at: None,
            status,
            error: None,
            incomplete: None,
            output: Vec::new(),
            open: false,
            usage: None,
            log,
        }
    }

    pub(super) fn id(&self) -> &str {
        &self.plan.id
    }

    pub(super) fn output(&self) -> &[OutputItem] {
        &self.output
    }

    pub(super) fn log(&mut self) -> &mut Log {
        &mut self.log
    }

    /// The response object as it is now.
    pub(super) fn response(&self) -> WireResponse<'_> {
        WireResponse {
            id: &self.plan.id,
            object: "response",
            created_at: self.created_at,
            completed_at: self.completed_at,
            status: self.status,
            error: self.error.as_ref(),
            incomplete_details: self.incomplete,
            output: &self.output,
            usage: self.usage,
            echo: &self.plan.echo,
        }
    }

    fn lifecycle(&mut self, kind: &'static str) {
        if self.log.is_on() {
            let mut log = std::mem::take(&mut self.log);
            log.emit(kind, EventBody::Response { response: Box::new(self.response()) });
            self.log = log;
        }
    }

    /// The response exists.
    pub(super) fn begin(&mut self) {
        self.lifecycle("response.created");
        if self.status == Status::Queued {
            self.lifecycle("response.queued");
            self.status = Status::InProgress;
        }
        self.lifecycle("response.in_progress");
    }

    /// Takes the next step of its one choice.
    pub(super) fn step(&mut self, step: Step, generation: &Generation) {
        let mut entries = match self.plan.logprobs && !step.logprobs.is_empty() {
            true => logprobs::chat(self.state.tokenizer(), &step.logprobs).content,
            false => Vec::new(),
        };
        for delta in step.deltas {
            match delta {
                Delta::Reasoning(text) => self.reasoning(&text),
                Delta::Content(text) => self.content(&text, std::mem::take(&mut entries)),
                Delta::CallStart { index, name } => {
                    self.call(generation.call_id(0, index).to_owned(), name);
                }
                Delta::CallArguments { text, .. } => self.arguments(&text),
                Delta::CallEnd { .. } => self.close(Status::Completed, None),
            }
        }
        // Of characters that were cut: they have no text of their own.
        if !entries.is_empty() {
            self.content("", entries);
        }
        if let Some(end) = step.end {
            let cut = end.finish_reason == "length";
            let (item, phase) = match cut {
                true => (Status::Incomplete, None),
                false => (Status::Completed, Some("final_answer")),
            };
            self.close(item, phase);
            self.status = item;
            self.incomplete = cut.then_some(IncompleteDetails { reason: "max_output_tokens" });
        }
    }

    fn add(&mut self, item: OutputItem) {
        // What is said before more reasoning or a call is not the answer yet.
        self.close(Status::Completed, Some("commentary"));
        self.open = true;
        let output_index = self.output.len();
        self.log.emit("response.output_item.added", EventBody::Item { output_index, item: &item });
        self.output.push(item);
    }

    fn reasoning(&mut self, text: &str) {
        if !matches!(self.output.last(), Some(OutputItem::Reasoning { .. }) if self.open) {
            self.add(OutputItem::Reasoning {
                id: self.state.random_name("rs_"),
                summary: [],
                content: Vec::new(),
                encrypted_content: None,
                status: Status::InProgress,
            });
            let part = ReasoningPart::default();
            self.part("response.content_part.added", WirePart::Reasoning(&part));
            if let Some(OutputItem::Reasoning { content, .. }) = self.output.last_mut() {
                content.push(part);
            }
        }
        let output_index = self.output.len().saturating_sub(1);
        if let Some(OutputItem::Reasoning { id, content, .. }) = self.output.last_mut()
            && let Some(part) = content.last_mut()
        {
            part.text.push_str(text);
            let body = EventBody::ReasoningDelta { item_id: id, output_index, content_index: 0, delta: text };
            self.log.emit("response.reasoning_text.delta", body);
        }
    }

    fn content(&mut self, text: &str, mut entries: Vec<ChatLogprob>) {
        if !matches!(self.output.last(), Some(OutputItem::Message { .. }) if self.open) {
            self.add(OutputItem::Message {
                id: self.state.random_name("msg_"),
                status: Status::InProgress,
                role: "assistant",
                phase: None,
                content: Vec::new(),
            });
            let part = TextPart::default();
            self.part("response.content_part.added", WirePart::Text(&part));
            if let Some(OutputItem::Message { content, .. }) = self.output.last_mut() {
                content.push(part);
            }
        }
        if text.is_empty() && entries.is_empty() {
            return;
        }
        let output_index = self.output.len().saturating_sub(1);
        if let Some(OutputItem::Message { id, content, .. }) = self.output.last_mut()
            && let Some(part) = content.last_mut()
        {
            part.text.push_str(text);
            let body = EventBody::TextDelta {
                item_id: id,
                output_index,
                content_index: 0,
                delta: text,
                logprobs: &entries,
            };
            self.log.emit("response.output_text.delta", body);
            part.logprobs.append(&mut entries);
        }
    }

    fn call(&mut self, call_id: String, name: String) {
        self.add(OutputItem::FunctionCall {
            id: self.state.random_name("fc_"),
            call_id,
            name,
            arguments: String::new(),
            status: Status::InProgress,
        });
    }

    fn arguments(&mut self, text: &str) {
        let output_index = self.output.len().saturating_sub(1);
        if let Some(OutputItem::FunctionCall { id, arguments, .. }) = self.output.last_mut() {
            arguments.push_str(text);
            let body = EventBody::ArgumentsDelta { item_id: id, output_index, delta: text };
            self.log.emit("response.function_call_arguments.delta", body);
        }
    }

    fn part(&mut self, kind: &'static str, part: WirePart<'_>) {
        let output_index = self.output.len().saturating_sub(1);
        if let Some(item) = self.output.last() {
            self.log.emit(kind, EventBody::Part { item_id: item.id(), output_index, content_index: 0, part });
        }
    }

    /// Ends the item that still grows, if one does; `phase` is what its text was if it is a message.
    fn close(&mut self, end: Status, phase: Option<&'static str>) {
        let output_index = self.output.len().saturating_sub(1);
        let Some(item) = self.output.last_mut().filter(|_| std::mem::take(&mut self.open)) else { return };
        let log = &mut self.log;
        match item {
            OutputItem::Reasoning { id, content, encrypted_content, status, .. } => {
                *status = end;
                for (content_index, part) in content.iter().enumerate() {
                    let text = part.text.as_str();
                    let body = EventBody::ReasoningDone { item_id: id, output_index, content_index, text };
                    log.emit("response.reasoning_text.done", body);
                    let part = WirePart::Reasoning(part);
                    let body = EventBody::Part { item_id: id, output_index, content_index, part };
                    log.emit("response.content_part.done", body);
                    if self.plan.sealed {
                        *encrypted_content = Some(sealed::seal(text));
                    }
                }
            }
            OutputItem::Message { id, status, phase: said, content, .. } => {
                *status = end;
                *said = phase;
                for (content_index, part) in content.iter().enumerate() {
                    let body = EventBody::TextDone {
                        item_id: id,
                        output_index,
                        content_index,
                        text: &part.text,
                        logprobs: &part.logprobs,
                    };
                    log.emit("response.output_text.done", body);
                    let part = WirePart::Text(part);
                    let body = EventBody::Part { item_id: id, output_index, content_index, part };
                    log.emit("response.content_part.done", body);
                }
            }
            OutputItem::FunctionCall { id, name, arguments, status, .. } => {
                *status = end;
                let body = EventBody::ArgumentsDone { item_id: id, output_index, name, arguments };
                log.emit("response.function_call_arguments.done", body);
            }
        }
        log.emit("response.output_item.done", EventBody::Item { output_index, item });
    }

    fn count(&mut self, generation: &Generation) {
        let total = generation.total();
        let input_tokens = generation.prompt_tokens();
        self.usage = Some(ResponsesUsage {
            input_tokens,
            input_tokens_details: InputDetails { cached_tokens: total.cached, cache_write_tokens: 0 },
            output_tokens: total.generated,
            output_tokens_details: OutputDetails { reasoning_tokens: total.reasoning },
            total_tokens: input_tokens + total.generated,
        });
    }

    /// All steps have come. Fills in what the final object has; [`Answer::end`] says so.
    pub(super) fn finish(&mut self, generation: &Generation) {
        self.count(generation);
        if self.status == Status::Completed {
            self.completed_at = Some(unix_seconds());
        }
    }

    /// The generation failed.
    pub(super) fn fail(&mut self, error: &ApiError) {
        self.close(Status::Incomplete, None);
        self.status = Status::Failed;
        let code = if error.status.is_server_error() { "server_error" } else { "invalid_prompt" };
        self.error = Some(ResponseError { code, message: error.message.clone() });
        let body =
            EventBody::Error { code: error.code, message: &error.message, param: error.param.as_deref() };
        self.log.emit("error", body);
    }

    /// A client cancelled it.
    pub(super) fn cancel(&mut self, generation: &Generation) {
        self.close(Status::Incomplete, None);
        self.count(generation);
        self.status = Status::Cancelled;
    }

    /// The last event.
    pub(super) fn end(&mut self) {
        self.lifecycle(match self.status {
            Status::Completed => "response.completed",
            Status::Failed => "response.failed",
            _ => "response.incomplete",
        });
    }
}
