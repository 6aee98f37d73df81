//! Turns of the history as the model wrote them.

use ctxserve_core::TokenId;

use crate::{Generated, Message, Tokenizer};

use super::HarmonyTokens;
use super::render::{Channel, Part};

/// The messages of a turn, each with its own ids; `message` is what the client sent of it, which says the same. Without
/// the reasoning if the client left that out. `None` if the turn is not one that the canonical form would cut into the
/// same messages: its parts are then dropped and kept by rules that do not fit them.
pub(super) fn parts<'a>(
    turn: &'a Generated,
    message: &Message,
    tokenizer: &Tokenizer,
    tokens: &HarmonyTokens,
) -> Option<Vec<Part<'a>>> {
    let Message::Assistant { reasoning, tool_calls, .. } = message else { return None };
    let mut parts = Vec::new();
    let mut rest: &[TokenId] = &turn.ids;
    while !rest.is_empty() {
        let closes = |id: &TokenId| *id == tokens.end || *id == tokens.ret || *id == tokens.call;
        let (written, behind) = rest.split_at(rest.iter().position(closes)? + 1);
        parts.push(part(written, parts.is_empty(), tokenizer, tokens)?);
        rest = behind;
    }
    let calls = parts.iter().filter(|part| part.recipient.is_some()).count();
    let finals = parts.iter().filter(|part| part.channel == Some(Channel::Final)).count();
    let last = parts.last()?;
    let is_answer = calls == 0 && finals == 1 && last.channel == Some(Channel::Final);
    let is_calling = calls > 0 && finals == 0 && last.recipient.is_some();
    if calls != tool_calls.len() || !(is_answer || is_calling) {
        return None;
    }
    if reasoning.is_none() && turn.said.reasoning.is_some() {
        parts.retain(|part| part.channel != Some(Channel::Analysis));
    }
    Some(parts)
}

/// One message: its header is read as far as dropping and keeping depend on it.
fn part<'a>(
    written: &'a [TokenId],
    is_first: bool,
    tokenizer: &Tokenizer,
    tokens: &HarmonyTokens,
) -> Option<Part<'a>> {
    if (written.first() == Some(&tokens.start)) == is_first {
        return None;
    }
    let header = &written[..written.iter().position(|id| *id == tokens.message)?];
    let (before, after) = header.split_at(header.iter().position(|id| *id == tokens.channel)?);
    let (before, after) = (tokenizer.decode(before, true), tokenizer.decode(after, true));
    let channel = match after.split_whitespace().next()? {
        "analysis" => Channel::Analysis,
        "commentary" => Channel::Commentary,
        "final" => Channel::Final,
        _ => return None,
    };
    let recipient =
        before.split_whitespace().chain(after.split_whitespace()).find_map(|word| word.strip_prefix("to="));
    let mut part = Part::new("assistant", "").on(channel);
    if let Some(recipient) = recipient {
        if !recipient.starts_with("functions.") || channel != Channel::Commentary {
            return None;
        }
        part = part.to(recipient);
    }
    part.written = Some(written);
    Some(part)
}
