//! `convert`: a checkpoint in another format.

mod calibrate;

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ctxserve_chat::Tokenizer;
use ctxserve_checkpoint::{Checkpoint, Conversion, ConvertReport, Target, Want, convert};
use ctxserve_engine::Bytes;
use ctxserve_models::{LoadOptions, inspect, wants};
use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::checkpoints::ConvertArgs;
use crate::source;

/// Tensors that are shown.
const WORST: usize = 10;
/// Time between two lines of progress where there is no terminal.
const REPORT_EVERY: Duration = Duration::from_secs(10);
const TOKENS: &str = "{bar:30} {pos:>9} / {len:<9} tokens {eta:>5}  {msg}";
const BYTES: &str = "{bar:30} {bytes:>11} / {total_bytes:<11} {bytes_per_sec:>12} {eta:>5}  {msg}";

/// Converts and prints what was lost.
///
/// # Errors
/// A source that cannot be found or read, a target that is there already or that the format cannot hold, a refusal of the
/// system.
pub fn run(args: &ConvertArgs, out: &mut impl Write, log: &mut impl Write) -> anyhow::Result<()> {
    let start = Instant::now();
    let dir = source::locate(&args.source)?;
    let source = Checkpoint::open(&dir)?;
    let wants = wants(&source)?;
    let (from, total) = (source.format_name(), source.total_bytes());
    writeln!(
        log,
        "{}: {from} of {}, to {} in {}",
        dir.display(),
        size(total),
        args.target,
        args.to.display()
    )?;
    let inputs = match &args.calibrate {
        Some(text) => calibrate(args, text, &source, &wants, log)?,
        None => BTreeMap::new(),
    };
    let conversion = Conversion {
        source: &source,
        wants: &wants,
        target: args.target,
        to: &args.to,
        shard_bytes: args.shard_bytes,
        inputs: &inputs,
    };
    let mut lines = Lines::new(total, BYTES, size);
    let report = convert(&conversion, &mut |at| lines.at(log, at.done, at.tensor))
        .with_context(|| format!("converting {}", dir.display()))?;
    lines.bar.finish_and_clear();
    print(&report, out)?;
    writeln!(out, "{} in {:.0} s", args.to.display(), start.elapsed().as_secs_f64())?;
    Ok(())
}

fn size(bytes: u64) -> String {
    Bytes(usize::try_from(bytes).unwrap_or(usize::MAX)).to_string()
}

/// Lets the model read `text`, and finds what inputs reach.
fn calibrate(
    args: &ConvertArgs,
    text: &Path,
    source: &Checkpoint,
    wants: &[Want],
    log: &mut impl Write,
) -> anyhow::Result<BTreeMap<String, f32>> {
    // Before an hour is spent on it.
    if args.to.symlink_metadata().is_ok() {
        bail!("{} is there already, and nothing is overwritten", args.to.display());
    }
    let Some(json) = source.tokenizer_json()? else {
        bail!("--calibrate: there is no tokenizer.json beside the weights");
    };
    let tokenizer = Tokenizer::from_bytes(&json)?;
    let context = inspect(source, &LoadOptions::default())?.max_context;
    let sequences =
        calibrate::sequences(&tokenizer, text, args.calibrate_tokens, context).context("--calibrate")?;
    let tokens: usize = sequences.iter().map(Vec::len).sum();
    writeln!(log, "calibrating on {tokens} tokens of {}", text.display())?;
    let mut lines = Lines::new(tokens as u64, TOKENS, |tokens| format!("{tokens} tokens"));
    let before = |done: usize| sequences.iter().take(done).map(|ids| ids.len() as u64).sum();
    let inputs =
        calibrate::inputs(source, wants, &sequences, |done| lines.at(log, before(done), "calibrating"));
    lines.bar.finish_and_clear();
    inputs.context("--calibrate")
}

/// A bar on a terminal, a line now and then elsewhere.
struct Lines {
    bar: ProgressBar,
    reported: Option<Instant>,
    total: u64,
    shown: fn(u64) -> String,
}

impl Lines {
    fn new(total: u64, template: &str, shown: fn(u64) -> String) -> Self {
        let bar = ProgressBar::new(total);
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Self { bar, reported: (!std::io::stderr().is_terminal()).then(Instant::now), total, shown }
    }

    fn at(&mut self, log: &mut impl Write, done: u64, tensor: &str) {
        self.bar.set_position(done);
        self.bar.set_message(tensor.to_owned());
        if let Some(reported) = &mut self.reported
            && reported.elapsed() >= REPORT_EVERY
        {
            *reported = Instant::now();
            // Whoever closed it does not want to know.
            let _ = writeln!(log, "{} of {}: {tensor}", (self.shown)(done), (self.shown)(self.total));
        }
    }
}

fn print(report: &ConvertReport, out: &mut impl Write) -> std::io::Result<()> {
    let worst = report.worst(WORST);
    if worst.is_empty() {
        writeln!(out, "nothing was lost")?;
    } else {
        writeln!(out, "relative error, the {} largest of {} tensors:", worst.len(), report.tensors.len())?;
    }
    for tensor in worst {
        writeln!(out, "  {:.5}  {} -> {}  {}", tensor.relative_error, tensor.from, tensor.to, tensor.name)?;
    }
    if report.calibrated > 0 {
        writeln!(out, "inputs of {} products were calibrated", report.calibrated)?;
    } else if report.to == Target::Nvfp4 {
        writeln!(out, "inputs were not calibrated: where there was no input_scale, 1.0 was written")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;

    pub(super) fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
    }

    fn args(source: impl Into<String>, to: &Path, target: Target) -> ConvertArgs {
        ConvertArgs {
            source: source.into(),
            to: to.to_owned(),
            target,
            shard_bytes: 1 << 20,
            calibrate: None,
            calibrate_tokens: 300,
        }
    }

    fn convert_golden(name: &str, to: &Path, target: Target) -> anyhow::Result<String> {
        let source = golden(name).display().to_string();
        let args = args(source, to, target);
        let (mut out, mut log) = (Vec::new(), Vec::new());
        run(&args, &mut out, &mut log)?;
        let log = String::from_utf8(log)?;
        assert!(log.contains(name) && log.contains(&target.to_string()), "{log}");
        Ok(String::from_utf8(out)?)
    }

    #[test]
    fn a_whole_model_goes_to_mxfp4_and_back() {
        let root = tempfile::tempdir().unwrap();
        let (packed, dense) = (root.path().join("packed"), root.path().join("dense"));
        let out = convert_golden("mlx", &packed, Target::Mxfp4).unwrap();
        assert!(out.contains("relative error, the") && out.contains("affine -> mxfp4"), "{out}");
        let checkpoint = Checkpoint::open(&packed).unwrap();
        assert_eq!(checkpoint.format_name(), "mxfp4");
        assert!(wants(&checkpoint).is_ok());
        let args = args(packed.display().to_string(), &dense, Target::Bf16);
        let mut out = Vec::new();
        run(&args, &mut out, &mut Vec::new()).unwrap();
        assert!(String::from_utf8(out).unwrap().starts_with("nothing was lost\n"));
        // Weights that were MXFP4 once are so again, whatever they were in between.
        let out = convert_golden("dense", &root.path().join("again"), Target::Mxfp4).unwrap();
        assert!(out.starts_with("nothing was lost\n"), "{out}");
    }

    #[test]
    fn a_dense_model_goes_to_nvfp4_and_back() {
        let root = tempfile::tempdir().unwrap();
        let to = root.path().join("packed");
        let out = convert_golden("qwen3", &to, Target::Nvfp4).unwrap();
        assert!(out.contains("bf16 -> nvfp4") && out.contains("1.0 was written"), "{out}");
        let checkpoint = Checkpoint::open(&to).unwrap();
        assert_eq!(checkpoint.format_name(), "nvfp4");
        assert!(wants(&checkpoint).is_ok());
        // ModelOpt's factors that differ within a product become one.
        let merged = root.path().join("merged");
        let out = convert_golden("qwen3_nvfp4", &merged, Target::Nvfp4).unwrap();
        assert!(out.contains("nvfp4 -> nvfp4"), "{out}");
    }

    #[test]
    fn inputs_are_calibrated_on_a_text() {
        let root = tempfile::tempdir().unwrap();
        let (from, text) = (root.path().join("from"), root.path().join("text"));
        std::fs::create_dir(&from).unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(golden("qwen3_served").join(file), from.join(file)).unwrap();
        }
        let tokenizer = golden("../../crates/chat/tests/data/qwen/tokenizer.json");
        let written = "fn main() { println!(\"a text like those that will be served\"); }\n".repeat(20);
        std::fs::write(&text, &written).unwrap();
        let calibrated = |to: &Path| {
            let args = args(from.display().to_string(), to, Target::Nvfp4);
            let (mut out, mut log) = (Vec::new(), Vec::new());
            let outcome = run(&ConvertArgs { calibrate: Some(text.clone()), ..args }, &mut out, &mut log);
            outcome
                .map(|()| String::from_utf8([log, out].concat()).unwrap())
                .map_err(|error| format!("{error:#}"))
        };
        let to = root.path().join("to");
        let error = calibrated(&to).unwrap_err();
        assert!(error.contains("--calibrate: there is no tokenizer.json"), "{error}");
        std::fs::copy(&tokenizer, from.join("tokenizer.json")).unwrap();
        let said = calibrated(&to).unwrap();
        assert!(
            said.contains("calibrating on 300 tokens") && said.contains("inputs of 8 products"),
            "{said}"
        );

        // What the model met in the first 300 tokens, by 6 * 448; one factor for what is computed in one product.
        let source = Checkpoint::open(&from).unwrap();
        let wants = wants(&source).unwrap();
        let mut ids = Tokenizer::from_file(&tokenizer).unwrap().encode(&written);
        ids.truncate(300);
        let peaks = calibrate::inputs(&source, &wants, &[ids], |_| ()).unwrap();
        assert_eq!(peaks.len(), 14);
        let made = Checkpoint::open(&to).unwrap();
        for want in &wants {
            let Some(peak) = want.name.strip_suffix(".weight").and_then(|module| peaks.get(module)) else {
                continue;
            };
            let matrix = made.rows(want, 0..1).unwrap();
            let ctxserve_core::Elements::Nvfp4 { runs, .. } = matrix.elements() else { panic!("{want:?}") };
            assert_eq!(runs[0].input, Some(peak / 2688.0), "{want:?}");
        }
        // Refused before the model reads anything.
        assert!(calibrated(&to).unwrap_err().contains("is there already"));
        std::fs::write(&text, "").unwrap();
        assert!(calibrated(&root.path().join("b")).unwrap_err().contains("has no text"));
    }

    #[test]
    fn what_cannot_be_is_said() {
        let root = tempfile::tempdir().unwrap();
        let to = root.path().join("out");
        let error = format!("{:#}", convert_golden("dense", &to, Target::Nvfp4).unwrap_err());
        assert!(error.contains("this model has expert stacks"), "{error}");
        assert!(!to.exists());
        let args = args("demo", &to, Target::Bf16);
        let error = run(&args, &mut Vec::new(), &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("demo"), "{error}");
    }
}
