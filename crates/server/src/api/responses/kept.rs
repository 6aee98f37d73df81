//! From finished answers to the store.

use std::sync::Arc;

use super::answer::Answer;
use super::live::Live;
use crate::http::sse::frame;
use crate::state::ServerState;
use crate::store::{Body, Link, Owner, StoredItem};

/// How a response is to be stored.
#[derive(Clone, Debug)]
pub(super) struct Keep {
    pub(super) owner: Owner,
    pub(super) previous: Option<Arc<Link>>,
    pub(super) input: Vec<StoredItem>,
}

impl Keep {
    fn done(self, state: &ServerState, answer: &Answer) -> (Arc<str>, Arc<Link>) {
        let output = answer
            .output()
            .iter()
            .map(|item| StoredItem { id: item.id().to_owned(), json: frame(item).into() });
        let link = state.responses().link(self.previous, self.input, output.collect());
        (frame(&answer.response()).into(), link)
    }

    /// Stores a finished response.
    pub(super) fn store(self, state: &ServerState, answer: &Answer) {
        let owner = self.owner;
        let (json, link) = self.done(state, answer);
        state.responses().put(owner, answer.id(), Body::Done(json, None), 0, link);
    }

    /// Stores a response that has yet to run.
    pub(super) fn store_live(&self, state: &ServerState, id: &str, live: Arc<Live>) {
        let link = state.responses().link(self.previous.clone(), self.input.clone(), Vec::new());
        state.responses().put(self.owner, id, Body::Live(live), 0, link);
    }

    /// Stores it when it has run, unless it was deleted. `kept` is what its events take, in bytes.
    pub(super) fn store_run(
        self,
        state: &ServerState,
        answer: &Answer,
        live: Option<Arc<Live>>,
        kept: usize,
    ) {
        let owner = self.owner;
        let (json, link) = self.done(state, answer);
        state.responses().replace(owner, answer.id(), Body::Done(json, live), kept, link);
    }
}
