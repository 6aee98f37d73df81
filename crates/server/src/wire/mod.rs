//! Wire types: the only place where this crate meets JSON. Requests are read leniently about what is unknown
//! and strictly about what is known; responses are built from the types in the `*_response` files.

pub(crate) mod chat_request;
pub(crate) mod chat_response;
pub(crate) mod completion_request;
pub(crate) mod completion_response;
pub(crate) mod content;
pub(crate) mod fields;
pub(crate) mod messages_opaque;
pub(crate) mod messages_request;
pub(crate) mod messages_response;
pub(crate) mod prompt;
pub(crate) mod read;
pub(crate) mod refused;
pub(crate) mod responses_output;
pub(crate) mod responses_request;
pub(crate) mod responses_response;
pub(crate) mod schema;
pub(crate) mod service;
pub(crate) mod tokenize;
pub(crate) mod usage;
