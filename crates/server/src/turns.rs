//! Turns that this server answered with, by what a client sends back of them: a history that repeats one is rendered by the
//! very ids that the model generated, so that the prompt begins as what was computed before.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use ctxserve_chat::{Conversation, Generated, Message};
use ctxserve_core::TokenId;

use crate::http::guard::Tenant;
use crate::kept::Kept;

/// Most keys kept; a turn has two at most.
const KEYS: usize = 1 << 16;
/// About what a turn takes beside its texts and ids.
const OVERHEAD: usize = 512;

/// Turns of all tenants, each for its own.
pub(crate) struct Turns {
    kept: Kept<u64, Arc<Known>>,
    /// Keyed at random per process: nobody can choose texts that have one key.
    hasher: RandomState,
}

/// A turn that was answered.
struct Known {
    tenant: Tenant,
    /// As the client was told.
    call_ids: Vec<String>,
    turn: Arc<Generated>,
}

impl Known {
    fn bytes(&self) -> usize {
        let Generated { said, head, ids } = &*self.turn;
        let calls = said.calls.iter().map(|call| call.name.len() + call.arguments.len());
        let texts = said.content.iter().chain(&said.reasoning).chain(&self.call_ids).map(String::len);
        OVERHEAD + size_of::<TokenId>() * (head.len() + ids.len()) + calls.chain(texts).sum::<usize>()
    }

    fn has_ids_of(&self, message: &Message) -> bool {
        let Message::Assistant { tool_calls, .. } = message else { return false };
        !tool_calls.is_empty() && tool_calls.iter().map(|call| &call.id).eq(&self.call_ids)
    }
}

impl Turns {
    /// Room for about so many bytes; none keeps nothing.
    pub(crate) fn new(bytes: usize) -> Self {
        Self { kept: Kept::new(KEYS, bytes), hasher: RandomState::new() }
    }

    /// Keeps a turn, whose calls the client knows by these ids.
    pub(crate) fn keep(&self, tenant: Tenant, call_ids: Vec<String>, turn: Generated) {
        let said = &turn.said;
        let calls = said.calls.iter().map(|call| (call.name.as_str(), call.arguments.as_str()));
        let by_words = self.by_words(tenant, said.content.as_deref(), calls);
        let by_id = call_ids.first().map(|id| self.by_id(tenant, id));
        let known = Arc::new(Known { tenant, call_ids, turn: Arc::new(turn) });
        let bytes = known.bytes();
        for key in [Some(by_words), by_id].into_iter().flatten() {
            self.kept.insert(key, Arc::clone(&known), bytes);
        }
    }

    /// Tells a conversation which of its messages are turns that the tenant was answered with. Reasoning that a client left
    /// out comes back where the ids of all calls are known: they cannot be guessed, as the words of a message can.
    pub(crate) fn recall(&self, tenant: Tenant, conversation: &mut Conversation) {
        for (index, message) in conversation.messages.iter_mut().enumerate() {
            let Some(known) = self.find(tenant, message) else { continue };
            if known.has_ids_of(message)
                && let Message::Assistant { reasoning: reasoning @ None, .. } = message
            {
                reasoning.clone_from(&known.turn.said.reasoning);
            }
            conversation.generated.insert(index, Arc::clone(&known.turn));
        }
    }

    fn find(&self, tenant: Tenant, message: &Message) -> Option<Arc<Known>> {
        let Message::Assistant { content, tool_calls, .. } = message else { return None };
        // Keys are hashes: what they lead to is looked at whole.
        let known =
            |key| self.kept.get(&key).filter(|known| known.tenant == tenant && known.turn.says(message));
        tool_calls.first().and_then(|call| known(self.by_id(tenant, &call.id))).or_else(|| {
            let calls = tool_calls.iter().map(|call| (call.name.as_str(), call.arguments.as_str()));
            known(self.by_words(tenant, content.as_deref(), calls))
        })
    }

    fn by_id(&self, tenant: Tenant, id: &str) -> u64 {
        self.hasher.hash_one((tenant, "id", id))
    }

    /// Arguments without white space, which clients that keep them as objects write anew.
    fn by_words<'a>(
        &self,
        tenant: Tenant,
        content: Option<&str>,
        calls: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> u64 {
        let bare = |text: &str| text.chars().filter(|c| !c.is_ascii_whitespace()).collect::<String>();
        let calls: Vec<(&str, String)> = calls.map(|(name, arguments)| (name, bare(arguments))).collect();
        self.hasher.hash_one((tenant, "words", content.unwrap_or_default(), calls))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ctxserve_chat::{ParsedCall, ParsedMessage, ToolCall};

    const MINE: Tenant = Some(0);
    const ANOTHER: Tenant = Some(1);

    fn turn(content: Option<&str>, arguments: &[&str]) -> Generated {
        let call = |text: &&str| ParsedCall { name: "f".to_owned(), arguments: (*text).to_owned() };
        let said = ParsedMessage {
            content: content.map(str::to_owned),
            reasoning: Some("Hm.".to_owned()),
            calls: arguments.iter().map(call).collect(),
        };
        Generated { said, ids: [1, 2, 3].into(), ..Generated::default() }
    }

    fn message(content: Option<&str>, calls: &[(&str, &str)]) -> Message {
        let call = |(id, arguments): &(&str, &str)| ToolCall {
            id: (*id).to_owned(),
            name: "f".to_owned(),
            arguments: (*arguments).to_owned(),
        };
        Message::Assistant {
            reasoning: None,
            content: content.map(str::to_owned),
            tool_calls: calls.iter().map(call).collect(),
        }
    }

    /// Whether the turn is known, and whether its reasoning came back.
    fn recalled(turns: &Turns, tenant: Tenant, message: Message) -> (bool, bool) {
        let mut conversation = Conversation { messages: vec![message], ..Conversation::default() };
        turns.recall(tenant, &mut conversation);
        let Message::Assistant { reasoning, .. } = &conversation.messages[0] else { panic!("a turn") };
        (!conversation.generated.is_empty(), reasoning.is_some())
    }

    /// HAR-07: turns are known by the ids of their calls and by their words, to the tenant they were made for.
    #[test]
    fn har_07_turns_are_known_by_ids_and_by_words() {
        let turns = Turns::new(1 << 20);
        turns.keep(MINE, vec!["a".to_owned(), "b".to_owned()], turn(None, &["{\"x\": 1}", "{}"]));
        turns.keep(MINE, Vec::new(), turn(Some("Yes."), &[]));
        let calls = |a, b| message(None, &[(a, "{\"x\":1}"), (b, "{}")]);
        assert_eq!(recalled(&turns, MINE, calls("a", "b")), (true, true));
        // Other ids: the words are known, the reasoning stays where it is.
        assert_eq!(recalled(&turns, MINE, calls("a", "c")), (true, false));
        assert_eq!(recalled(&turns, MINE, calls("c", "d")), (true, false));
        assert_eq!(recalled(&turns, MINE, message(Some("Yes."), &[])), (true, false));
        // Other words, with ids that are known.
        assert_eq!(
            recalled(&turns, MINE, message(None, &[("a", "{\"x\": 2}"), ("b", "{}")])),
            (false, false)
        );
        assert_eq!(recalled(&turns, MINE, message(Some("No."), &[])), (false, false));
        assert_eq!(recalled(&turns, MINE, message(None, &[("a", "{\"x\": 1}")])), (false, false));
        // Another key: nothing is known, whatever is sent.
        assert_eq!(recalled(&turns, ANOTHER, calls("a", "b")), (false, false));
        assert_eq!(recalled(&turns, ANOTHER, message(Some("Yes."), &[])), (false, false));
    }

    /// HAR-07: memory is bounded; what is forgotten takes the canonical form.
    #[test]
    fn har_07_old_turns_are_forgotten() {
        let turns = Turns::new(20 * OVERHEAD);
        let text = |n: usize| format!("{n}");
        for n in 0..100 {
            turns.keep(MINE, Vec::new(), turn(Some(&text(n)), &[]));
        }
        let known = |n: usize| recalled(&turns, MINE, message(Some(&text(n)), &[])).0;
        assert!(known(99) && known(90) && !known(0) && !known(70));
        let none = Turns::new(0);
        none.keep(MINE, Vec::new(), turn(Some("a"), &[]));
        assert!(!recalled(&none, MINE, message(Some("a"), &[])).0);
    }
}
