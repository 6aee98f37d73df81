//! Turns of the history as the model wrote them, put in the place of what the template made of them.

use std::ops::Range;

use ctxserve_core::TokenId;

use crate::generated::same_json;
use crate::{Conversation, Generated, Message, ParsedMessage, Rendered, Tokenizer};

use super::HermesTokens;
use super::parse::{THINK, THINK_END, read};

/// How the assistant's turns begin behind `<|im_start|>`.
const ROLE: &str = "assistant\n";

/// Puts the ids of generated turns in the place of the template's own, wherever both say the same. `ids` are a rendered
/// conversation. Templates that do not write one turn a message are left alone: whose turn is whose is unknown then.
pub(super) fn splice(
    ids: Vec<TokenId>,
    conversation: &Conversation,
    tokenizer: &Tokenizer,
    tokens: &HermesTokens,
) -> Rendered {
    if conversation.generated.is_empty() {
        return Rendered { ids, replayed: 0 };
    }
    let turns = turns(&ids, tokenizer, tokens);
    let messages = conversation.messages.iter().enumerate();
    let assistants: Vec<usize> = messages
        .filter(|(_, message)| matches!(message, Message::Assistant { .. }))
        .map(|(at, _)| at)
        .collect();
    if turns.len() != assistants.len() {
        return Rendered { ids, replayed: 0 };
    }
    let question = conversation.messages.iter().rposition(|message| matches!(message, Message::User { .. }));
    let mut spliced = Rendered { ids: Vec::with_capacity(ids.len()), replayed: 0 };
    let mut done = 0;
    for (turn, index) in turns.into_iter().zip(assistants) {
        let is_present = question.is_none_or(|question| question < index);
        let own = conversation.generated(index);
        let own = own.and_then(|own| replay(own, &ids[turn.clone()], is_present, tokenizer, tokens));
        if let Some(own) = own {
            spliced.ids.extend(&ids[done..turn.start]);
            spliced.ids.extend(own);
            spliced.replayed += 1;
            done = turn.end;
        }
    }
    spliced.ids.extend(&ids[done..]);
    spliced
}

/// The whole turns of the assistant, without the tokens that frame them.
fn turns(ids: &[TokenId], tokenizer: &Tokenizer, tokens: &HermesTokens) -> Vec<Range<usize>> {
    let mut turns = Vec::new();
    let mut start = None;
    for (at, id) in ids.iter().enumerate() {
        if *id == tokens.start {
            start = Some(at + 1);
        } else if *id == tokens.end
            && let Some(start) = start.take()
            && begins_with_role(&ids[start..at], tokenizer)
        {
            turns.push(start..at);
        }
    }
    turns
}

fn begins_with_role(turn: &[TokenId], tokenizer: &Tokenizer) -> bool {
    // No token is empty, so these are enough.
    bytes(&turn[..turn.len().min(ROLE.len())], tokenizer).starts_with(ROLE.as_bytes())
}

fn bytes(ids: &[TokenId], tokenizer: &Tokenizer) -> Vec<u8> {
    ids.iter().flat_map(|id| tokenizer.token_bytes(*id).unwrap_or_default()).copied().collect()
}

/// The ids for a turn that the template wrote as `canonical`, if that says what the model said; without the thinking if the
/// template left that out. `is_present`: no question followed.
fn replay(
    own: &Generated,
    canonical: &[TokenId],
    is_present: bool,
    tokenizer: &Tokenizer,
    tokens: &HermesTokens,
) -> Option<Vec<TokenId>> {
    let written = own.ids.strip_suffix(&[tokens.end])?;
    let ids = [&own.head, written].concat();
    let (own_bytes, canonical_bytes) = (bytes(&ids, tokenizer), bytes(canonical, tokenizer));
    if own_bytes == canonical_bytes {
        return Some(ids);
    }
    let (own_text, canonical_text) =
        (String::from_utf8_lossy(&own_bytes), String::from_utf8_lossy(&canonical_bytes));
    let (own_text, canonical_text) = (own_text.strip_prefix(ROLE)?, canonical_text.strip_prefix(ROLE)?);
    let (mine, theirs) = (read(own_text), read(canonical_text));
    if !same_answer(&mine, &theirs) {
        return None;
    }
    let thinks = |text: &str| text.trim_start().starts_with(THINK);
    let is_whole = match (trimmed(&mine.reasoning), trimmed(&theirs.reasoning)) {
        // An empty thinking, which says that there is none, belongs to the turn while that is the present one.
        (None, None) => !thinks(own_text) || thinks(canonical_text) || is_present,
        (mine, Some(theirs)) if mine == Some(theirs) => true,
        (Some(_), None) => false,
        _ => return None,
    };
    if is_whole { Some(ids) } else { behind_thinking(&ids, &own_bytes, tokenizer) }
}

fn same_answer(mine: &ParsedMessage, theirs: &ParsedMessage) -> bool {
    trimmed(&mine.content) == trimmed(&theirs.content)
        && mine.calls.len() == theirs.calls.len()
        && mine
            .calls
            .iter()
            .zip(&theirs.calls)
            .all(|(mine, theirs)| mine.name == theirs.name && same_json(&mine.arguments, &theirs.arguments))
}

/// Templates trim: white space around is no difference.
fn trimmed(text: &Option<String>) -> Option<&str> {
    text.as_deref().map(str::trim).filter(|text| !text.is_empty())
}

/// The turn without its thinking, if a token begins where the answer does.
fn behind_thinking(ids: &[TokenId], text: &[u8], tokenizer: &Tokenizer) -> Option<Vec<TokenId>> {
    let tag = THINK_END.as_bytes();
    let end = text.windows(tag.len()).position(|window| window == tag)? + tag.len();
    let answer = end + text[end..].iter().take_while(|byte| **byte == b'\n').count();
    let mut at = 0;
    let first = ids.iter().position(|id| {
        let starts_here = at == answer;
        at += tokenizer.token_bytes(*id).map_or(0, <[u8]>::len);
        starts_here
    })?;
    let mut turn = tokenizer.encode(ROLE);
    turn.extend(&ids[first..]);
    Some(turn)
}
