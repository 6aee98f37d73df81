//! `convert`: a checkpoint in another format.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::Context;
use ctxserve_checkpoint::{Checkpoint, Conversion, ConvertReport, Target, convert};
use ctxserve_engine::Bytes;
use ctxserve_models::wants;
use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::checkpoints::ConvertArgs;
use crate::source;

/// Tensors that are shown.
const WORST: usize = 10;
/// Time between two lines of progress where there is no terminal.
const REPORT_EVERY: Duration = Duration::from_secs(10);
const TEMPLATE: &str = "{bar:30} {bytes:>11} / {total_bytes:<11} {bytes_per_sec:>12} {eta:>5}  {msg}";

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
    let conversion = Conversion {
        source: &source,
        wants: &wants,
        target: args.target,
        to: &args.to,
        shard_bytes: args.shard_bytes,
    };
    let (from, total) = (source.format_name(), source.total_bytes());
    writeln!(
        log,
        "{}: {from} of {}, to {} in {}",
        dir.display(),
        size(total),
        args.target,
        args.to.display()
    )?;
    let mut lines = Lines::new(total);
    let report = convert(&conversion, &mut |at| lines.at(log, at.done, at.tensor))
        .with_context(|| format!("converting {}", dir.display()))?;
    lines.bar.finish_and_clear();
    print(&report, out)?;
    writeln!(out, "{} in {:.0} s", args.to.display(), start.elapsed().as_secs_f64())?;
    Ok(())
}

fn size(bytes: u64) -> Bytes {
    Bytes(usize::try_from(bytes).unwrap_or(usize::MAX))
}

/// A bar on a terminal, a line now and then elsewhere.
struct Lines {
    bar: ProgressBar,
    reported: Option<Instant>,
    total: u64,
}

impl Lines {
    fn new(total: u64) -> Self {
        let bar = ProgressBar::new(total);
        if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
            bar.set_style(style);
        }
        Self { bar, reported: (!std::io::stderr().is_terminal()).then(Instant::now), total }
    }

    fn at(&mut self, log: &mut impl Write, done: u64, tensor: &str) {
        self.bar.set_position(done);
        self.bar.set_message(tensor.to_owned());
        if let Some(reported) = &mut self.reported
            && reported.elapsed() >= REPORT_EVERY
        {
            *reported = Instant::now();
            // Whoever closed it does not want to know.
            let _ = writeln!(log, "{} of {}: {tensor}", size(done), size(self.total));
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
    if report.to == Target::Nvfp4 {
        writeln!(out, "inputs were not calibrated: where there was no input_scale, 1.0 was written")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::*;

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name)
    }

    fn convert_golden(name: &str, to: &Path, target: Target) -> anyhow::Result<String> {
        let source = golden(name).display().to_string();
        let args = ConvertArgs { source, to: to.to_owned(), target, shard_bytes: 1 << 20 };
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
        let args = ConvertArgs {
            source: packed.display().to_string(),
            to: dense,
            target: Target::Bf16,
            shard_bytes: 1 << 30,
        };
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
    fn what_cannot_be_is_said() {
        let root = tempfile::tempdir().unwrap();
        let to = root.path().join("out");
        let error = format!("{:#}", convert_golden("dense", &to, Target::Nvfp4).unwrap_err());
        assert!(error.contains("this model has expert stacks"), "{error}");
        assert!(!to.exists());
        let args = ConvertArgs { source: "demo".to_owned(), to, target: Target::Bf16, shard_bytes: 1 };
        let error = run(&args, &mut Vec::new(), &mut Vec::new()).unwrap_err().to_string();
        assert!(error.contains("demo"), "{error}");
    }
}
