//! The OpenAI HTTP API on axum.
//!
//! A request's way: [`http`] reads the body and checks the key, `wire` turns JSON into types, `validate` turns types
//! into token ids and parameters, `generate` follows the engine's events and makes pieces of an answer, `api` puts
//! those into the shape of a route, whole or streamed. No other crate sees a wire type.

mod api;
mod config;
mod error;
mod generate;
mod http;
mod metrics;
mod record;
mod router;
mod state;
mod validate;
mod wire;

pub use config::{PromptDate, ServerConfig};
pub use error::ApiError;
pub use http::serve::serve;
pub use router::router;
pub use state::{ServerError, ServerState};
pub use validate::conversation_from_json;
