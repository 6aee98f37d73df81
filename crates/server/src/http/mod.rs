//! HTTP below the routes: connections, bodies, keys, origins, names of requests, event streams.

pub(crate) mod body;
pub(crate) mod depth;
pub(crate) mod guard;
pub(crate) mod keys;
pub(crate) mod origin;
pub(crate) mod serve;
pub(crate) mod sse;
