//! What a model wants against what is stored, from headers alone.

use std::collections::{HashMap, HashSet};

use crate::dtype::Dtype;
use crate::error::{CheckpointError, Flaw, Problem, quoted};
use crate::formats::QuantFormat;
use crate::store::{Store, Stored};

/// Problems kept for the caller; a wrong checkpoint may have one per tensor.
const KEPT: usize = 64;

/// A logical tensor that a model needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Want {
    /// Its Hugging Face name, without the suffixes of quantised storage.
    pub name: String,
    /// Its logical shape.
    pub shape: Shape,
}

/// Logical shapes. Matrices are `[out, in]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// `[len]`; the biases of an expert stack are one vector of `experts * rows`.
    Vector {
        /// Elements.
        len: usize,
    },
    /// `[rows, cols]`.
    Matrix {
        /// Output features.
        rows: usize,
        /// Input features.
        cols: usize,
    },
    /// `[experts, rows, cols]`.
    Experts {
        /// Matrices in the stack.
        experts: usize,
        /// Output features of each.
        rows: usize,
        /// Input features of each.
        cols: usize,
    },
}

/// A stored tensor that a logical one is made of.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) name: String,
    pub(crate) dtypes: &'static [Dtype],
    pub(crate) extent: Extent,
}

/// Which stored shapes will do.
#[derive(Clone, Debug)]
pub(crate) enum Extent {
    /// This one.
    Exact(Vec<usize>),
    /// One or two dimensions with this product.
    Flat(usize),
    /// One element: a scalar, or a vector of one.
    One,
}

impl Extent {
    fn fits(&self, shape: &[usize]) -> bool {
        match self {
            Self::Exact(wanted) => wanted == shape,
            Self::Flat(count) => match *shape {
                [len] => len == *count,
                [outer, inner] => outer.checked_mul(inner) == Some(*count),
                _ => false,
            },
            Self::One => matches!(shape, [] | [1]),
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::Exact(shape) => format!("{shape:?}"),
            Self::Flat(count) => format!("[{count}]"),
            Self::One => "[] or [1]".to_owned(),
        }
    }
}

impl Part {
    /// The stored tensor, if it is there with the right type and shape.
    pub(crate) fn find<'a>(&self, store: &'a Store) -> Result<Stored<'a>, Problem> {
        let types = || self.dtypes.iter().map(Dtype::to_string).collect::<Vec<_>>().join(" or ");
        let problem = |file: &str, flaw| Problem { file: file.to_owned(), tensor: quoted(&self.name), flaw };
        let Some(stored) = store.get(&self.name) else {
            let wanted = format!("{} of {}", self.extent.describe(), types());
            return Err(problem(&store.label, Flaw::Missing(wanted)));
        };
        if !self.dtypes.contains(&stored.dtype()) {
            let flaw = Flaw::Dtype { stored: stored.dtype(), wanted: types() };
            return Err(problem(stored.file(), flaw));
        }
        if !self.extent.fits(stored.shape()) {
            let flaw = Flaw::Shape { stored: stored.shape().to_vec(), wanted: self.extent.describe() };
            return Err(problem(stored.file(), flaw));
        }
        Ok(stored)
    }
}

/// Finds the stored tensors of one wanted tensor.
pub(crate) fn resolve<'a>(
    store: &'a Store,
    format: &dyn QuantFormat,
    want: &Want,
) -> Result<Vec<Stored<'a>>, CheckpointError> {
    let alone = |problem| CheckpointError::Mismatch { problems: vec![problem], total: 1 };
    let parts = format.parts(store, want).map_err(|why| alone(impossible(store, want, why)))?;
    parts.iter().map(|part| part.find(store).map_err(alone)).collect()
}

/// Compares everything wanted with everything stored.
pub(crate) fn check(store: &Store, format: &dyn QuantFormat, wants: &[Want]) -> Result<(), CheckpointError> {
    let mut problems = Vec::new();
    let mut total = 0;
    let mut report = |problem| {
        total += 1;
        if problems.len() < KEPT {
            problems.push(problem);
        }
    };
    // An expert stack's biases are stored as [experts, rows], or in halves of that: known from the matrices that they
    // belong to.
    let stacks: HashMap<&str, usize> = wants
        .iter()
        .filter_map(|want| match want.shape {
            Shape::Experts { experts, .. } if experts > 0 => Some((want.name.as_str(), experts)),
            _ => None,
        })
        .collect();
    let mut known = HashSet::new();
    for want in wants {
        let parts = match format.parts(store, want) {
            Ok(parts) => parts,
            Err(why) => {
                report(impossible(store, want, why));
                continue;
            }
        };
        for mut part in parts {
            if let Extent::Flat(count) = part.extent {
                let experts = want.name.strip_suffix("_bias").and_then(|name| stacks.get(name));
                part.extent = Extent::Exact(experts.map_or_else(|| vec![count], |&e| vec![e, count / e]));
            }
            if let Err(problem) = part.find(store) {
                report(problem);
            }
            known.insert(part.name);
        }
    }
    let extra = |stored: &Stored<'_>| !known.contains(stored.name()) && !format.ignores(stored.name());
    for stored in store.iter().filter(extra) {
        let (file, tensor) = (stored.file().to_owned(), quoted(stored.name()));
        report(Problem { file, tensor, flaw: Flaw::Extra });
    }
    if total == 0 { Ok(()) } else { Err(CheckpointError::Mismatch { problems, total }) }
}

fn impossible(store: &Store, want: &Want, why: String) -> Problem {
    let file = store.label.clone();
    Problem { file, tensor: quoted(&want.name), flaw: Flaw::Impossible(why) }
}
