//! Harmony, the chat protocol of gpt-oss and Context-1.

mod guide;
pub mod parse;
mod prompt;
mod render;
mod replay;
mod tokens;
mod typescript;

use std::sync::Arc;

use ctxserve_core::{Constraint, TokenId};

use crate::guide::{Demands, GuideError, Guides};
use crate::{
    ChatFormat, Conversation, FormatError, ParserOptions, RenderError, Rendered, StreamParser, Tokenizer,
};

pub use tokens::HarmonyTokens;

/// The format's name in profiles and flags.
pub const NAME: &str = "harmony";

/// Harmony on a tokenizer that has its control tokens.
pub struct Harmony {
    tokenizer: Arc<Tokenizer>,
    tokens: HarmonyTokens,
}

impl Harmony {
    /// Binds the format.
    ///
    /// # Errors
    /// [`FormatError::MissingToken`].
    pub fn new(tokenizer: Arc<Tokenizer>) -> Result<Self, FormatError> {
        let tokens = HarmonyTokens::new(&tokenizer)?;
        Ok(Self { tokenizer, tokens })
    }
}

impl ChatFormat for Harmony {
    fn name(&self) -> &'static str {
        NAME
    }

    fn render_turns(&self, conversation: &Conversation, open_turn: bool) -> Result<Rendered, RenderError> {
        let mut rendered = render::render(conversation, &self.tokenizer, &self.tokens)?;
        if open_turn {
            render::open_turn(&self.tokenizer, &self.tokens, &mut rendered.ids);
        }
        Ok(rendered)
    }

    fn stop_ids(&self) -> &[TokenId] {
        self.tokens.stop_ids()
    }

    fn parser(&self, options: ParserOptions) -> Box<dyn StreamParser> {
        Box::new(parse::HarmonyParser::new(Arc::clone(&self.tokenizer), self.tokens.clone(), options))
    }

    fn guide(
        &self,
        guides: &Guides,
        demands: &Demands,
        _prompt: &[TokenId],
    ) -> Result<Box<dyn Constraint>, GuideError> {
        Ok(Box::new(guide::HarmonyGuide::new(&self.tokens, guides, demands)?))
    }
}
