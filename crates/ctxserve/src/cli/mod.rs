//! The command line: `serve` (the default), `bench`, `convert`, `inspect`, `render`, `parse` and `health`.

pub mod bench;
pub mod checkpoints;
pub mod health;
pub mod http;
mod limits;
mod numbers;
pub mod options;
mod spelling;
pub mod table;
pub mod values;

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command};

use bench::BENCH;
use checkpoints::{ConvertArgs, InspectArgs};
use health::HealthArgs;
use table::{Flag, RUNNING, Takes, Treatment, flags};
use values::{Given, Origin, Values};

const SUBCOMMANDS: [&str; 7] = ["serve", "bench", "convert", "inspect", "render", "parse", "health"];

const MODEL_HELP: &str = "A directory with a checkpoint, a profile (context-1-mxfp4, fastcontext-1.0-4b-nvfp4, gpt-oss-20b, ...), a Hugging \
     Face repository owner/name, demo (a small model with random weights), or replay:FILE (scripted answers). \
     Without one, demo is served";

/// What the user asked for.
#[derive(Debug)]
pub enum Invocation {
    /// Serve a model.
    Serve(Values),
    /// Measure a model.
    Bench {
        /// How it is loaded and run: rows of [`table::RUNNING`].
        running: Values,
        /// What is measured: rows of [`bench::BENCH`].
        measured: Values,
    },
    /// Store a checkpoint in another format.
    Convert(ConvertArgs),
    /// Say what a checkpoint is.
    Inspect(InspectArgs),
    /// Print the token ids of a conversation.
    Render(ToolArgs),
    /// Parse token sequences into messages.
    Parse(ToolArgs),
    /// Ask a server whether it is ready.
    Health(HealthArgs),
}

/// Arguments of `render` and `parse`.
#[derive(Clone, Debug)]
pub struct ToolArgs {
    /// Where the tokenizer comes from: as for `serve`, or a tokenizer.json; `None` is the demo tokenizer.
    pub model: Option<String>,
    /// Chat format; `None` is the profile's, or harmony.
    pub format: Option<String>,
    /// Chat template, if not the tokenizer's: a file, or a template itself.
    pub template: Option<String>,
    /// Input file; `None` is standard input.
    pub input: Option<PathBuf>,
}

/// Reads the command line, program name first.
///
/// # Errors
/// clap's, help and version requests included; print it and exit with its code.
pub fn parse(args: impl IntoIterator<Item = String>) -> Result<Invocation, clap::Error> {
    let mut args = args.into_iter();
    let program = args.next().unwrap_or_else(|| "ctxserve".to_owned());
    let mut rest: Vec<String> = args.collect();
    let first = rest.first().map(String::as_str);
    let explicit = first.is_some_and(|arg| {
        SUBCOMMANDS.contains(&arg) || ["-h", "--help", "help", "-V", "--version"].contains(&arg)
    });
    if !explicit {
        rest.insert(0, "serve".to_owned());
    }
    if rest[0] == "serve" || rest[0] == "bench" {
        let tail = rest.split_off(1);
        let spelled = spelling::normalise(tail)
            .map_err(|what| command().error(clap::error::ErrorKind::UnknownArgument, what))?;
        rest.extend(spelled);
    }
    let matches = command().try_get_matches_from(std::iter::once(program).chain(rest))?;
    Ok(match matches.subcommand() {
        Some(("convert", sub)) => Invocation::Convert(checkpoints::convert_args(sub)?),
        Some(("inspect", sub)) => Invocation::Inspect(checkpoints::inspect_args(sub)),
        Some(("render", sub)) => Invocation::Render(tool_args(sub)),
        Some(("parse", sub)) => Invocation::Parse(tool_args(sub)),
        Some(("health", sub)) => Invocation::Health(health::health_args(sub)),
        Some(("bench", sub)) => Invocation::Bench {
            running: with_model(sub, values_of(sub, RUNNING.iter())),
            measured: values_of(sub, BENCH.iter()),
        },
        Some((_, sub)) => Invocation::Serve(with_model(sub, values_of(sub, flags()))),
        None => Invocation::Serve(Values::default()),
    })
}

/// The whole command, for help and completion.
pub fn command() -> Command {
    Command::new("ctxserve")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Serves FP4 agentic-search models over the OpenAI API")
        .after_help("Without a subcommand, `serve` is meant: `ctxserve --model demo --port 8000`.")
        .subcommand_required(true)
        .subcommand(serve_command())
        .subcommand(bench_command())
        .subcommand(checkpoints::convert_command())
        .subcommand(checkpoints::inspect_command())
        .subcommand(tool_command(
            "render",
            "Print the prompt of a conversation as JSON: token_ids, and text with control tokens spelled out",
            "Chat request (JSON: messages, tools, reasoning_effort, ...) [default: standard input]",
        ))
        .subcommand(tool_command(
            "parse",
            "Parse generated tokens into messages: one JSON line in, one out",
            "JSON lines, each {\"segments\": [...]} or {\"token_ids\": [...]} [default: standard input]",
        ))
        .subcommand(health::health_command())
}

fn serve_command() -> Command {
    Command::new("serve")
        .about("Serve a model over HTTP (the default)")
        .args(model_args(flags()))
        .after_help(
            "`_` and `-` are the same in flag names, and --no-NAME turns a switch off. Other flags of `vllm serve` \
             are accepted and logged where they cannot matter here, or refused with the reason.",
        )
}

fn bench_command() -> Command {
    Command::new("bench")
        .about("Measure a model on this machine, without a server in between")
        .args(model_args(BENCH.iter().chain(RUNNING)))
        .after_help(bench::METHOD)
}

/// MODEL and flags.
fn model_args(flags: impl Iterator<Item = &'static Flag>) -> impl Iterator<Item = Arg> {
    let model = Arg::new("MODEL").help(MODEL_HELP).conflicts_with("model");
    std::iter::once(model).chain(flags.map(arg))
}

/// A row of a table as clap takes it.
fn arg(flag: &'static Flag) -> Arg {
    let arg = Arg::new(flag.name).long(flag.name);
    let arg = match flag.takes {
        Takes::Switch => arg
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true")
            .value_parser(["true", "false"])
            .hide_possible_values(true)
            .action(ArgAction::Set)
            .overrides_with(flag.name),
        Takes::Value(name) => {
            arg.value_name(name).action(ArgAction::Set).overrides_with(flag.name).allow_negative_numbers(true)
        }
        Takes::List(name) => arg.value_name(name).num_args(1..).action(ArgAction::Append),
    };
    match flag.treatment {
        Treatment::Honoured => arg.help(flag.help),
        Treatment::NoOp(_) | Treatment::Only(..) | Treatment::Refused(_) => arg.hide(true),
    }
}

fn tool_command(name: &'static str, about: &'static str, input: &'static str) -> Command {
    Command::new(name)
        .about(about)
        .arg(Arg::new("INPUT").help(input).conflicts_with("input"))
        .arg(
            Arg::new("input")
                .long("input")
                .short('i')
                .value_name("FILE")
                .help("Same as the positional INPUT"),
        )
        .arg(
            Arg::new("model")
                .long("model")
                .visible_alias("tokenizer")
                .value_name("MODEL")
                .help("Whose tokenizer: a directory, tokenizer.json, profile or repository [default: demo]"),
        )
        .arg(
            Arg::new("format")
                .long("format")
                .visible_alias("chat-format")
                .value_name("NAME")
                .help("Chat format: harmony or hermes [default: the profile's, or harmony]"),
        )
        .arg(
            Arg::new("chat-template")
                .long("chat-template")
                .value_name("FILE")
                .help("Template of prompts, for formats that have one [default: the tokenizer's]"),
        )
}

fn tool_args(matches: &ArgMatches) -> ToolArgs {
    let text = |name| matches.get_one::<String>(name).cloned();
    ToolArgs {
        model: text("model"),
        format: text("format"),
        template: text("chat-template"),
        input: text("INPUT").or_else(|| text("input")).filter(|path| path != "-").map(PathBuf::from),
    }
}

/// What was given for flags of a table.
fn values_of(matches: &ArgMatches, flags: impl Iterator<Item = &'static Flag>) -> Values {
    let mut values = Values::default();
    for flag in flags {
        if let Some(given) = matches.get_many::<String>(flag.name) {
            values.offer(flag, Given { values: given.cloned().collect(), origin: Origin::Flag });
        }
    }
    values
}

/// The positional MODEL is the flag.
fn with_model(matches: &ArgMatches, mut values: Values) -> Values {
    if let (Some(model), Some(flag)) = (matches.get_one::<String>("MODEL"), table::find("model")) {
        values.offer(flag, Given { values: vec![model.clone()], origin: Origin::Flag });
    }
    values
}

#[cfg(test)]
mod tests;
