//! Prompts of `/v1/completions`.

use std::sync::Arc;

use ctxserve_core::TokenId;

use crate::error::ApiError;
use crate::state::ServerState;
use crate::wire::prompt::Prompt;

/// Token ids of every prompt; text is encoded as text, so control tokens that it spells stay text.
///
/// # Errors
/// 400 on `prompt`: missing, empty, too many, an id outside the vocabulary.
pub(crate) fn prompts(
    state: &ServerState,
    prompt: Option<Prompt>,
    n: usize,
) -> Result<Vec<Arc<[TokenId]>>, ApiError> {
    let fail = |message: String| Err(ApiError::invalid("prompt", message));
    let Some(prompt) = prompt else { return fail("prompt is required".to_owned()) };
    let count = match &prompt {
        Prompt::Texts(texts) => texts.len(),
        Prompt::Ids(lists) => lists.len(),
    };
    let limits = &state.config().limits;
    let most = limits.max_prompts;
    if count > most {
        return fail(format!("{count} prompts in one request, at most {most} are allowed"));
    }
    let most = limits.max_sequences;
    if count.saturating_mul(n) > most {
        let message = format!("{count} prompts with n = {n} make more than {most} choices");
        return Err(ApiError::invalid("n", message));
    }
    let lists: Vec<Arc<[TokenId]>> = match prompt {
        Prompt::Texts(texts) => texts.iter().map(|text| state.tokenizer().encode(text).into()).collect(),
        Prompt::Ids(lists) => lists.into_iter().map(Into::into).collect(),
    };
    let vocab = state.engine().info().vocab_size;
    for (index, ids) in lists.iter().enumerate() {
        if ids.is_empty() {
            return fail(format!("prompt {index} is empty"));
        }
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            return fail(format!("token id {id} is outside the vocabulary of {vocab}"));
        }
    }
    Ok(lists)
}
