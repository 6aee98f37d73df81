//! Constrained decoding: whatever a guide allows, the parser of its format reads as what was asked for.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests should stop where they fail"
)]

mod common;
mod formats;
mod grammars;
mod hostile;
