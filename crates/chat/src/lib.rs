//! Messages, tokenizer, detokenizer and chat formats. Pure: no IO beyond reading the tokenizer it is given.
//!
//! A [`ChatFormat`] renders a [`Conversation`] to token ids and makes [`StreamParser`]s that turn generated
//! ids back into a message. Control tokens come only from the format itself, never from client text.

mod collect;
mod detokenize;
mod format;
pub mod formats;
mod generated;
pub mod guide;
pub mod harmony;
pub mod hermes;
mod jinja;
mod message;
mod recovery;
mod scan;
mod segments;
#[cfg(feature = "testing")]
pub mod testing;
mod tokenizer;
mod work;

pub use collect::{Collector, Message as ParsedMessage, ParsedCall};
pub use detokenize::{Detokenizer, Utf8Stream};
pub use format::{
    ChatFormat, Delta, End, Finish, FormatError, Outcome, ParserOptions, Place, RenderError, Rendered,
    StreamParser,
};
pub use formats::PromptFiles;
pub use generated::Generated;
pub use message::{Conversation, FunctionTool, Message, ReasoningEffort, ToolCall};
pub use segments::{Segment, SegmentError, end_of, segments_to_ids};
pub use tokenizer::{Tokenizer, TokenizerError};

/// `tokenizer.json` of the built-in demo model: a small byte-level BPE with Harmony's control tokens.
pub fn demo_tokenizer_json() -> &'static [u8] {
    include_bytes!("../assets/demo-tokenizer.json")
}
