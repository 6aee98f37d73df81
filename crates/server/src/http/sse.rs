//! Event streams: frames of a route, and something while nothing comes.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt, stream};

use crate::error::ApiError;
use crate::generate::choice::Step;
use crate::generate::run::Generation;

/// One frame of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    /// For APIs whose clients tell events apart by it.
    event: Option<&'static str>,
    data: String,
}

impl Frame {
    /// Without a name.
    pub(crate) fn data(data: String) -> Self {
        Self { event: None, data }
    }

    /// An event with a name.
    pub(crate) fn event(name: &'static str, data: String) -> Self {
        Self { event: Some(name), data }
    }

    /// Bytes of its text.
    pub(crate) fn len(&self) -> usize {
        self.data.len()
    }

    fn into_event(self) -> Event {
        // In this order on the wire, as both services send it.
        let event = self.event.map_or_else(Event::default, |name| Event::default().event(name));
        event.data(self.data)
    }
}

/// What ends a stream of OpenAI's older APIs, whether it succeeded or not.
pub(crate) fn done() -> Frame {
    Frame::data("[DONE]".to_owned())
}

/// Turns steps into frames of one API.
pub(crate) trait Framer: Send + 'static {
    /// Frames that leave with the headers.
    fn first(&mut self, generation: &Generation) -> Vec<Frame> {
        let _ = generation;
        Vec::new()
    }

    /// Frames that a step of a choice makes; there may be none.
    fn step(&mut self, index: usize, step: Step, generation: &Generation) -> Vec<Frame>;

    /// Frames after the last choice has ended.
    fn last(&mut self, generation: &Generation) -> Vec<Frame>;

    /// Frames after which a failed stream ends.
    fn error(&mut self, error: &ApiError) -> Vec<Frame> {
        vec![Frame::data(error.to_json()), done()]
    }

    /// What is sent while nothing comes; a comment unless the API has an event for it.
    fn ping(&self) -> Option<Frame> {
        None
    }
}

enum Phase {
    New,
    Running,
    Done,
}

struct Source<F> {
    generation: Generation,
    framer: F,
    ready: VecDeque<Event>,
    phase: Phase,
}

impl<F: Framer> Source<F> {
    async fn next(mut self) -> Option<(Result<Event, Infallible>, Self)> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some((Ok(event), self));
            }
            let frames = match self.phase {
                Phase::Done => return None,
                Phase::New => {
                    self.phase = Phase::Running;
                    self.framer.first(&self.generation)
                }
                Phase::Running => self.step().await,
            };
            self.ready.extend(frames.into_iter().map(Frame::into_event));
        }
    }

    async fn step(&mut self) -> Vec<Frame> {
        match self.generation.next().await {
            Some(Ok((index, step))) => self.framer.step(index, step, &self.generation),
            Some(Err(error)) => {
                self.phase = Phase::Done;
                self.framer.error(&error)
            }
            None => {
                self.phase = Phase::Done;
                self.framer.last(&self.generation)
            }
        }
    }
}

/// The response. Its headers leave at once; dropping its body cancels the generation.
pub(crate) fn respond<F: Framer>(generation: Generation, framer: F, keep_alive: Duration) -> Response {
    let keep_alive = KeepAlive::new().interval(keep_alive);
    let keep_alive = match framer.ping() {
        Some(ping) => keep_alive.event(ping.into_event()),
        None => keep_alive.text("keep-alive"),
    };
    let source = Source { generation, framer, ready: VecDeque::new(), phase: Phase::New };
    with_headers(Sse::new(stream::unfold(source, Source::next)).keep_alive(keep_alive).into_response())
}

/// The response of a stream that needs no generation of its own.
pub(crate) fn stream(frames: impl Stream<Item = Frame> + Send + 'static, keep_alive: Duration) -> Response {
    let keep_alive = KeepAlive::new().interval(keep_alive).text("keep-alive");
    let events = frames.map(|frame| Ok::<_, Infallible>(frame.into_event()));
    with_headers(Sse::new(events).keep_alive(keep_alive).into_response())
}

fn with_headers(mut response: Response) -> Response {
    // nginx would otherwise gather the stream.
    let off = axum::http::HeaderValue::from_static("no");
    response.headers_mut().insert("x-accel-buffering", off);
    response
}

/// JSON text of a frame; an error frame should that ever fail.
pub(crate) fn frame(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|error| ApiError::internal(error.to_string()).to_json())
}
