//! The protocol seam: rendering prompts and parsing answers.

use std::sync::Arc;

use ctxserve_core::{Constraint, TokenId};
use thiserror::Error;

use crate::Conversation;
use crate::guide::{Demands, GuideError, Guides};

/// A conversation that cannot be rendered: the client's mistake.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{}{what}", message.map(|index| format!("messages[{index}]: ")).unwrap_or_default())]
pub struct RenderError {
    /// Index of the message at fault, if it is one.
    pub message: Option<usize>,
    /// What is wrong.
    pub what: String,
}

/// A format that does not fit the tokenizer.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum FormatError {
    /// No such format.
    #[error("unknown chat format {name:?}; known: {known}")]
    Unknown {
        /// As asked for.
        name: String,
        /// Comma-separated.
        known: String,
    },
    /// The tokenizer lacks a control token.
    #[error("chat format {format} needs the token {token}, which the tokenizer does not have")]
    MissingToken {
        /// The format.
        format: &'static str,
        /// The token's text.
        token: &'static str,
    },
    /// The chat template cannot be used.
    #[error("the chat template cannot be used: {what}")]
    Template {
        /// Why.
        what: String,
    },
}

/// A piece of a message, in the order in which it became certain. Text is whole characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delta {
    /// Reasoning text.
    Reasoning(String),
    /// Text for the user.
    Content(String),
    /// A call begins: its name, whole.
    CallStart {
        /// Counts calls from 0.
        index: usize,
        /// Clean function name.
        name: String,
    },
    /// More of a call's arguments.
    CallArguments {
        /// Which call.
        index: usize,
        /// Text.
        text: String,
    },
    /// A call is complete (not cut).
    CallEnd {
        /// Which call.
        index: usize,
    },
}

/// Where a token's text belongs, known as the token arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Control tokens and headers.
    Markup,
    /// Reasoning.
    Reasoning,
    /// Text for the user.
    Content,
    /// A call's arguments.
    Arguments,
}

/// Why no more tokens come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A stop token, which has been pushed too, or a stop string.
    Stop,
    /// Cut by `max_tokens`, the context, or a cancel.
    Cut,
}

/// The finish reason of the parsed message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// `stop`
    Stop,
    /// `tool_calls`
    ToolCalls,
    /// `length`
    Length,
}

impl Finish {
    /// The API spelling.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::ToolCalls => "tool_calls",
            Self::Length => "length",
        }
    }
}

/// What remains to be said at the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Finish reason.
    pub finish: Finish,
    /// Fixed names of the recoveries that malformed output made necessary, in order, without repeats.
    pub recoveries: Vec<&'static str>,
}

/// How a parser reads an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParserOptions {
    /// Calls become [`Delta::CallStart`] and so on; otherwise their text is content (`tool_choice: "none"`).
    pub calls: bool,
    /// Names of the functions on offer; `None` is not known. Formats whose calls are marked by text alone take a call
    /// of any other function for text.
    pub tools: Option<Arc<[String]>>,
    /// The answer begins within the thinking: see [`ChatFormat::leaves_thinking_open`].
    pub thinking: bool,
}

impl Default for ParserOptions {
    fn default() -> Self {
        Self { calls: true, tools: None, thinking: false }
    }
}

/// Turns generated ids into deltas. Total: every sequence of ids yields a message, no id is an error, and the
/// result does not depend on how the sequence was cut into pushes.
pub trait StreamParser: Send {
    /// Takes one id, appends what it made certain, and says where the id's own text belongs.
    fn push(&mut self, id: TokenId, out: &mut Vec<Delta>) -> Place;

    /// Releases what was held back and ends the message. Call once.
    fn finish(&mut self, end: End, out: &mut Vec<Delta>) -> Outcome;
}

/// A rendered conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The prompt.
    pub ids: Vec<TokenId>,
    /// Turns of the assistant that are repeated as the model wrote them.
    pub replayed: usize,
}

/// A chat protocol bound to a tokenizer.
pub trait ChatFormat: Send + Sync {
    /// Its name in profiles and flags.
    fn name(&self) -> &'static str;

    /// The prompt; `open_turn`: ending where the assistant's turn begins.
    ///
    /// # Errors
    /// A message that the format cannot express.
    fn render_turns(&self, conversation: &Conversation, open_turn: bool) -> Result<Rendered, RenderError>;

    /// Prompt ids, ending where the assistant's turn begins.
    ///
    /// # Errors
    /// A message that the format cannot express.
    fn render(&self, conversation: &Conversation) -> Result<Vec<TokenId>, RenderError> {
        Ok(self.render_turns(conversation, true)?.ids)
    }

    /// As [`ChatFormat::render`], without opening the assistant's turn.
    ///
    /// # Errors
    /// A message that the format cannot express.
    fn render_history(&self, conversation: &Conversation) -> Result<Vec<TokenId>, RenderError> {
        Ok(self.render_turns(conversation, false)?.ids)
    }

    /// The end of a prompt of [`ChatFormat::render`] that belongs to the answer's turn and may differ between prompts: what
    /// a [`crate::Generated`] keeps.
    fn turn_head<'a>(&self, prompt: &'a [TokenId]) -> &'a [TokenId] {
        let _ = prompt;
        &[]
    }

    /// Whether a prompt of [`ChatFormat::render`] ends within the thinking, so that the answer goes on with it.
    fn leaves_thinking_open(&self, prompt: &[TokenId]) -> bool {
        let _ = prompt;
        false
    }

    /// Names that the chat template reads from [`Conversation::template_arguments`].
    fn template_arguments(&self) -> &[String] {
        &[]
    }

    /// Ids that end the assistant's turn, whatever the checkpoint's files say.
    fn stop_ids(&self) -> &[TokenId];

    /// A parser for an answer to a prompt of [`ChatFormat::render`].
    fn parser(&self, options: ParserOptions) -> Box<dyn StreamParser>;

    /// A guide for an answer to `prompt`, of [`ChatFormat::render`], that holds it to `demands`. What it allows, the
    /// format's parser reads as what was demanded.
    ///
    /// # Errors
    /// A schema or grammar that cannot be used.
    fn guide(
        &self,
        guides: &Guides,
        demands: &Demands,
        prompt: &[TokenId],
    ) -> Result<Box<dyn Constraint>, GuideError>;
}
