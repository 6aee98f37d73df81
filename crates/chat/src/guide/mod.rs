//! Constrained decoding: what an answer may be, for the parts of it that a format gives to grammars.
//!
//! A format's guide is a small state machine over generated ids. It says for each step what the next token may be:
//! anything within reasoning and plain text (but for the control tokens that would break the format), the words of a
//! legal header, or what a grammar allows in a call's arguments and in the text for the user. Whatever a guide allows, the
//! format's parser reads as what was asked for.
//!
//! Grammars are llguidance's, over a trie of the tokenizer's ordinary tokens that is built once. All text from clients is
//! checked against bounds before it is compiled, and compiled within bounds.

mod compile;
mod grammar;
mod limits;
mod text;
mod vocabulary;
mod watch;
mod words;

use std::sync::Arc;

use ctxserve_core::{Constraint, TokenId};
use serde_json::Value;
use thiserror::Error;

pub use compile::Guides;
pub use grammar::Grammar;
pub use limits::GuideLimits;

pub(crate) use compile::{CompileError, Template};
pub(crate) use grammar::with_options;
pub(crate) use text::Text;
pub(crate) use vocabulary::Vocabulary;
pub(crate) use watch::Watch;
pub(crate) use words::{At, Part, Words};

/// A function that may be called.
#[derive(Clone, Debug, PartialEq)]
pub struct GuidedTool {
    /// Name, already checked.
    pub name: String,
    /// JSON Schema of the arguments; `None` is any object.
    pub parameters: Option<Value>,
    /// Arguments must follow the schema whenever the function is called.
    pub strict: bool,
}

/// What becomes of calls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CallRule {
    /// The model may call.
    #[default]
    Free,
    /// It may not.
    Forbidden,
    /// It has to, and what it calls has to follow the function's schema.
    Required,
}

/// What is asked of an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Demands {
    /// Functions that may be called.
    pub tools: Vec<GuidedTool>,
    /// Whether they are.
    pub calls: CallRule,
    /// At most one call.
    pub one_call: bool,
    /// What the text for the user has to be.
    pub content: Option<Grammar>,
}

impl Demands {
    /// Whether any token has to be constrained.
    pub fn is_any(&self) -> bool {
        match self.calls {
            _ if self.content.is_some() => true,
            CallRule::Free => self.tools.iter().any(|tool| tool.strict),
            CallRule::Forbidden => !self.tools.is_empty(),
            CallRule::Required => true,
        }
    }
}

/// Which part of the demands is at fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The parameters of the function with this index.
    Tool(usize),
    /// The grammar of the content.
    Content,
    /// None: this model cannot do it.
    Server,
    /// None: too much is being compiled now.
    Busy,
}

/// Demands that cannot be met.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{what}")]
pub struct GuideError {
    /// Where.
    pub fault: Fault,
    /// Why, for the client.
    pub what: String,
}

impl GuideError {
    fn new(fault: Fault, what: impl Into<String>) -> Self {
        Self { fault, what: what.into() }
    }

    pub(crate) fn unable(what: impl Into<String>) -> Self {
        Self::new(Fault::Server, what)
    }

    fn of(error: CompileError, fault: Fault) -> Self {
        match error {
            CompileError::Invalid(what) => Self::new(fault, what),
            CompileError::Busy => {
                Self::new(Fault::Busy, "too many grammars are being compiled, try again later")
            }
        }
    }
}

impl Guides {
    pub(crate) fn words(&self) -> Result<Arc<Vocabulary>, GuideError> {
        self.vocabulary().map_err(|error| GuideError::of(error, Fault::Server))
    }

    /// The grammar of the content, compiled.
    pub(crate) fn content(&self, grammar: &Grammar) -> Result<Arc<Template>, GuideError> {
        self.template(grammar).map_err(|error| GuideError::of(error, Fault::Content))
    }

    /// A grammar that this crate wrote, compiled.
    pub(crate) fn template_of(&self, grammar: &Grammar) -> Result<Arc<Template>, GuideError> {
        self.template(grammar).map_err(|error| GuideError::of(error, Fault::Server))
    }

    /// The grammar of a function's arguments, compiled; `None` where the model is free to write what it likes.
    pub(crate) fn arguments(
        &self,
        index: usize,
        tool: &GuidedTool,
        calls: CallRule,
    ) -> Result<Option<Arc<Template>>, GuideError> {
        if calls != CallRule::Required && !tool.strict {
            return Ok(None);
        }
        let template = self.template(&argument_grammar(tool));
        template.map(Some).map_err(|error| GuideError::of(error, Fault::Tool(index)))
    }

    /// A guide for an answer that is one text of this grammar, ended by any of `ends`.
    ///
    /// # Errors
    /// A grammar that cannot be used.
    pub fn plain(&self, grammar: &Grammar, ends: &[TokenId]) -> Result<Box<dyn Constraint>, GuideError> {
        let template = self.content(grammar)?;
        Ok(Box::new(text::Plain::new(Text::new(template.start(), ends.into()))))
    }
}

/// Arguments are an object, whatever else their schema says.
pub(crate) fn argument_schema(tool: &GuidedTool) -> Value {
    let mut schema = tool.parameters.clone().unwrap_or_else(|| serde_json::json!({}));
    if let Value::Object(map) = &mut schema
        && !["$ref", "allOf", "anyOf", "oneOf", "enum", "const"].iter().any(|key| map.contains_key(*key))
    {
        map.entry("type").or_insert_with(|| "object".into());
    }
    schema
}

fn argument_grammar(tool: &GuidedTool) -> Grammar {
    Grammar::Json { schema: argument_schema(tool), strict: tool.strict }
}
