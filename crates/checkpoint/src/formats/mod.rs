//! Storage formats, one file and one row each.
//!
//! Which one a checkpoint has is read from its configuration and checked against its tensors; its name says
//! nothing (one repository called "MXFP4" holds something else).

mod declared;
mod dense;
mod excluded;
mod mlx;
mod mxfp4;
mod nvfp4;

use std::fmt::Debug;
use std::ops::Range;
use std::path::Path;

use ctxserve_core::{Elements, Encoding};
use serde_json::Value;

use crate::check::{Extent, Part, Shape, Want};
use crate::error::{CheckpointError, clipped};
use crate::store::{Store, Stored};
use crate::values::{self, FLOATS};
use declared::{Declared, declared};

/// A storage format as the table knows it.
struct Row {
    name: &'static str,
    /// Whether it stores what the configuration declares; `None` is no quantisation.
    claims: fn(Option<&str>) -> bool,
    /// Reads what the configuration says beyond the method.
    open: fn(Option<&Declared<'_>>) -> Opened,
}

/// A format that holds what the configuration says, or what is wrong with the configuration.
type Opened = Result<Box<dyn QuantFormat>, String>;

/// The first row that claims a method opens it.
const FORMATS: &[Row] = &[mxfp4::ROW, nvfp4::MODELOPT, nvfp4::COMPRESSED_TENSORS, mlx::ROW, dense::ROW];

/// How logical tensors are stored.
pub(crate) trait QuantFormat: Debug + Send + Sync {
    /// Name for messages, and of the kernel that reads it packed.
    fn name(&self) -> &'static str;

    /// Whether the tensors are what the configuration says, as far as names and types show.
    fn verify(&self, store: &Store) -> Result<(), CheckpointError>;

    /// The stored tensors that `want` is made of, whether or not they exist. The error says why `want` cannot
    /// be stored so at all.
    fn parts(&self, store: &Store, want: &Want) -> Result<Vec<Part>, String>;

    /// Whether a tensor of this name belongs to the format and says nothing that is needed here.
    fn ignores(&self, _name: &str) -> bool {
        false
    }

    /// How a matrix of these parts, which are no floats, is encoded.
    fn packed(&self, _parts: &[Stored<'_>]) -> Encoding {
        Encoding::Mxfp4
    }

    /// Reads rows of a matrix or an expert stack, `[out, in]`, from the tensors that [`Self::parts`] named, in that order
    /// and known to have the types and shapes it asked for. `rows` lies within the logical tensor; of a stack, whose
    /// rows are counted through, it is whole experts.
    fn load(
        &self,
        store: &Store,
        want: &Want,
        parts: &[Stored<'_>],
        rows: Range<usize>,
    ) -> Result<Elements, CheckpointError>;

    /// Reads a whole vector from its parts.
    fn vector(&self, want: &Want, parts: &[Stored<'_>]) -> Result<Vec<f32>, CheckpointError> {
        match parts {
            [tensor] => values::vector(*tensor),
            _ => Err(misused(want)),
        }
    }
}

/// Picks the format for a configuration and its tensors. `dir` names files in messages.
pub(crate) fn detect(
    dir: Option<&Path>,
    config: &Value,
    hf_quant_config: Option<&Value>,
    store: &Store,
) -> Result<Box<dyn QuantFormat>, CheckpointError> {
    let path = |name: &str| {
        dir.map_or_else(|| format!("<memory>/{name}"), |dir| dir.join(name).display().to_string())
    };
    let declared = declared(config, hf_quant_config)
        .map_err(|problem| CheckpointError::File { file: path("config.json"), problem })?;
    let method = declared.as_ref().map(|declared| declared.method.as_str());
    let file = || path(declared.as_ref().map_or("config.json", |declared| declared.file));
    let Some(row) = FORMATS.iter().find(|row| (row.claims)(method)) else {
        let mut names: Vec<&str> = FORMATS.iter().map(|row| row.name).collect();
        names.dedup();
        return Err(CheckpointError::UnsupportedQuantization {
            file: file(),
            method: clipped(method.unwrap_or("none")),
            supported: names.join(", "),
        });
    };
    let format = (row.open)(declared.as_ref())
        .map_err(|problem| CheckpointError::File { file: file(), problem: clipped(&problem) })?;
    format.verify(store)?;
    Ok(format)
}

/// The module that a matrix `MODULE.weight` belongs to.
fn module(want: &Want) -> Option<&str> {
    match want.shape {
        Shape::Matrix { .. } => want.name.strip_suffix(".weight"),
        Shape::Vector { .. } | Shape::Experts { .. } => None,
    }
}

/// A tensor stored under its own name as floats: vectors, and `[rows, cols]` matrices.
fn plain(want: &Want) -> Part {
    let extent = match want.shape {
        Shape::Vector { len } => Extent::Flat(len),
        Shape::Matrix { rows, cols } => Extent::Exact(vec![rows, cols]),
        Shape::Experts { experts, rows, cols } => Extent::Exact(vec![experts, rows, cols]),
    };
    Part { name: want.name.clone(), dtypes: FLOATS, extent }
}

/// Reads what [`plain`] described.
fn load_plain(want: &Want, parts: &[Stored<'_>], rows: Range<usize>) -> Result<Elements, CheckpointError> {
    let (Shape::Matrix { cols, .. } | Shape::Experts { cols, .. }, [tensor]) = (want.shape, parts) else {
        return Err(misused(want));
    };
    values::elements(*tensor, rows.start * cols..rows.end * cols)
}

/// A format was given other parts than it asked for: a defect here, not in a file.
pub(crate) fn misused(want: &Want) -> CheckpointError {
    CheckpointError::Tensor {
        file: "<checkpoint>".to_owned(),
        tensor: crate::error::quoted(&want.name),
        problem: "is not stored in the parts that its format names".to_owned(),
    }
}
