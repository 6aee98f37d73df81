//! Constrained decoding: what a sequence's next token may be.

use std::fmt::Debug;
use std::sync::Arc;

use thiserror::Error;

use crate::TokenId;

/// Ids that may be picked, one bit each: id `i` is bit `i % 32` of word `i / 32`. Ids beyond its words may not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenMask {
    words: Vec<u32>,
}

impl TokenMask {
    /// One that allows nothing, with room for ids below `len`.
    pub fn none(len: usize) -> Self {
        Self { words: vec![0; len.div_ceil(32)] }
    }

    /// From words; bits of ids from `len` on are cleared.
    pub fn from_words(mut words: Vec<u32>, len: usize) -> Self {
        words.truncate(len.div_ceil(32));
        if !len.is_multiple_of(32)
            && let Some(last) = words.get_mut(len / 32)
        {
            *last &= (1 << (len % 32)) - 1;
        }
        Self { words }
    }

    /// Allows an id; one beyond its words is ignored.
    pub fn allow(&mut self, id: TokenId) {
        if let Some(word) = self.words.get_mut(id as usize / 32) {
            *word |= 1 << (id % 32);
        }
    }

    /// Whether the id may be picked.
    pub fn allows(&self, id: TokenId) -> bool {
        self.words.get(id as usize / 32).is_some_and(|word| word & (1 << (id % 32)) != 0)
    }

    /// Whether no id may be picked.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// The bits, 32 ids a word.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// The ids that may be picked, ascending.
    pub fn ids(&self) -> impl Iterator<Item = TokenId> + '_ {
        (0..).zip(&self.words).flat_map(|(at, &word)| {
            (0..32).filter(move |bit| word & (1 << bit) != 0).map(move |bit| at * 32 + bit)
        })
    }
}

/// What the next token may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// Anything.
    Any,
    /// Anything but these.
    Except(Arc<[TokenId]>),
    /// These alone.
    Only(Arc<TokenMask>),
}

impl Allowed {
    /// Whether the id may be picked.
    pub fn allows(&self, id: TokenId) -> bool {
        match self {
            Self::Any => true,
            Self::Except(ids) => !ids.contains(&id),
            Self::Only(mask) => mask.allows(id),
        }
    }
}

/// A sequence that cannot go on under its constraint; ends that sequence and no other.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("constrained decoding failed: {what}")]
pub struct ConstraintError {
    /// Why.
    pub what: String,
}

impl ConstraintError {
    /// Builds one.
    pub fn new(what: impl Into<String>) -> Self {
        Self { what: what.into() }
    }
}

/// What one sequence may say, token by token. Asked and told in turn: `allowed`, `accept`, `allowed`, ...
pub trait Constraint: Send + Debug {
    /// What the next token may be. May take milliseconds, never seconds.
    ///
    /// # Errors
    /// Nothing may follow, or the grammar became too complex.
    fn allowed(&mut self) -> Result<Allowed, ConstraintError>;

    /// Takes the token that was picked.
    ///
    /// # Errors
    /// A token that was not allowed, or a grammar that became too complex.
    fn accept(&mut self, id: TokenId) -> Result<(), ConstraintError>;

    /// Whether accepting this id, and then saying what is allowed, takes microseconds at most.
    fn is_quick(&self, id: TokenId) -> bool;

    /// Whether what is allowed now is allowed for ever after, whatever is picked.
    fn is_settled(&self) -> bool;

    /// An independent copy, for another choice of the same request.
    fn fork(&self) -> Box<dyn Constraint>;
}

impl Clone for Box<dyn Constraint> {
    fn clone(&self) -> Self {
        self.fork()
    }
}

/// A constraint at the start of an answer, with what it allows first: found before the request is queued, so that a
/// constraint that allows nothing is the client's error.
#[derive(Clone, Debug)]
pub struct Guide {
    /// Has been asked once.
    pub constraint: Box<dyn Constraint>,
    /// What it answered.
    pub first: Allowed,
}

impl Guide {
    /// Asks for the first time.
    ///
    /// # Errors
    /// Nothing is allowed.
    pub fn new(mut constraint: Box<dyn Constraint>) -> Result<Self, ConstraintError> {
        let first = constraint.allowed()?;
        match &first {
            Allowed::Only(mask) if mask.is_empty() => Err(ConstraintError::new("nothing is allowed")),
            _ => Ok(Self { constraint, first }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_hold_what_they_were_told() {
        let mut mask = TokenMask::none(40);
        assert!(mask.is_empty());
        for id in [0, 31, 32, 39, 500] {
            mask.allow(id);
        }
        assert_eq!(mask.ids().collect::<Vec<_>>(), [0, 31, 32, 39]);
        assert!(mask.allows(39) && !mask.allows(1) && !mask.allows(500));
        assert_eq!(mask.words().len(), 2);
    }

    #[test]
    fn bits_beyond_the_length_are_cleared() {
        let mask = TokenMask::from_words(vec![!0, !0, !0], 33);
        assert_eq!(mask.words(), [!0, 1]);
        assert_eq!(TokenMask::from_words(vec![!0], 32).ids().count(), 32);
        assert!(!mask.allows(33));
    }

    #[test]
    fn what_is_allowed() {
        let mut mask = TokenMask::none(8);
        mask.allow(3);
        assert!(Allowed::Any.allows(7));
        assert!(Allowed::Except([1].into()).allows(3) && !Allowed::Except([1].into()).allows(1));
        assert!(Allowed::Only(Arc::new(mask.clone())).allows(3) && !Allowed::Only(Arc::new(mask)).allows(4));
    }
}
