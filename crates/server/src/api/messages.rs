//! `POST /v1/messages` and `POST /v1/messages/count_tokens`: Anthropic's API.

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;

use super::messages_blocks::{self, BlockOptions, Blocks};
use super::messages_frames::MessageFramer;
use crate::error::ApiError;
use crate::generate::choice::ChoiceEnd;
use crate::generate::run::Generation;
use crate::http::body::{blocking, json, read};
use crate::http::guard::{Caller, Tenant};
use crate::http::sse;
use crate::state::ServerState;
use crate::turn::Prepared;
use crate::validate::messages::{self, Sources};
use crate::wire;
use crate::wire::chat_response::StopReason;
use crate::wire::messages_request::MessagesFields;
use crate::wire::messages_response::{EndFields, MessageResponse, MessageUsage, OutputDetails, TokenCount};
use crate::wire::read::text;
use crate::wire::refused::{self, Route};

const ROUTE: &str = "/v1/messages";

/// What frames and whole answers both carry.
pub(crate) struct Head {
    pub(crate) id: String,
    pub(crate) model: String,
    /// The client's name for the request, for errors in a stream.
    pub(crate) http_id: String,
}

/// Answers a conversation.
pub(crate) async fn messages(
    State(state): State<ServerState>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = read(&state, request).await?;
    let (preparing, tenant) = (state.clone(), caller.tenant);
    let (prepared, blocks) = blocking(&state, move || prepare(&preparing, tenant, &body)).await?;
    let head = Head {
        id: state.random_name("msg_"),
        model: prepared.options.model.clone(),
        http_id: caller.http_id.clone(),
    };
    let generation = prepared.start(&state, &head.id, ROUTE, caller)?;
    if prepared.options.stream {
        let keep_alive = state.config().keep_alive;
        let framer = MessageFramer::new(head, blocks);
        return Ok(sse::respond(generation, framer, keep_alive));
    }
    whole(&head, blocks, generation).await
}

/// Counts the tokens of the prompt that [`messages`] would make of the same body.
pub(crate) async fn count_tokens(
    State(state): State<ServerState>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = read(&state, request).await?;
    let counting = state.clone();
    let input_tokens = blocking(&state, move || {
        let mut sources = Sources::default();
        Ok(messages::turn(&counting, fields(&body)?, &mut sources)?
            .render(&counting, caller.tenant)?
            .ids
            .len())
    });
    json(&TokenCount { input_tokens: input_tokens.await? })
}

fn fields(body: &[u8]) -> Result<MessagesFields, ApiError> {
    let text = text(body)?;
    let fields = wire::read::json(text)?;
    refused::check(Route::Messages, text)?;
    Ok(fields)
}

fn prepare(state: &ServerState, tenant: Tenant, body: &[u8]) -> Result<(Prepared, BlockOptions), ApiError> {
    let fields = fields(body)?;
    if fields.max_tokens.is_none() {
        return Err(ApiError::invalid("max_tokens", "max_tokens is required"));
    }
    let last = fields.messages.as_ref().and_then(|messages| messages.last());
    if last.is_some_and(|message| message.role.as_deref() == Some("assistant")) {
        let message = "an answer cannot be continued here: the last message must not be the assistant's";
        return Err(ApiError::unsupported("messages", message));
    }
    let tools = fields.tools.iter().flatten();
    let eager = tools.filter(|tool| tool.eager_input_streaming == Some(true));
    let blocks = BlockOptions {
        eager: eager.filter_map(|tool| tool.name.clone()).filter(|_| fields.stream == Some(true)).collect(),
        omit_thinking: fields.thinking.as_ref().is_some_and(|t| t.display.as_deref() == Some("omitted")),
    };
    let mut sources = Sources::default();
    Ok((messages::turn(state, fields, &mut sources)?.prepare(state, tenant)?, blocks))
}

async fn whole(head: &Head, blocks: BlockOptions, mut generation: Generation) -> Result<Response, ApiError> {
    let mut blocks = Blocks::new(blocks);
    let (mut pieces, mut end) = (Vec::new(), None);
    while let Some(next) = generation.next().await {
        let (choice, step) = next?;
        for delta in step.deltas {
            blocks.push(delta, |call| generation.call_id(choice, call).to_owned(), &mut pieces);
        }
        end = step.end.or(end);
    }
    blocks.close(&mut pieces);
    json(&MessageResponse {
        content: messages_blocks::whole(pieces),
        end: ended(end.as_ref()),
        ..empty(head, usage(&generation))
    })
}

/// An answer that nothing is known of yet.
pub(crate) fn empty(head: &Head, usage: MessageUsage) -> MessageResponse<'_> {
    MessageResponse {
        id: &head.id,
        kind: "message",
        role: "assistant",
        model: &head.model,
        content: Vec::new(),
        end: EndFields::default(),
        usage,
    }
}

/// How an answer ended, in this API's words.
pub(crate) fn ended(end: Option<&ChoiceEnd>) -> EndFields {
    let (reason, stop) = end.map_or(("stop", None), |end| (end.finish_reason, end.stop_reason.clone()));
    match (stop, reason) {
        (Some(StopReason::Text(text)), _) => {
            EndFields { stop_reason: Some("stop_sequence"), stop_sequence: Some(text) }
        }
        (_, "tool_calls") => EndFields { stop_reason: Some("tool_use"), stop_sequence: None },
        (_, "length") => EndFields { stop_reason: Some("max_tokens"), stop_sequence: None },
        _ => EndFields { stop_reason: Some("end_turn"), stop_sequence: None },
    }
}

/// Counts so far.
pub(crate) fn usage(generation: &Generation) -> MessageUsage {
    let total = generation.total();
    MessageUsage {
        input_tokens: generation.prompt_tokens().saturating_sub(total.cached),
        cache_creation_input_tokens: 0,
        cache_read_input_tokens: total.cached,
        output_tokens: total.generated,
        output_tokens_details: OutputDetails { thinking_tokens: total.reasoning },
    }
}
