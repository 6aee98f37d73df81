//! ChatML turns rendered by a chat template, and calls in `<tool_call>` tags: the protocol of Qwen3 and FastContext.

mod guide;
pub mod parse;
mod render;
mod replay;
mod tokens;

use std::sync::Arc;

use ctxserve_core::{Constraint, TokenId};

use crate::guide::{Demands, GuideError, Guides};
use crate::{
    ChatFormat, Conversation, FormatError, ParserOptions, PromptFiles, RenderError, Rendered, StreamParser,
    Tokenizer,
};

pub use tokens::HermesTokens;

use guide::Thinking;
use render::Renderer;

/// The format's name in profiles and flags.
pub const NAME: &str = "hermes";

/// Where the thinking of the answer to come is looked for: behind the last turn's start, within so many tokens.
const TURN_HEAD: usize = 64;

/// The format on a tokenizer that has its control tokens.
pub struct Hermes {
    tokenizer: Arc<Tokenizer>,
    tokens: HermesTokens,
    renderer: Renderer,
}

impl Hermes {
    /// Binds the format. Without a chat template among the files, that of Qwen3's Instruct models is used.
    ///
    /// # Errors
    /// [`FormatError::MissingToken`], and [`FormatError::Template`] for a template that does not compile.
    pub fn new(tokenizer: Arc<Tokenizer>, files: &PromptFiles) -> Result<Self, FormatError> {
        let tokens = HermesTokens::new(&tokenizer)?;
        let renderer = Renderer::new(files, &tokenizer)?;
        Ok(Self { tokenizer, tokens, renderer })
    }
}

impl Hermes {
    /// What the head of the answer's turn says of thinking.
    fn thinking(&self, prompt: &[TokenId]) -> Thinking {
        let text = self.tokenizer.decode(self.turn_head(prompt), false);
        match (text.rfind(parse::THINK), text.rfind(parse::THINK_END)) {
            (open, close) if open > close => Thinking::Open,
            (_, Some(_)) => Thinking::Over,
            (_, None) => Thinking::Possible,
        }
    }
}

impl ChatFormat for Hermes {
    fn name(&self) -> &'static str {
        NAME
    }

    fn render_turns(&self, conversation: &Conversation, open_turn: bool) -> Result<Rendered, RenderError> {
        let ids = self.renderer.render(conversation, &self.tokenizer, open_turn)?;
        Ok(replay::splice(ids, conversation, &self.tokenizer, &self.tokens))
    }

    fn turn_head<'a>(&self, prompt: &'a [TokenId]) -> &'a [TokenId] {
        let tail = &prompt[prompt.len().saturating_sub(TURN_HEAD)..];
        let start = tail.iter().rposition(|id| *id == self.tokens.start);
        start.map_or(&[], |start| &tail[start + 1..])
    }

    fn leaves_thinking_open(&self, prompt: &[TokenId]) -> bool {
        self.thinking(prompt) == Thinking::Open
    }

    fn template_arguments(&self) -> &[String] {
        self.renderer.arguments()
    }

    fn stop_ids(&self) -> &[TokenId] {
        self.tokens.stop_ids()
    }

    fn parser(&self, options: ParserOptions) -> Box<dyn StreamParser> {
        Box::new(parse::HermesParser::new(Arc::clone(&self.tokenizer), self.tokens.clone(), options))
    }

    fn guide(
        &self,
        guides: &Guides,
        demands: &Demands,
        prompt: &[TokenId],
    ) -> Result<Box<dyn Constraint>, GuideError> {
        let thinking = self.thinking(prompt);
        let guide = guide::HermesGuide::new(&self.tokenizer, &self.tokens, guides, demands, thinking)?;
        Ok(Box::new(guide))
    }
}
