//! What is written down of a choice in a conversation while it is generated.

use std::sync::Arc;

use ctxserve_chat::{Collector, Delta, Generated, Outcome};
use ctxserve_core::TokenId;

use crate::http::guard::Tenant;
use crate::state::ServerState;

/// Names a choice's calls, and keeps its turn for later prompts if it ends well.
pub(crate) struct Scribe {
    state: ServerState,
    tenant: Tenant,
    /// How ids of calls begin.
    call_prefix: &'static str,
    /// End of the prompt, as the format's turns begin.
    head: Box<[TokenId]>,
    ids: Vec<TokenId>,
    said: Collector,
    call_ids: Vec<String>,
}

impl Scribe {
    /// Of an answer to `prompt`.
    pub(crate) fn new(
        state: ServerState,
        tenant: Tenant,
        call_prefix: &'static str,
        prompt: &Arc<[TokenId]>,
    ) -> Self {
        let head = state.format().turn_head(prompt).into();
        Self {
            state,
            tenant,
            call_prefix,
            head,
            ids: Vec::new(),
            said: Collector::default(),
            call_ids: Vec::new(),
        }
    }

    /// Takes a sampled id.
    pub(crate) fn token(&mut self, id: TokenId) {
        self.ids.push(id);
    }

    /// Takes what the parser made of them, before anything is left out of the answer.
    pub(crate) fn deltas(&mut self, deltas: &[Delta]) {
        deltas.iter().for_each(|delta| self.said.add(delta));
    }

    /// The client is told of another call.
    pub(crate) fn call(&mut self) {
        self.call_ids.push(self.state.random_name(self.call_prefix));
    }

    /// The id of a call that the client was told of.
    pub(crate) fn call_id(&self, index: usize) -> &str {
        self.call_ids.get(index).map_or("", String::as_str)
    }

    /// The choice ended, and nothing of it was left out but reasoning. Malformed turns, and those that no token of the format
    /// ended, are forgotten.
    pub(crate) fn ended(&mut self, outcome: &Outcome) {
        let said = std::mem::take(&mut self.said).into_message();
        let ids = std::mem::take(&mut self.ids);
        let is_over = ids.last().is_some_and(|id| self.state.format().stop_ids().contains(id));
        if is_over && outcome.recoveries.is_empty() && said.calls.len() == self.call_ids.len() {
            let turn = Generated { said, head: std::mem::take(&mut self.head), ids: ids.into() };
            self.state.turns().keep(self.tenant, self.call_ids.clone(), turn);
        }
    }
}
