//! Identifiers.

use std::fmt;

/// An index into the model's vocabulary: a row of the embedding and a column of the logits.
pub type TokenId = u32;

/// The server's own name for a request. Never taken from a client, so two requests cannot collide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}
