//! One file per endpoint.

pub(crate) mod chat;
pub(crate) mod chat_frames;
pub(crate) mod chat_message;
pub(crate) mod completion_parts;
pub(crate) mod completions;
pub(crate) mod health;
pub(crate) mod logprobs;
pub(crate) mod messages;
pub(crate) mod messages_blocks;
pub(crate) mod messages_frames;
pub(crate) mod models;
pub(crate) mod responses;
pub(crate) mod tokenize;
