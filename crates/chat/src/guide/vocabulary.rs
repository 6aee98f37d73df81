//! A tokenizer's vocabulary as masks are computed over it: by bytes.

use std::sync::Arc;

use ctxserve_core::{TokenId, TokenMask};
use llguidance::ParserFactory;
use llguidance::earley::SlicedBiasComputer;
use toktrie::{InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenizerEnv};

use crate::Tokenizer;

use super::limits::parser_limits;

/// Longer tokens are never allowed by a mask; none is known to be.
const LONGEST_TOKEN: usize = 512;

/// The tokens that stand for text, and the trie that grammars walk. Built once for a tokenizer.
pub(crate) struct Vocabulary {
    /// Ids of ordinary tokens, in the order of their bytes.
    sorted: Vec<TokenId>,
    tokenizer: Arc<Tokenizer>,
    factory: ParserFactory,
}

impl Vocabulary {
    /// Builds it: a fraction of a second for 200,000 tokens.
    ///
    /// # Errors
    /// A vocabulary that the trie cannot hold.
    pub(crate) fn new(tokenizer: Arc<Tokenizer>) -> Result<Self, String> {
        let is_text = |id: &TokenId| text_of(&tokenizer, *id).is_some();
        let mut sorted: Vec<TokenId> = (0..tokenizer.len() as TokenId).filter(is_text).collect();
        sorted.sort_unstable_by_key(|&id| (tokenizer.token_bytes(id).unwrap_or_default(), id));
        let env: TokEnv = Arc::new(Env::new(&tokenizer));
        let slices = SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices)
            .map_err(|error| error.to_string())?;
        factory.quiet();
        *factory.limits_mut() = parser_limits();
        Ok(Self { sorted, tokenizer, factory })
    }

    pub(crate) fn factory(&self) -> &ParserFactory {
        &self.factory
    }

    /// Highest id + 1.
    pub(crate) fn len(&self) -> usize {
        self.tokenizer.len()
    }

    /// A mask of its width that allows nothing.
    pub(crate) fn nothing(&self) -> TokenMask {
        TokenMask::none(self.len())
    }

    /// Bytes of an ordinary token; `None` for control tokens and ids without a token.
    pub(crate) fn text(&self, id: TokenId) -> Option<&[u8]> {
        text_of(&self.tokenizer, id)
    }

    /// Id of a control token by its text.
    pub(crate) fn control(&self, text: &str) -> Option<TokenId> {
        self.tokenizer.special_id(text)
    }

    /// The ordinary tokens that begin with `prefix`, shortest first among those that agree.
    pub(crate) fn beginning_with(&self, prefix: &[u8]) -> &[TokenId] {
        let bytes = |id: TokenId| self.tokenizer.token_bytes(id).unwrap_or_default();
        let first = self.sorted.partition_point(|&id| bytes(id) < prefix);
        let rest = &self.sorted[first..];
        &rest[..rest.partition_point(|&id| bytes(id).starts_with(prefix))]
    }

    /// The ordinary tokens that are these bytes.
    pub(crate) fn spelling(&self, bytes: &[u8]) -> &[TokenId] {
        let tokens = self.beginning_with(bytes);
        &tokens[..tokens.partition_point(|&id| self.text(id).is_some_and(|text| text.len() == bytes.len()))]
    }
}

impl std::fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vocabulary").field("len", &self.len()).finish_non_exhaustive()
    }
}

fn text_of(tokenizer: &Tokenizer, id: TokenId) -> Option<&[u8]> {
    let bytes = tokenizer.token_bytes(id)?;
    let is_text = !tokenizer.is_control(id) && (1..=LONGEST_TOKEN).contains(&bytes.len());
    is_text.then_some(bytes)
}

/// The trie. Control tokens are no text in it, so no string in JSON ever holds one.
struct Env {
    trie: TokTrie,
}

impl Env {
    fn new(tokenizer: &Tokenizer) -> Self {
        let mut words: Vec<Vec<u8>> = (0..tokenizer.len() as TokenId)
            .map(|id| text_of(tokenizer, id).unwrap_or_default().to_vec())
            .collect();
        // The grammars' own end: an id that no tokenizer has. Formats say themselves what ends a text.
        words.push(b"\xff<end>".to_vec());
        let len = words.len() as u32;
        Self { trie: TokTrie::from(&TokRxInfo::new(len, len - 1), &words) }
    }
}

impl TokenizerEnv for Env {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.greedy_tokenize(bytes)
    }

    /// How text is cut into tokens is the model's choice: forcing one would change what it says.
    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}
