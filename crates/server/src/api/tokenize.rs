//! `POST /tokenize` and `POST /detokenize`.

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;
use ctxserve_core::TokenId;

use crate::error::ApiError;
use crate::http::body::{blocking, json, read};
use crate::http::guard::{Caller, Tenant};
use crate::state::ServerState;
use crate::validate::arguments::TemplateArguments;
use crate::validate::reasoning::asked;
use crate::validate::{history, tools};
use crate::wire;
use crate::wire::chat_request::ChatFields;
use crate::wire::refused::{self, Route};
use crate::wire::tokenize::{DetokenizeFields, DetokenizeResponse, TokenizeFields, TokenizeResponse};

/// Ids of a text, or of a conversation as it would be rendered.
pub(crate) async fn tokenize(
    State(state): State<ServerState>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = read(&state, request).await?;
    let working = state.clone();
    blocking(&state, move || json(&tokenized(&working, caller.tenant, &body)?)).await
}

fn tokenized(state: &ServerState, tenant: Tenant, body: &[u8]) -> Result<TokenizeResponse, ApiError> {
    let text = wire::read::text(body)?;
    let fields: TokenizeFields = wire::read::json(text)?;
    refused::check(Route::Tokenize, text)?;
    state.model(fields.model.as_deref())?;
    let tokens = match &fields.prompt {
        Some(prompt) => state.tokenizer().encode(prompt),
        None => {
            let chat: ChatFields = wire::read::json(text)?;
            if chat.messages.is_none() {
                return Err(ApiError::invalid("prompt", "either prompt or messages is required"));
            }
            rendered(state, tenant, chat, text, fields.add_generation_prompt.unwrap_or(true))?
        }
    };
    let tokenizer = state.tokenizer();
    let text_of = |&id: &TokenId| tokenizer.token_text(id).unwrap_or_default();
    let token_strs = fields.return_token_strs.unwrap_or(false).then(|| tokens.iter().map(text_of).collect());
    let max_model_len = state.engine().info().max_model_len;
    Ok(TokenizeResponse { count: tokens.len(), max_model_len, tokens, token_strs })
}

fn rendered(
    state: &ServerState,
    tenant: Tenant,
    chat: ChatFields,
    body: &str,
    open_turn: bool,
) -> Result<Vec<TokenId>, ApiError> {
    let effort = asked(&chat)?.effort;
    let tools = tools::tools(state.config(), chat.tools, body)?;
    let arguments =
        TemplateArguments::new(state.config(), state.format(), chat.chat_template_kwargs.as_ref());
    let mut conversation = history::conversation(state.config(), chat.messages, tools, effort, arguments)?;
    state.turns().recall(tenant, &mut conversation);
    Ok(state.format().render_turns(&conversation, open_turn)?.ids)
}

/// Text of ids, control tokens shown.
pub(crate) async fn detokenize(
    State(state): State<ServerState>,
    request: Request,
) -> Result<Response, ApiError> {
    let body = read(&state, request).await?;
    let working = state.clone();
    blocking(&state, move || json(&detokenized(&working, &body)?)).await
}

fn detokenized(state: &ServerState, body: &[u8]) -> Result<DetokenizeResponse, ApiError> {
    let fields: DetokenizeFields = wire::read::json(wire::read::text(body)?)?;
    state.model(fields.model.as_deref())?;
    let fail = |message: String| Err(ApiError::invalid("tokens", message));
    let Some(tokens) = fields.tokens else { return fail("tokens is required".to_owned()) };
    let info = state.engine().info();
    if tokens.len() > info.max_model_len {
        return fail(format!("{} tokens, at most {} are allowed", tokens.len(), info.max_model_len));
    }
    if let Some(id) = tokens.iter().find(|&&id| id as usize >= info.vocab_size) {
        return fail(format!("token id {id} is outside the vocabulary of {}", info.vocab_size));
    }
    Ok(DetokenizeResponse { prompt: state.tokenizer().decode(&tokens, false) })
}
