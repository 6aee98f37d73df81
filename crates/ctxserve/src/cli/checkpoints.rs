//! The command lines of `convert` and `inspect`.

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use ctxserve_checkpoint::Target;

use super::numbers::bytes;

/// A file of weights has at most this, so that a conversion that was ended loses little.
const SHARD_BYTES: &str = "2GiB";

/// On two cores a model of four billion parameters reads some tens of tokens a second.
const CALIBRATE_TOKENS: &str = "65536";

const AFTER_CONVERT: &str = "\
SRC is only read. DST appears when it is complete; until then DST.partial holds what is finished, and the same command goes on \
from there. What is not packed is written in bfloat16. DST/convert-report.json has the relative error of each tensor.

nvfp4: servers that round inputs to FP4, as this one does with --activation-quant nvfp4, need factors for them. --calibrate \
finds them: the whole model is loaded into memory and reads a plain UTF-8 text on the CPU; input_scale is the largest input met, \
by 6 * 448. Take a text like those that will be served: larger inputs are cut off. Without --calibrate the source's factors \
are kept, and where it has none input_scale is 1.0.

nvfp4 is not written for models with experts (gpt-oss): exporters store stacks of experts in ways that differ and that servers do \
not agree on. mxfp4 holds them.";

const SOURCE_HELP: &str = "A directory with a checkpoint, a Hugging Face repository owner/name, or a profile";

/// Arguments of `convert`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConvertArgs {
    /// What to convert.
    pub source: String,
    /// The directory to make.
    pub to: PathBuf,
    /// The format to write.
    pub target: Target,
    /// Most bytes of a file of weights.
    pub shard_bytes: u64,
    /// A text to calibrate inputs on.
    pub calibrate: Option<PathBuf>,
    /// Most tokens of it.
    pub calibrate_tokens: usize,
}

/// Arguments of `inspect`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InspectArgs {
    /// What to look at.
    pub source: String,
    /// Whether to print JSON.
    pub json: bool,
}

pub(super) fn convert_command() -> Command {
    Command::new("convert")
        .about("Store a checkpoint in another format")
        .arg(Arg::new("SRC").required(true).help(SOURCE_HELP))
        .arg(Arg::new("DST").required(true).help("Directory to make; it must not be there yet"))
        .arg(
            Arg::new("to")
                .long("to")
                .required(true)
                .value_name("FORMAT")
                .value_parser(PossibleValuesParser::new(Target::ALL.map(Target::name)))
                .help("mxfp4: experts packed; nvfp4: projections of dense layers packed, as ModelOpt stores them"),
        )
        .arg(
            Arg::new("max-shard-size")
                .long("max-shard-size")
                .value_name("SIZE")
                .default_value(SHARD_BYTES)
                .help("Most bytes of a file of weights"),
        )
        .arg(
            Arg::new("calibrate")
                .long("calibrate")
                .value_name("FILE")
                .help("nvfp4: the model reads this text, and each input_scale is made of the largest input met"),
        )
        .arg(
            Arg::new("calibrate-tokens")
                .long("calibrate-tokens")
                .value_name("TOKENS")
                .default_value(CALIBRATE_TOKENS)
                .value_parser(value_parser!(u64).range(1..=1 << 30))
                .help("Most tokens of that text, read in sequences of 1024"),
        )
        .after_help(AFTER_CONVERT)
}

pub(super) fn inspect_command() -> Command {
    Command::new("inspect")
        .about("Say what a checkpoint is, what it takes, and what is odd about it; no weight is read but some scales")
        .arg(Arg::new("PATH").required(true).help(SOURCE_HELP))
        .arg(Arg::new("json").long("json").action(ArgAction::SetTrue).help("Print JSON"))
}

fn text(matches: &ArgMatches, name: &str) -> String {
    matches.get_one::<String>(name).cloned().unwrap_or_default()
}

/// Reads them; what clap lets pass and makes no sense is an error of its kind.
pub(super) fn convert_args(matches: &ArgMatches) -> Result<ConvertArgs, clap::Error> {
    let refuse = |what: String| convert_command().error(ErrorKind::ValueValidation, what);
    let size = text(matches, "max-shard-size");
    let shard_bytes = bytes(&size).map_err(|what| refuse(format!("--max-shard-size {size}: {what}")))?;
    let target: Target = text(matches, "to").parse().map_err(|what| refuse(format!("--to: {what}")))?;
    let calibrate = matches.get_one::<String>("calibrate").map(PathBuf::from);
    if calibrate.is_some() && target != Target::Nvfp4 {
        return Err(refuse(format!("--calibrate: {target} has no factors for inputs, nvfp4 has")));
    }
    let tokens = matches.get_one::<u64>("calibrate-tokens").copied().unwrap_or_default();
    Ok(ConvertArgs {
        source: text(matches, "SRC"),
        to: PathBuf::from(text(matches, "DST")),
        target,
        shard_bytes: shard_bytes as u64,
        calibrate,
        calibrate_tokens: usize::try_from(tokens).unwrap_or(usize::MAX),
    })
}

pub(super) fn inspect_args(matches: &ArgMatches) -> InspectArgs {
    InspectArgs { source: text(matches, "PATH"), json: matches.get_flag("json") }
}

#[cfg(test)]
mod tests {
    use super::super::{Invocation, parse};
    use super::*;

    fn invoke(line: &str) -> Result<Invocation, String> {
        let args = std::iter::once("ctxserve").chain(line.split_whitespace()).map(str::to_owned);
        parse(args).map_err(|error| error.to_string())
    }

    #[test]
    fn a_conversion_has_a_source_a_place_and_a_format() {
        let convert = |line: &str| match invoke(line).unwrap() {
            Invocation::Convert(args) => args,
            other => panic!("{other:?}"),
        };
        let wanted = ConvertArgs {
            source: "a".to_owned(),
            to: PathBuf::from("b"),
            target: Target::Mxfp4,
            shard_bytes: 2 << 30,
            calibrate: None,
            calibrate_tokens: 65_536,
        };
        assert_eq!(convert("convert a b --to mxfp4"), wanted);
        assert_eq!(convert("convert --to=mxfp4 a b --max-shard-size 2GiB"), wanted);
        assert_eq!(convert("convert a b --to nvfp4 --max-shard-size 500MB").shard_bytes, 500_000_000);
        let calibrated = convert("convert a b --to nvfp4 --calibrate x.txt --calibrate-tokens 7");
        assert_eq!((calibrated.calibrate, calibrated.calibrate_tokens), (Some(PathBuf::from("x.txt")), 7));
        for (line, wanted) in [
            ("convert a b", "--to"),
            ("convert a --to mxfp4", "DST"),
            ("convert a b --to gguf", "gguf"),
            ("convert a b --to bf16 --max-shard-size much", "--max-shard-size much"),
            ("convert a b --to bf16 --calibrate x.txt", "bf16 has no factors for inputs"),
            ("convert a b --to nvfp4 --calibrate x.txt --calibrate-tokens 0", "--calibrate-tokens"),
        ] {
            let error = invoke(line).unwrap_err();
            assert!(error.contains(wanted), "{line}: {error}");
        }
    }

    #[test]
    fn an_inspection_has_a_place() {
        let inspect = |line: &str| match invoke(line).unwrap() {
            Invocation::Inspect(args) => args,
            other => panic!("{other:?}"),
        };
        assert_eq!(inspect("inspect a --json"), InspectArgs { source: "a".to_owned(), json: true });
        assert!(!inspect("inspect a").json);
        assert!(invoke("inspect").is_err());
    }
}
