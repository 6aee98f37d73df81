//! From engine events to pieces of an answer. Streamed and whole responses both read [`run::Generation`], so
//! they cannot disagree.

pub(crate) mod align;
pub(crate) mod choice;
pub(crate) mod gathered;
pub(crate) mod run;
pub(crate) mod scribe;
pub(crate) mod stop;
pub(crate) mod text;
