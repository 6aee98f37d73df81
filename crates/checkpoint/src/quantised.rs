//! Expert stacks that are quantised to MXFP4 while they are read.

use std::ops::Range;

use ctxserve_core::{Elements, MXFP4_BLOCK, Matrix};

use crate::check::{Shape, Want};
use crate::convert::encode_rows;
use crate::error::{CheckpointError, quoted};
use crate::formats::misused;
use crate::parallel;

/// What is known of a checkpoint that is read so.
#[derive(Debug)]
pub(crate) struct Quantised {
    /// Bytes of all tensors together, experts quantised.
    pub(crate) total_bytes: u64,
}

impl Quantised {
    /// Of a model whose tensors are `wants` and take `total` bytes, `stored(want)` of them one tensor.
    pub(crate) fn new(
        wants: &[Want],
        total: u64,
        stored: impl Fn(&Want) -> Result<u64, CheckpointError>,
    ) -> Result<Self, CheckpointError> {
        let (mut total_bytes, mut found) = (total, false);
        for want in wants {
            let Shape::Experts { experts, rows, cols } = want.shape else { continue };
            found = true;
            if !cols.is_multiple_of(MXFP4_BLOCK) {
                return Err(unfit(
                    &want.name,
                    format!("{cols} inputs are not whole blocks of {MXFP4_BLOCK}"),
                ));
            }
            total_bytes = (total_bytes - stored(want)?.min(total_bytes)) + bytes(experts, rows, cols);
        }
        if !found {
            let problem = "this model has no expert stacks, and only these are quantised".to_owned();
            return Err(CheckpointError::File { file: "<checkpoint>".to_owned(), problem });
        }
        Ok(Self { total_bytes })
    }
}

fn unfit(name: &str, problem: String) -> CheckpointError {
    CheckpointError::Tensor { file: "<checkpoint>".to_owned(), tensor: quoted(name), problem }
}

/// Bytes of a quantised stack.
pub(crate) fn bytes(experts: usize, rows: usize, cols: usize) -> u64 {
    let elements = experts as u64 * rows as u64 * cols as u64;
    elements / 2 + elements / MXFP4_BLOCK as u64
}

/// Quantises the experts of `range` by several threads, each of which has one expert in memory as `read` gives it.
pub(crate) fn read(
    want: &Want,
    range: Range<usize>,
    read: impl Fn(Range<usize>) -> Result<Matrix, CheckpointError> + Sync,
) -> Result<Matrix, CheckpointError> {
    let Shape::Experts { experts, rows, cols } = want.shape else { return Err(misused(want)) };
    if range.start > range.end || range.end > experts {
        return Err(misused(want));
    }
    let mut packed = vec![(Vec::new(), Vec::new()); range.len()];
    parallel::pieces(&mut packed, 1, |at, pieces| {
        let expert = read(range.start + at..range.start + at + 1)?;
        for piece in pieces {
            *piece = match expert.elements() {
                Elements::Mxfp4 { codes, scales } => (codes.clone(), scales.clone()),
                _ => encode_rows(&expert),
            };
        }
        Ok(())
    })?;
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    codes.reserve_exact(packed.iter().map(|(codes, _)| codes.len()).sum());
    scales.reserve_exact(packed.iter().map(|(_, scales)| scales.len()).sum());
    for (more_codes, more_scales) in packed {
        codes.extend(more_codes);
        scales.extend(more_scales);
    }
    Matrix::new(range.len() * rows, cols, Elements::Mxfp4 { codes, scales }).ok_or_else(|| misused(want))
}
