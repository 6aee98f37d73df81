//! The OpenAI HTTP API on axum.
