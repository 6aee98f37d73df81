//! The log: on standard error, as text or JSON lines, filtered by `RUST_LOG` or `--log-level`.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::layer;
use tracing_subscriber::prelude::*;

use crate::cli::options::LogOptions;

/// Starts logging. Later calls change nothing.
pub fn start(options: &LogOptions) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(&options.level));
    let registry = tracing_subscriber::registry().with(filter);
    let started = if options.json {
        registry.with(layer().json().flatten_event(true).with_writer(std::io::stderr)).try_init()
    } else {
        let colour = std::io::stderr().is_terminal();
        registry.with(layer().with_target(false).with_ansi(colour).with_writer(std::io::stderr)).try_init()
    };
    // Only tests start it twice, and they may.
    let _ = started;
}
