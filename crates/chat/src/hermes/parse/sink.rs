//! Deltas in the making.

use crate::Delta;

/// Where plain text goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Content,
    Reasoning,
}

/// Appends deltas; text of one kind that comes together is one delta.
pub(super) struct Sink<'a> {
    deltas: &'a mut Vec<Delta>,
    /// What was there before is left as it is.
    from: usize,
}

impl<'a> Sink<'a> {
    pub(super) fn new(deltas: &'a mut Vec<Delta>) -> Self {
        let from = deltas.len();
        Self { deltas, from }
    }

    pub(super) fn text(&mut self, kind: Kind, text: &str) {
        if text.is_empty() {
            return;
        }
        match (kind, self.deltas.get_mut(self.from..).and_then(<[Delta]>::last_mut)) {
            (Kind::Content, Some(Delta::Content(last))) | (Kind::Reasoning, Some(Delta::Reasoning(last))) => {
                last.push_str(text);
            }
            (Kind::Content, _) => self.deltas.push(Delta::Content(text.to_owned())),
            (Kind::Reasoning, _) => self.deltas.push(Delta::Reasoning(text.to_owned())),
        }
    }

    pub(super) fn start(&mut self, index: usize, name: String) {
        self.deltas.push(Delta::CallStart { index, name });
    }

    pub(super) fn arguments(&mut self, of: usize, text: &str) {
        if text.is_empty() {
            return;
        }
        match self.deltas.get_mut(self.from..).and_then(<[Delta]>::last_mut) {
            Some(Delta::CallArguments { index, text: last }) if *index == of => last.push_str(text),
            _ => self.deltas.push(Delta::CallArguments { index: of, text: text.to_owned() }),
        }
    }

    pub(super) fn end(&mut self, index: usize) {
        self.deltas.push(Delta::CallEnd { index });
    }

    pub(super) fn append(&mut self, deltas: Vec<Delta>) {
        self.deltas.extend(deltas);
    }
}
