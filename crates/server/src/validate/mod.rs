//! From wire types to what the engine and the chat format take. Every bound on a client's number is here or in
//! [`ctxserve_core::limits`], once for all routes.

pub(crate) mod history;
pub(crate) mod options;
pub(crate) mod prompts;
pub(crate) mod tools;
