//! The `ctxserve` program as a library: command line, model sources, wiring, subcommands.

pub mod cli;
pub mod hub;
