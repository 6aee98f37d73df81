//! The `ctxserve` program as a library: command line, model sources, wiring, subcommands.
//!
//! [`run`] reads the command line. [`serve`] turns flags into a running server; [`mod@bench`] measures a model; [`convert`]
//! stores a checkpoint in another format and [`inspect`] says what one is; [`tools`] shows what goes into a model and what comes
//! out; [`health`] asks a server. Backends are named in [`device`] alone.

pub mod bench;
pub mod cli;
pub mod convert;
pub mod device;
pub mod health;
pub mod hub;
pub mod inspect;
pub mod lines;
pub mod logging;
pub mod memory;
pub mod model;
pub mod profile;
pub mod prompts;
pub mod sampling;
pub mod serve;
mod signals;
pub mod source;
mod start;
pub mod tools;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use cli::Invocation;

/// Runs the program.
///
/// Exit codes: 0 done; 1 it failed, a server is not healthy, or `parse` met a line that is no token sequence; 2 the command line or an
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
        Invocation::Bench { running, measured } => {
            // Not locked: the log of other threads goes to standard error meanwhile.
            bench::bench(running, &measured, &mut io::stdout(), &mut io::stderr()).map(|()| true)
        }
        Invocation::Convert(args) => convert::run(&args, &mut io::stdout(), &mut io::stderr()).map(|()| true),
        Invocation::Inspect(args) => inspect::run(&args, &mut io::stdout().lock()).map(|()| true),
        Invocation::Render(args) => tools::render(&args, &mut io::stdout().lock()).map(|()| true),
        Invocation::Parse(args) => tools::parse(&args, &mut io::stdout().lock()),
        Invocation::Health(args) => health::check(&args).map(|()| true),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) if error.is::<cli::values::OptionError>() => fail(&error, 2),
        Err(error) => fail(&error, 1),
    }
}

/// One line, no backtrace.
fn fail(error: &anyhow::Error, code: u8) -> ExitCode {
    // The log may not have been started, or be silenced.
    let _ = writeln!(io::stderr(), "error: {}", chain(error));
    ExitCode::from(code)
}

/// The chain of causes, without those that the error before has quoted already.
fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text.push_str(if text.is_empty() { "" } else { ": " });
            text.push_str(&cause);
        }
    }
    text
}

/// The reader of our output went away, as `head` does.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_says_everything_once() {
        let inner = io::Error::other("no such file");
        let error = anyhow::Error::new(inner).context("x.json: no such file").context("the tokenizer");
        assert_eq!(chain(&error), "the tokenizer: x.json: no such file");
    }

    #[test]
    fn exit_codes() {
        let code = |line: &str| format!("{:?}", run(line.split(' ').map(OsString::from)));
        assert_eq!(code("ctxserve --version"), format!("{:?}", ExitCode::SUCCESS));
        assert_eq!(code("ctxserve --nonsense"), format!("{:?}", ExitCode::from(2)));
        assert_eq!(code("ctxserve --enable-lora"), format!("{:?}", ExitCode::from(2)));
        assert_eq!(code("ctxserve parse /no/such/file"), format!("{:?}", ExitCode::from(1)));
    }
}
