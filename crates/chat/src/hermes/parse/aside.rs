//! Calls within the thinking.

use crate::{Delta, End};

use super::machine::{Machine, State};
use super::recovery as note;
use super::sink::{Kind, Sink};
use super::tags::Tag;

/// A call within the thinking counts if nothing but white space follows the thinking. Until that is known all is held.
#[derive(Debug)]
pub(super) struct Aside {
    /// As written, from the line breaks before the call's tag on.
    pub(super) raw: String,
    /// Reads the same text, as if the calls counted.
    pub(super) inner: Machine,
    pub(super) deltas: Vec<Delta>,
    /// Once the thinking has ended: the white space since.
    pub(super) closed: Option<String>,
}

impl Aside {
    pub(super) fn push(&mut self, c: char) {
        self.raw.push(c);
        self.inner.character(c, &mut Sink::new(&mut self.deltas));
    }

    /// Whether it is in plain text, where no tag has begun.
    fn is_plain(&self) -> bool {
        self.inner.tag.is_empty() && matches!(self.inner.state, State::Text)
    }
}

impl Machine {
    pub(super) fn aside_character(&mut self, c: char, sink: &mut Sink<'_>) {
        let State::Aside(aside) = &mut self.state else { return };
        match &mut aside.closed {
            None => {
                aside.push(c);
                if aside.inner.thought {
                    aside.raw.truncate(aside.raw.len() - Tag::ThinkEnd.text().len());
                    aside.closed = Some(String::new());
                    if aside.inner.calls == self.calls {
                        self.notes.append(std::mem::take(&mut aside.inner.notes));
                        sink.text(Kind::Reasoning, aside.raw.trim_end_matches('\n'));
                        self.end_thinking();
                    }
                } else if aside.inner.calls == self.calls && aside.is_plain() {
                    let raw = std::mem::take(&mut aside.raw);
                    self.notes.append(std::mem::take(&mut aside.inner.notes));
                    self.state = State::Reasoning { any: true };
                    raw.chars().for_each(|c| self.plain(c, sink));
                }
            }
            Some(space) if c.is_whitespace() => space.push(c),
            Some(space) => {
                // There is an answer: the calls were thoughts.
                let space = std::mem::take(space);
                sink.text(Kind::Reasoning, aside.raw.trim_end_matches('\n'));
                self.end_thinking();
                for c in space.chars().chain([c]) {
                    self.character(c, sink);
                }
            }
        }
    }

    pub(super) fn end_aside(&mut self, mut aside: Aside, end: End, sink: &mut Sink<'_>) {
        self.state = State::Reasoning { any: true };
        if aside.closed.is_none() {
            aside.inner.end(end, &mut Sink::new(&mut aside.deltas));
        }
        self.beheaded = aside.inner.beheaded;
        self.notes.append(std::mem::take(&mut aside.inner.notes));
        let has_calls = aside.inner.calls > self.calls;
        if has_calls || aside.inner.beheaded {
            if has_calls {
                self.notes.add(note::CALL_WHILE_THINKING);
            }
            self.calls = aside.inner.calls;
            self.whole += aside.inner.whole;
            self.unclosed = aside.inner.unclosed;
            sink.append(aside.deltas);
        } else {
            sink.text(Kind::Reasoning, aside.raw.trim_end_matches('\n'));
        }
    }
}
