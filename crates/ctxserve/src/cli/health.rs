//! The command line of `health`.

use std::time::Duration;

use clap::{Arg, ArgMatches, Command, value_parser};

/// Arguments of `health`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthArgs {
    /// A server, or a path of it.
    pub url: String,
    /// Longest time of one question.
    pub timeout: Duration,
    /// How long to go on asking a server that is not ready; zero asks once.
    pub wait: Duration,
}

pub(super) fn health_command() -> Command {
    Command::new("health")
        .about("Ask a server whether it is ready: exits with 0 if it is and with 1 if not")
        .arg(Arg::new("URL").help("Same as --url").conflicts_with("url"))
        .arg(
            Arg::new("url")
                .long("url")
                .value_name("URL")
                .default_value("http://127.0.0.1:8000")
                .help("The server; /health is asked unless the URL names a path"),
        )
        .arg(seconds("timeout", "5", "Longest time of one question"))
        .arg(seconds("wait", "0", "Ask again until it is ready, for so long"))
}

fn seconds(name: &'static str, default: &'static str, help: &'static str) -> Arg {
    let parser = value_parser!(u64).range(..=86_400);
    Arg::new(name).long(name).value_name("SECONDS").default_value(default).value_parser(parser).help(help)
}

pub(super) fn health_args(matches: &ArgMatches) -> HealthArgs {
    let text = |name| matches.get_one::<String>(name).cloned();
    let seconds = |name| Duration::from_secs(matches.get_one::<u64>(name).copied().unwrap_or_default());
    HealthArgs {
        url: text("URL").or_else(|| text("url")).unwrap_or_default(),
        timeout: seconds("timeout").max(Duration::from_secs(1)),
        wait: seconds("wait"),
    }
}
