//! Fixed texts to choose from, of ordinary text and control tokens: headers and tags.

use ctxserve_core::{TokenId, TokenMask};

use super::vocabulary::Vocabulary;

/// A piece of a fixed text.
#[derive(Clone, Debug)]
pub(crate) enum Part {
    /// Text, in whatever tokens the model likes.
    Text(String),
    /// This token.
    Token(TokenId),
}

impl Part {
    pub(crate) fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }
}

/// A place in [`Words`].
pub(crate) type At = usize;

#[derive(Debug, Default)]
struct Node {
    bytes: Vec<(u8, At)>,
    tokens: Vec<(TokenId, At)>,
    end: Option<usize>,
}

/// A tree of the texts that may come, each with a number for what it means.
#[derive(Debug)]
pub(crate) struct Words {
    nodes: Vec<Node>,
}

impl Words {
    /// Where every text begins.
    pub(crate) const START: At = 0;

    pub(crate) fn new() -> Self {
        Self { nodes: vec![Node::default()] }
    }

    /// Adds a text that means `outcome`. No text may begin with another.
    pub(crate) fn add(&mut self, parts: &[Part], outcome: usize) {
        let mut at = Self::START;
        for part in parts {
            match part {
                Part::Text(text) => {
                    for byte in text.bytes() {
                        at = self.child(at, |node| &mut node.bytes, byte);
                    }
                }
                Part::Token(id) => at = self.child(at, |node| &mut node.tokens, *id),
            }
        }
        self.nodes[at].end.get_or_insert(outcome);
    }

    fn child<K: PartialEq>(&mut self, at: At, of: impl Fn(&mut Node) -> &mut Vec<(K, At)>, key: K) -> At {
        let new = self.nodes.len();
        let children = of(&mut self.nodes[at]);
        if let Some((_, child)) = children.iter().find(|(known, _)| *known == key) {
            return *child;
        }
        children.push((key, new));
        self.nodes.push(Node::default());
        new
    }

    /// Adds the tokens that may come at a place.
    pub(crate) fn allow(&self, at: At, vocabulary: &Vocabulary, mask: &mut TokenMask) {
        for (id, _) in &self.nodes[at].tokens {
            mask.allow(*id);
        }
        // Depth first over texts that some token begins with: there are few.
        let mut open = vec![(at, Vec::new())];
        while let Some((at, text)) = open.pop() {
            for &(byte, child) in &self.nodes[at].bytes {
                let mut longer: Vec<u8> = text.clone();
                longer.push(byte);
                if vocabulary.beginning_with(&longer).is_empty() {
                    continue;
                }
                for &id in vocabulary.spelling(&longer) {
                    mask.allow(id);
                }
                open.push((child, longer));
            }
        }
    }

    /// Where a token leads.
    pub(crate) fn step(&self, at: At, id: TokenId, vocabulary: &Vocabulary) -> Option<At> {
        if let Some((_, child)) = self.nodes[at].tokens.iter().find(|(token, _)| *token == id) {
            return Some(*child);
        }
        vocabulary.text(id)?.iter().try_fold(at, |at, byte| {
            self.nodes[at].bytes.iter().find(|(known, _)| known == byte).map(|(_, child)| *child)
        })
    }

    /// What the text that ends here means.
    pub(crate) fn outcome(&self, at: At) -> Option<usize> {
        self.nodes[at].end
    }
}
