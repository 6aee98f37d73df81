//! Answers of `/v1/messages` as events of a stream.

use super::messages::{Head, empty, ended, usage};
use super::messages_blocks::{BlockOptions, Blocks, Piece};
use crate::error::ApiError;
use crate::generate::choice::Step;
use crate::generate::run::Generation;
use crate::http::sse::{Frame, Framer, frame};
use crate::wire::messages_response::{EndFields, PING, StreamEvent};

/// Makes events: the start of the message, its blocks one after another, how it ended with the counts, the stop.
pub(crate) struct MessageFramer {
    head: Head,
    blocks: Blocks,
    end: EndFields,
}

impl MessageFramer {
    pub(crate) fn new(head: Head, blocks: BlockOptions) -> Self {
        Self { head, blocks: Blocks::new(blocks), end: EndFields::default() }
    }
}

fn event(event: &StreamEvent<'_>) -> Frame {
    Frame::event(event.name(), frame(event))
}

fn pieces(pieces: Vec<Piece>) -> Vec<Frame> {
    let made = pieces.into_iter().map(|piece| match piece {
        Piece::Start { index, block } => StreamEvent::ContentBlockStart { index, content_block: block },
        Piece::Delta { index, delta } => StreamEvent::ContentBlockDelta { index, delta },
        Piece::Stop { index } => StreamEvent::ContentBlockStop { index },
    });
    made.map(|made| event(&made)).collect()
}

impl Framer for MessageFramer {
    fn first(&mut self, generation: &Generation) -> Vec<Frame> {
        vec![event(&StreamEvent::MessageStart { message: empty(&self.head, usage(generation)) })]
    }

    fn step(&mut self, choice: usize, step: Step, generation: &Generation) -> Vec<Frame> {
        let mut made = Vec::new();
        for delta in step.deltas {
            self.blocks.push(delta, |call| generation.call_id(choice, call).to_owned(), &mut made);
        }
        if let Some(end) = step.end {
            self.blocks.close(&mut made);
            self.end = ended(Some(&end));
        }
        pieces(made)
    }

    fn last(&mut self, generation: &Generation) -> Vec<Frame> {
        let delta = std::mem::take(&mut self.end);
        let end = StreamEvent::MessageDelta { delta, usage: usage(generation) };
        vec![event(&end), event(&StreamEvent::MessageStop)]
    }

    fn error(&mut self, error: &ApiError) -> Vec<Frame> {
        vec![Frame::event("error", error.to_anthropic(&self.head.http_id))]
    }

    fn ping(&self) -> Option<Frame> {
        let (name, data) = PING;
        Some(Frame::event(name, data.to_owned()))
    }
}
