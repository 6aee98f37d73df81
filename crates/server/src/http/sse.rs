//! Event streams: frames in, `[DONE]` at the end, comments while nothing comes.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;

use crate::error::ApiError;
use crate::generate::choice::Step;
use crate::generate::run::Generation;

/// Turns steps into frames of one API.
pub(crate) trait Framer: Send + 'static {
    /// JSON texts of the frames that a step of a choice makes; there may be none.
    fn step(&mut self, index: usize, step: Step, generation: &Generation) -> Vec<String>;

    /// Frames after the last choice has ended.
    fn last(&mut self, generation: &Generation) -> Vec<String>;
}

enum Phase {
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
            if matches!(self.phase, Phase::Done) {
                return None;
            }
            let frames = match self.generation.next().await {
                Some(Ok((index, step))) => self.framer.step(index, step, &self.generation),
                Some(Err(error)) => self.end(vec![error.to_json()]),
                None => {
                    let last = self.framer.last(&self.generation);
                    self.end(last)
                }
            };
            self.ready.extend(frames.into_iter().map(|frame| Event::default().data(frame)));
        }
    }

    fn end(&mut self, mut frames: Vec<String>) -> Vec<String> {
        self.phase = Phase::Done;
        frames.push("[DONE]".to_owned());
        frames
    }
}

/// The response. Its headers leave at once; dropping its body cancels the generation.
pub(crate) fn respond<F: Framer>(generation: Generation, framer: F, keep_alive: Duration) -> Response {
    let source = Source { generation, framer, ready: VecDeque::new(), phase: Phase::Running };
    let keep_alive = KeepAlive::new().interval(keep_alive).text("keep-alive");
    let mut response = Sse::new(stream::unfold(source, Source::next)).keep_alive(keep_alive).into_response();
    // nginx would otherwise gather the stream.
    let off = axum::http::HeaderValue::from_static("no");
    response.headers_mut().insert("x-accel-buffering", off);
    response
}

/// JSON text of a frame; an error frame should that ever fail.
pub(crate) fn frame(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|error| ApiError::internal(error.to_string()).to_json())
}
