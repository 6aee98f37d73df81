//! The answer to one sequence, and why a submission can be refused.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use ctxserve_core::{Event, FinishReason, TokenId, Usage};
use futures_util::Stream;
use thiserror::Error;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Why a submission was refused. Nothing of it was queued.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SubmitError {
    /// The queue has no room now; trying later can succeed.
    #[error("the queue is full: {queued} {unit} in it, {limit} allowed; retry in {} s", retry_after.as_secs())]
    QueueFull {
        /// When room is likely, from the recent pace of finished sequences; whole seconds, at least one.
        retry_after: Duration,
        /// How much is in flight, in `unit`.
        queued: usize,
        /// How much may be, in `unit`.
        limit: usize,
        /// `sequences` or `prompt tokens`.
        unit: &'static str,
    },
    /// More sequences at once than even an empty engine takes.
    #[error("{count} sequences in one request, at most {limit} are accepted")]
    TooMany {
        /// Sequences submitted together.
        count: usize,
        /// Most that could ever be accepted.
        limit: usize,
    },
    /// The prompt leaves no room for an answer.
    #[error("the prompt has {prompt} tokens; with room for one answer token the context holds {max}")]
    TooLong {
        /// Prompt tokens.
        prompt: usize,
        /// Most prompt tokens plus answer tokens.
        max: usize,
    },
    /// The engine is shutting down.
    #[error("the server is shutting down")]
    Draining,
    /// The device failed.
    #[error("the engine has failed: {0}")]
    Faulted(String),
    /// A prompt without tokens.
    #[error("the prompt is empty")]
    Empty,
    /// An id that the model has no row for.
    #[error("token id {id} is outside the vocabulary of {vocab}")]
    TokenOutOfRange {
        /// The id.
        id: TokenId,
        /// Width of the logits.
        vocab: usize,
    },
}

/// Events of one sequence; ends after [`Event::Finished`], which comes exactly once. Dropping it cancels the
/// sequence: its pages are free again before the next step.
#[derive(Debug)]
pub struct EventStream {
    events: UnboundedReceiver<Event>,
    finished: bool,
}

impl EventStream {
    /// A stream and the engine's end of it. At most `max_tokens + 2` events are ever sent, which bounds the channel.
    pub(crate) fn channel() -> (UnboundedSender<Event>, Self) {
        let (sender, events) = unbounded_channel();
        (sender, Self { events, finished: false })
    }

    /// The next event, for callers outside an async runtime; `None` after the end.
    pub fn blocking_next(&mut self) -> Option<Event> {
        if self.finished {
            return None;
        }
        let event = self.events.blocking_recv();
        Some(self.take(event))
    }

    /// An engine that vanished without a word has failed: the end is never silent.
    fn take(&mut self, event: Option<Event>) -> Event {
        let event = event.unwrap_or_else(|| Event::Finished {
            reason: FinishReason::Fault("the engine thread is gone".to_owned()),
            usage: Usage::default(),
        });
        self.finished = matches!(event, Event::Finished { .. });
        event
    }
}

impl Stream for EventStream {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Event>> {
        if self.finished {
            return Poll::Ready(None);
        }
        let event = std::task::ready!(self.events.poll_recv(cx));
        Poll::Ready(Some(self.take(event)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_engine_still_ends_the_stream_once() {
        let (sender, mut stream) = EventStream::channel();
        sender.send(Event::Admitted).unwrap();
        drop(sender);
        assert_eq!(stream.blocking_next(), Some(Event::Admitted));
        let end = stream.blocking_next();
        assert!(matches!(end, Some(Event::Finished { reason: FinishReason::Fault(_), .. })), "{end:?}");
        assert_eq!(stream.blocking_next(), None);
    }
}
