//! What can be wrong with a checkpoint, always with the file and, where there is one, the tensor.

use std::fmt;
use std::path::PathBuf;

use thiserror::Error;

use crate::dtype::Dtype;

/// Problems listed in full by the message of [`CheckpointError::Mismatch`]; the rest are counted.
const SHOWN: usize = 6;

/// A checkpoint that cannot be used, and why.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// The operating system refused.
    #[error("{file}: {source}")]
    Io {
        /// Path of the file.
        file: String,
        /// The system's answer.
        source: std::io::Error,
    },
    /// No directory at this path.
    #[error("{path}: not a directory")]
    NotADirectory {
        /// What was asked for.
        path: PathBuf,
    },
    /// A file that every checkpoint has is absent.
    #[error("{file}: file not found{hint}")]
    MissingFile {
        /// Path of the file.
        file: String,
        /// Empty, or what is there instead, beginning with "; ".
        hint: String,
    },
    /// A file is larger than any honest one.
    #[error("{file}: {bytes} bytes, at most {limit} are accepted")]
    TooLarge {
        /// Path of the file.
        file: String,
        /// Its length.
        bytes: u64,
        /// The most that is read.
        limit: u64,
    },
    /// A configuration, index or header that cannot be right as a whole.
    #[error("{file}: {problem}")]
    File {
        /// Path of the file.
        file: String,
        /// What is wrong with it.
        problem: String,
    },
    /// One tensor is wrong.
    #[error("{file}: tensor {tensor}: {problem}")]
    Tensor {
        /// Path of the file.
        file: String,
        /// The stored name, quoted and shortened for display.
        tensor: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The configuration asks for a quantisation that no format here reads.
    #[error("{file}: quantization {method} is not supported (supported: {supported})")]
    UnsupportedQuantization {
        /// Path of the configuration.
        file: String,
        /// The method it names.
        method: String,
        /// Names of the formats that can be read.
        supported: String,
    },
    /// The stored tensors are not the ones that the model needs.
    #[error("{}", summary(problems, *total))]
    Mismatch {
        /// The first problems, at most a few dozen.
        problems: Vec<Problem>,
        /// How many there are in all.
        total: usize,
    },
    /// The host has not enough memory for one tensor.
    #[error("{file}: tensor {tensor}: no memory for {bytes} bytes")]
    OutOfMemory {
        /// Path of the file.
        file: String,
        /// The stored name, quoted and shortened for display.
        tensor: String,
        /// What was asked for.
        bytes: usize,
    },
}

/// One disagreement between what a model wants and what is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The file that holds the tensor, or that should.
    pub file: String,
    /// The stored name, quoted and shortened for display.
    pub tensor: String,
    /// The disagreement.
    pub flaw: Flaw,
}

/// Kinds of disagreement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// Wanted and absent; the text describes what was wanted.
    Missing(String),
    /// Present and wanted by nothing.
    Extra,
    /// Stored with another shape.
    Shape {
        /// The stored shape.
        stored: Vec<usize>,
        /// The shape or shapes that would do.
        wanted: String,
    },
    /// Stored with another element type.
    Dtype {
        /// The stored type.
        stored: Dtype,
        /// The types that would do.
        wanted: String,
    },
    /// The wanted tensor cannot exist in this format.
    Impossible(String),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: tensor {} ", self.file, self.tensor)?;
        match &self.flaw {
            Flaw::Missing(wanted) => write!(f, "is missing, wanted {wanted}"),
            Flaw::Extra => write!(f, "is not part of the model"),
            Flaw::Shape { stored, wanted } => write!(f, "has shape {stored:?}, wanted {wanted}"),
            Flaw::Dtype { stored, wanted } => write!(f, "has dtype {stored}, wanted {wanted}"),
            Flaw::Impossible(why) => write!(f, "cannot be read: {why}"),
        }
    }
}

impl std::error::Error for Problem {}

fn summary(problems: &[Problem], total: usize) -> String {
    let shown: Vec<String> = problems.iter().take(SHOWN).map(Problem::to_string).collect();
    let rest = total.saturating_sub(shown.len());
    let more = if rest > 0 { format!("\n  and {rest} more") } else { String::new() };
    match (total, shown.as_slice()) {
        (1, [only]) => only.clone(),
        _ => format!("{total} tensors do not fit the model:\n  {}{more}", shown.join("\n  ")),
    }
}

/// Quotes a string from a file for display: escapes control characters and cuts what is too long.
pub(crate) fn quoted(text: &str) -> String {
    const MOST: usize = 120;
    let cut: String = text.chars().take(MOST).collect();
    if cut.len() < text.len() { format!("{cut:?}... ({} bytes)", text.len()) } else { format!("{cut:?}") }
}

/// Cuts a message that may echo a file's content.
pub(crate) fn clipped(text: &str) -> String {
    const MOST: usize = 300;
    let mut out: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MOST).collect();
    if out.len() < text.len() {
        out.push_str("...");
    }
    out
}
