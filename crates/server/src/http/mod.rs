//! HTTP below the routes: connections, bodies, keys, names of requests, event streams.

pub(crate) mod body;
pub(crate) mod guard;
pub(crate) mod serve;
pub(crate) mod sse;
