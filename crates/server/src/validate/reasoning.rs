//! How a chat request speaks of reasoning: OpenAI's and vLLM's fields, or the `reasoning` object of OpenRouter's clients.

use crate::error::ApiError;
use crate::wire::chat_request::ChatFields;

/// What a request asks for, beside its template arguments.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Asked {
    /// The level, and the field that says it.
    pub(crate) effort: Option<(String, &'static str)>,
    /// Reasoning is left out of the answer.
    pub(crate) hide: bool,
}

/// Reads it. `reasoning_effort` goes before `reasoning`; `enabled` alone is effort `none` or `medium`.
///
/// # Errors
/// 400 for a number of tokens, which is not held to.
pub(crate) fn asked(fields: &ChatFields) -> Result<Asked, ApiError> {
    let own = fields.reasoning_effort.clone().map(|level| (level, "reasoning_effort"));
    let hide = fields.include_reasoning == Some(false);
    let Some(object) = &fields.reasoning else { return Ok(Asked { effort: own, hide }) };
    if object.max_tokens.as_ref().is_some_and(|most| !most.is_null()) {
        let message = "'reasoning.max_tokens' is not supported by this server; use 'reasoning.effort'.";
        return Err(ApiError::unsupported("reasoning.max_tokens", message));
    }
    let effort = object.effort.clone().map(|level| (level, "reasoning.effort"));
    let enabled =
        object.enabled.map(|on| (if on { "medium" } else { "none" }.to_owned(), "reasoning.enabled"));
    Ok(Asked { effort: own.or(effort).or(enabled), hide: hide || object.exclude == Some(true) })
}
