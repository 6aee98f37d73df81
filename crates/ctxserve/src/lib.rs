//! The `ctxserve` program as a library: command line, model sources, wiring, subcommands.
//!
//! [`run`] reads the command line. [`serve`] turns flags into a running server; [`inspect`] shows what goes into a
//! model and what comes out. Backends are named in [`device`] alone.

pub mod cli;
pub mod device;
pub mod hub;
pub mod inspect;
pub mod lines;
pub mod logging;
pub mod memory;
pub mod model;
pub mod profile;
pub mod sampling;
pub mod serve;
mod signals;
pub mod source;

use std::ffi::OsString;
use std::io;
use std::process::ExitCode;

use cli::Invocation;

/// Runs the program.
///
/// Exit codes: 0 done; 1 it failed, or `parse` met a line that is no token sequence; 2 the command line or an
/// option is wrong.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Result<Vec<String>, OsString> = args.into_iter().map(OsString::into_string).collect();
    let args = match args {
        Ok(args) => args,
        Err(arg) => return fail(&anyhow::anyhow!("{} is not UTF-8", arg.display()), 2),
    };
    let invocation = match cli::parse(args) {
        Ok(invocation) => invocation,
        Err(error) => {
            // clap prints help to standard output and mistakes to standard error.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    let outcome = match invocation {
        Invocation::Serve(values) => serve::serve(values).map(|()| true),
        Invocation::Render(args) => inspect::render(&args, &mut io::stdout().lock()).map(|()| true),
        Invocation::Parse(args) => inspect::parse(&args, &mut io::stdout().lock()),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) if error.is::<cli::values::OptionError>() => fail(&error, 2),
        Err(error) => fail(&error, 1),
    }
}

/// One line with the whole chain of causes, no backtrace.
#[expect(clippy::print_stderr, reason = "the log may not have been started")]
fn fail(error: &anyhow::Error, code: u8) -> ExitCode {
    eprintln!("error: {error:#}");
    ExitCode::from(code)
}

/// The reader of our output went away, as `head` does.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
