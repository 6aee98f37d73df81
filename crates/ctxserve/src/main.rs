//! The `ctxserve` binary; see the library of the same name.

use std::process::ExitCode;

fn main() -> ExitCode {
    ctxserve::run(std::env::args_os())
}
