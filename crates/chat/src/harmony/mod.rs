//! Harmony, the chat protocol of gpt-oss and Context-1.

pub mod parse;
mod tokens;

pub use tokens::HarmonyTokens;
