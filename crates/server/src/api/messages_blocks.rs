//! The content of an answer in blocks, one after another. Whole and streamed answers are made of the same pieces.

use std::collections::BTreeSet;

use ctxserve_chat::Delta;
use serde_json::value::RawValue;

use crate::wire::messages_opaque::{input, sign};
use crate::wire::messages_response::{BlockDelta, ContentBlock};

/// A step of the content. A block starts, grows and stops before the next one starts.
#[derive(Clone, Debug)]
pub(crate) enum Piece {
    Start { index: usize, block: ContentBlock },
    Delta { index: usize, delta: BlockDelta },
    Stop { index: usize },
}

/// How blocks are made.
#[derive(Clone, Debug, Default)]
pub(crate) struct BlockOptions {
    /// Tools whose arguments are passed on as they come, whatever they are.
    pub(crate) eager: BTreeSet<String>,
    /// Thinking stands in the signature alone.
    pub(crate) omit_thinking: bool,
}

/// Deltas in, pieces out.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    options: BlockOptions,
    open: Option<Open>,
    /// Index of the open block, else of the next one.
    index: usize,
}

#[derive(Debug)]
enum Open {
    /// With the thinking that was left out.
    Thinking(String),
    Text,
    Call {
        call: usize,
        /// `None` where they are passed on.
        arguments: Option<String>,
    },
}

impl Blocks {
    pub(crate) fn new(options: BlockOptions) -> Self {
        Self { options, ..Self::default() }
    }

    /// Takes a delta; `id` names the call that it starts.
    pub(crate) fn push(&mut self, delta: Delta, id: impl FnOnce(usize) -> String, out: &mut Vec<Piece>) {
        match delta {
            Delta::Reasoning(text) => self.thinking(text, out),
            Delta::Content(text) => self.text(text, out),
            Delta::CallStart { index, name } => {
                self.close(out);
                let arguments = (!self.options.eager.contains(&name)).then(String::new);
                let block = ContentBlock::ToolUse { id: id(index), name, input: empty() };
                self.start(Open::Call { call: index, arguments }, block, out);
            }
            Delta::CallArguments { index, text } => match &mut self.open {
                Some(Open::Call { call, arguments }) if *call == index => match arguments {
                    Some(arguments) => arguments.push_str(&text),
                    None => out.push(self.delta(BlockDelta::Input { partial_json: text })),
                },
                // Never lose what the model wrote.
                _ => self.text(text, out),
            },
            Delta::CallEnd { index } => {
                if matches!(&self.open, Some(Open::Call { call, .. }) if *call == index) {
                    self.close(out);
                }
            }
        }
    }

    /// Stops the open block, if there is one.
    pub(crate) fn close(&mut self, out: &mut Vec<Piece>) {
        let last = match self.open.take() {
            None => return,
            Some(Open::Text | Open::Call { arguments: None, .. }) => None,
            Some(Open::Thinking(omitted)) => Some(BlockDelta::Signature { signature: sign(&omitted) }),
            Some(Open::Call { arguments: Some(arguments), .. }) => {
                Some(BlockDelta::Input { partial_json: input(arguments) })
            }
        };
        out.extend(last.map(|delta| self.delta(delta)));
        out.push(Piece::Stop { index: self.index });
        self.index += 1;
    }

    fn thinking(&mut self, text: String, out: &mut Vec<Piece>) {
        if text.is_empty() {
            return;
        }
        if !matches!(self.open, Some(Open::Thinking(_))) {
            self.close(out);
            let block = ContentBlock::Thinking { thinking: String::new(), signature: String::new() };
            self.start(Open::Thinking(String::new()), block, out);
        }
        match &mut self.open {
            Some(Open::Thinking(omitted)) if self.options.omit_thinking => omitted.push_str(&text),
            _ => out.push(self.delta(BlockDelta::Thinking { thinking: text })),
        }
    }

    fn text(&mut self, text: String, out: &mut Vec<Piece>) {
        if text.is_empty() {
            return;
        }
        if !matches!(self.open, Some(Open::Text)) {
            self.close(out);
            let block = ContentBlock::Text { text: String::new(), citations: None };
            self.start(Open::Text, block, out);
        }
        out.push(self.delta(BlockDelta::Text { text }));
    }

    fn start(&mut self, open: Open, block: ContentBlock, out: &mut Vec<Piece>) {
        self.open = Some(open);
        out.push(Piece::Start { index: self.index, block });
    }

    fn delta(&self, delta: BlockDelta) -> Piece {
        Piece::Delta { index: self.index, delta }
    }
}

/// Pieces put together, as clients do.
pub(crate) fn whole(pieces: Vec<Piece>) -> Vec<ContentBlock> {
    let mut blocks: Vec<ContentBlock> = Vec::new();
    for piece in pieces {
        match (piece, blocks.last_mut()) {
            (Piece::Start { block, .. }, _) => blocks.push(block),
            (Piece::Delta { delta, .. }, Some(block)) => grow(block, delta),
            (Piece::Delta { .. } | Piece::Stop { .. }, _) => {}
        }
    }
    blocks
}

fn grow(block: &mut ContentBlock, delta: BlockDelta) {
    match (block, delta) {
        (ContentBlock::Thinking { thinking, .. }, BlockDelta::Thinking { thinking: more }) => {
            thinking.push_str(&more);
        }
        (ContentBlock::Thinking { signature, .. }, BlockDelta::Signature { signature: whole }) => {
            *signature = whole;
        }
        (ContentBlock::Text { text, .. }, BlockDelta::Text { text: more }) => text.push_str(&more),
        (ContentBlock::ToolUse { input, .. }, BlockDelta::Input { partial_json }) => {
            *input = RawValue::from_string(partial_json).unwrap_or_else(|_| empty());
        }
        _ => {}
    }
}

fn empty() -> Box<RawValue> {
    RawValue::from_string("{}".to_owned()).unwrap_or_else(|_| RawValue::NULL.to_owned())
}
