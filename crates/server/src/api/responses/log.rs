//! Events of one response, numbered.

use crate::http::sse::{Frame, frame};
use crate::wire::responses_response::{EventBody, WireEvent};

/// Numbers events and keeps them until they are taken. One that is off only drops them: a whole answer needs none.
#[derive(Debug, Default)]
pub(super) struct Log {
    next: u64,
    frames: Option<Vec<Frame>>,
}

impl Log {
    /// One that keeps events.
    pub(super) fn on() -> Self {
        Self { next: 0, frames: Some(Vec::new()) }
    }

    pub(super) fn is_on(&self) -> bool {
        self.frames.is_some()
    }

    /// Adds an event.
    pub(super) fn emit(&mut self, kind: &'static str, body: EventBody<'_>) {
        if let Some(frames) = &mut self.frames {
            let event = WireEvent { kind, sequence_number: self.next, body };
            self.next += 1;
            frames.push(Frame::event(kind, frame(&event)));
        }
    }

    /// What has come since the last time.
    pub(super) fn take(&mut self) -> Vec<Frame> {
        self.frames.as_mut().map(std::mem::take).unwrap_or_default()
    }
}
