//! The suite that any backend must pass: each op against a reference backend over ragged shapes.
//!
//! Weights, tokens and schedules come from a seed that the report names, so every run can be repeated. Results
//! are read through the ops themselves: an output projection that copies heads into the residual stream, and an
//! LM head that copies the residual stream into logits. Channel 0 of that stream is a constant which no op may
//! touch, so that the final norm cannot hide an error of scale.

mod cases;
mod fixture;
mod random;
mod schedule;

use std::fmt;

use ctxserve_core::{Encoding, MXFP4_BLOCK};

use crate::{Backend, DeviceError, KvDtype};

pub use random::Random;

/// What a backend claims, and is held to.
#[derive(Clone, Debug)]
pub struct Claims {
    /// Largest relative L2 error of any row after one op on exact weights.
    pub exact: f64,
    /// The same after an op whose weights or activations the backend quantises.
    pub products: f64,
    /// Rows are bitwise the same whatever their neighbours, chunks and page size. Otherwise `products` bounds
    /// the difference.
    pub bitwise: bool,
    /// KV storages to test; the first serves where storage is not what is tested.
    pub kv: Vec<KvDtype>,
    /// Encodings of experts that are taken; the first serves in place of others.
    pub experts: Vec<Encoding>,
    /// Page sizes that are taken, ascending; the next larger one, or the largest, serves in place of others. Empty: any.
    pub page_sizes: Vec<usize>,
    /// What has no kernels yet, and why. Cases do without it, and the report says so. For matrices that [`Backend::accepts`]
    /// refuses it need not be said.
    pub lacks: Vec<(Feature, &'static str)>,
}

/// What a backend may lack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// [`Backend::mlp`]; experts take its place.
    Mlp,
    /// [`crate::AttentionInput::head_norms`].
    HeadNorms,
    /// Heads of more than 64 elements; heads of 64 take their place.
    WideHeads,
}

impl Claims {
    fn has(&self, feature: Feature) -> bool {
        self.lacks.iter().all(|(lacking, _)| *lacking != feature)
    }

    /// A shape as the backend takes it.
    fn fit(&self, mut shape: fixture::Shape) -> fixture::Shape {
        if !self.kv.contains(&shape.kv) {
            shape.kv = self.kv.first().copied().unwrap_or(shape.kv);
        }
        if !self.experts.contains(&shape.expert) {
            shape.expert = self.experts.first().copied().unwrap_or(shape.expert);
            // FP4 comes in blocks along a row, and rows are as long as the widths.
            shape.inner = shape.inner.next_multiple_of(MXFP4_BLOCK);
            shape.extra = shape.extra.next_multiple_of(MXFP4_BLOCK);
        }
        shape.head_norms &= self.has(Feature::HeadNorms);
        shape.mlp &= self.has(Feature::Mlp);
        if !self.has(Feature::WideHeads) {
            shape.head_dim = shape.head_dim.min(64);
        }
        let larger = self.page_sizes.iter().find(|&&size| size >= shape.page_size);
        shape.page_size = larger.or(self.page_sizes.last()).copied().unwrap_or(shape.page_size);
        shape
    }
}

/// One comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// Op and shape.
    pub name: String,
    /// Largest relative L2 error of a row; infinite where one side is not finite.
    pub error: f64,
    /// What was allowed.
    pub limit: f64,
}

/// All comparisons of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Seed of every input.
    pub seed: u64,
    /// In the order they ran.
    pub cases: Vec<Case>,
    /// What was left out, and why.
    pub skipped: Vec<String>,
}

impl Report {
    /// The comparisons beyond their limit.
    pub fn failures(&self) -> impl Iterator<Item = &Case> {
        self.cases.iter().filter(|case| case.error > case.limit)
    }

    /// The largest error of the cases whose name contains `part`.
    pub fn worst(&self, part: &str) -> f64 {
        let errors = self.cases.iter().filter(|case| case.name.contains(part)).map(|case| case.error);
        errors.fold(0.0, f64::max)
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, error, limit } = self;
        write!(f, "{name}: error {error:.3e}, limit {limit:.3e}")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let failed = self.failures().count();
        writeln!(f, "seed {}: {} cases, {failed} failed", self.seed, self.cases.len())?;
        self.failures().try_for_each(|case| writeln!(f, "  {case}"))?;
        self.skipped.iter().try_for_each(|what| writeln!(f, "  skipped: {what}"))?;
        Ok(())
    }
}

/// What the layer of [`quick`] takes from a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Like {
    /// Elements per head.
    pub head_dim: usize,
    /// Query heads per key/value head.
    pub group: usize,
    /// Experts; 0 is a dense layer.
    pub experts: usize,
    /// Experts of a token, at most `experts`.
    pub top_k: usize,
    /// Whether query and key heads have norms.
    pub head_norms: bool,
    /// How projections are stored, and the dense layer.
    pub dense: Encoding,
    /// How experts are stored.
    pub expert: Encoding,
}

/// Runs each op, few rows and many (up to 400 of as many sequences), on one small layer like a model's: what a server can wait for.
/// [`run`] is the whole suite.
///
/// # Errors
/// What a backend's own ops return; a disagreement is in the [`Report`].
pub fn quick<B: Backend, R: Backend>(
    seed: u64,
    claims: &Claims,
    like: Like,
    make: impl Fn() -> Result<B, DeviceError>,
    reference: impl Fn() -> Result<R, DeviceError>,
) -> Result<Report, DeviceError> {
    let mut suite = cases::Suite::new(seed, claims);
    suite.quick(like, &make, &reference)?;
    Ok(suite.report(seed))
}

/// Runs every case on backends from `make`, against backends from `reference`.
///
/// # Errors
/// What a backend's own ops return; a disagreement is in the [`Report`].
pub fn run<B: Backend, R: Backend>(
    seed: u64,
    claims: &Claims,
    make: impl Fn() -> Result<B, DeviceError>,
    reference: impl Fn() -> Result<R, DeviceError>,
) -> Result<Report, DeviceError> {
    let mut suite = cases::Suite::new(seed, claims);
    suite.products(&make, &reference)?;
    suite.attention(&make, &reference)?;
    suite.independence(&make)?;
    suite.sampling(&make, &reference)?;
    suite.feeds(&make)?;
    suite.shared(&make)?;
    Ok(suite.report(seed))
}
