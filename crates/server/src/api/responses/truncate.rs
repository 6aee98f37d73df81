//! `truncation: "auto"`: of a conversation that is too long, the oldest part is left out.

use ctxserve_chat::{Conversation, Message};

use super::items::Origin;
use crate::state::ServerState;

/// Of the context, this part is left for the answer where the request does not say how long it may be.
const ANSWER_SHARE: usize = 4;

/// Leaves out what is oldest until prompt and answer fit: whole turns of the user first, then rounds of calls after the last of
/// them. Instructions and the last turn of the user stay. What cannot be made to fit, or rendered, is left as it is.
pub(super) fn truncate(
    state: &ServerState,
    conversation: &mut Conversation,
    origins: &mut Vec<Origin>,
    max_output_tokens: Option<usize>,
) {
    let context = state.engine().info().max_model_len;
    let answer = max_output_tokens.unwrap_or(context / ANSWER_SHARE).min(context / 2).max(1);
    let fits = |conversation: &Conversation| {
        state.format().render(conversation).is_ok_and(|prompt| prompt.len() + answer <= context)
    };
    if state.format().render(conversation).is_err() || fits(conversation) {
        return;
    }
    let cuts = cuts(&conversation.messages);
    let cut = |at: usize| {
        let messages =
            kept(&conversation.messages, cuts[at]).map(|index| conversation.messages[index].clone());
        Conversation { messages: messages.collect(), ..conversation.clone() }
    };
    let (mut low, mut high) = (0, cuts.len());
    while low < high {
        let middle = usize::midpoint(low, high);
        if fits(&cut(middle)) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    let Some(&place) = cuts.get(low) else { return };
    let shorter = cut(low);
    let dropped = conversation.messages.len() - shorter.messages.len();
    tracing::info!(dropped, "truncating a conversation");
    *origins = kept(&conversation.messages, place).filter_map(|index| origins.get(index).copied()).collect();
    *conversation = shorter;
}

/// Places before which everything that may go goes, in the order of how much that is.
fn cuts(messages: &[Message]) -> Vec<usize> {
    let places = |from: usize, is: fn(&Message) -> bool| {
        let after = messages.iter().enumerate().skip(from);
        after.filter(move |(_, message)| is(message)).map(|(index, _)| index)
    };
    let is_user = |message: &Message| matches!(message, Message::User { .. });
    let is_assistant = |message: &Message| matches!(message, Message::Assistant { .. });
    let last = messages.iter().rposition(is_user).unwrap_or(0);
    places(1, is_user).chain(places(last + 1, is_assistant)).collect()
}

/// Indices of what a cut keeps.
fn kept(messages: &[Message], cut: usize) -> impl Iterator<Item = usize> {
    let last = messages.iter().rposition(|message| matches!(message, Message::User { .. }));
    messages
        .iter()
        .enumerate()
        .filter(move |(index, message)| {
            *index >= cut
                || Some(*index) == last
                || matches!(message, Message::System(_) | Message::Developer(_))
        })
        .map(|(index, _)| index)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn say(role: char) -> Message {
        match role {
            's' => Message::System(String::new()),
            'u' => Message::User { name: None, content: String::new() },
            'a' => Message::Assistant { reasoning: None, content: None, tool_calls: Vec::new() },
            _ => Message::Tool { call_id: String::new(), content: String::new() },
        }
    }

    #[test]
    fn the_oldest_goes_first_and_results_go_with_their_calls() {
        let messages: Vec<Message> = "suauatatat".chars().map(say).collect();
        let left: Vec<String> = cuts(&messages)
            .into_iter()
            .map(|cut| kept(&messages, cut).map(|index| index.to_string()).collect())
            .collect();
        assert_eq!(left, ["0123456789", "03456789", "03456789", "036789", "0389"].map(str::to_owned));
    }
}
