//! A text under a grammar, up to the token that ends it.

use std::sync::Arc;

use ctxserve_core::{Allowed, Constraint, ConstraintError, TokenId, TokenMask};

use super::grammar::Follower;

/// A text in progress and the tokens that may end it where the grammar allows an end.
#[derive(Debug)]
pub(crate) struct Text {
    follower: Follower,
    ends: Arc<[TokenId]>,
}

impl Text {
    pub(crate) fn new(follower: Follower, ends: Arc<[TokenId]>) -> Self {
        Self { follower, ends }
    }

    /// What may come.
    ///
    /// # Errors
    /// See [`Follower::next`].
    pub(crate) fn mask(&mut self) -> Result<TokenMask, ConstraintError> {
        let (mut mask, may_end) = self.follower.next()?;
        if may_end {
            self.ends.iter().for_each(|&id| mask.allow(id));
        }
        Ok(mask)
    }

    /// Takes a token; whether it ended the text.
    ///
    /// # Errors
    /// See [`Follower::accept`].
    pub(crate) fn accept(&mut self, id: TokenId) -> Result<bool, ConstraintError> {
        if self.ends.contains(&id) {
            return Ok(true);
        }
        self.follower.accept(id).map(|()| false)
    }

    pub(crate) fn fork(&self) -> Self {
        Self { follower: self.follower.fork(), ends: Arc::clone(&self.ends) }
    }
}

/// An answer that is nothing but a text under a grammar: completions without a chat format.
#[derive(Debug)]
pub(crate) struct Plain {
    /// `None` once it has ended.
    text: Option<Text>,
}

impl Plain {
    pub(crate) fn new(text: Text) -> Self {
        Self { text: Some(text) }
    }
}

impl Constraint for Plain {
    fn allowed(&mut self) -> Result<Allowed, ConstraintError> {
        match &mut self.text {
            Some(text) => Ok(Allowed::Only(Arc::new(text.mask()?))),
            None => Ok(Allowed::Any),
        }
    }

    fn accept(&mut self, id: TokenId) -> Result<(), ConstraintError> {
        if let Some(text) = &mut self.text
            && text.accept(id)?
        {
            self.text = None;
        }
        Ok(())
    }

    fn is_quick(&self, _id: TokenId) -> bool {
        self.text.is_none()
    }

    fn is_settled(&self) -> bool {
        self.text.is_none()
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(Self { text: self.text.as_ref().map(Text::fork) })
    }
}
