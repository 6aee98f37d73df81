//! The ctxserve binary.
fn main() {}
