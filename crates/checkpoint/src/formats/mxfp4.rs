//! Hugging Face MXFP4: expert stacks as `_blocks` and `_scales`, everything else in floats.
//!
//! `_blocks` U8 `[E, out, in/32, 16]` and `_scales` U8 `[E, out, in/32]` are byte for byte what
//! [`Elements::Mxfp4`] holds, so they are read straight into place.

use std::ops::Range;

use ctxserve_core::{Elements, MXFP4_BLOCK};

use super::{QuantFormat, Row, load_plain, misused, plain};
use crate::bytes;
use crate::check::{Extent, Part, Shape, Want};
use crate::dtype::Dtype;
use crate::error::CheckpointError;
use crate::store::{Store, Stored};

pub(super) const ROW: Row =
    Row { name: NAME, claims: |method| method == Some(NAME), open: |_| Ok(Box::new(Mxfp4)) };

const NAME: &str = "mxfp4";

#[derive(Debug)]
struct Mxfp4;

impl QuantFormat for Mxfp4 {
    fn name(&self) -> &'static str {
        NAME
    }

    fn verify(&self, store: &Store) -> Result<(), CheckpointError> {
        if store.iter().any(|tensor| tensor.name().ends_with("_blocks") && tensor.dtype() == Dtype::U8) {
            return Ok(());
        }
        let problem = "config.json declares mxfp4, but no U8 tensor here is named *_blocks".to_owned();
        Err(CheckpointError::File { file: store.label.clone(), problem })
    }

    fn parts(&self, _store: &Store, want: &Want) -> Result<Vec<Part>, String> {
        let Shape::Experts { experts, rows, cols } = want.shape else { return Ok(vec![plain(want)]) };
        if !cols.is_multiple_of(MXFP4_BLOCK) {
            return Err(format!("{cols} input features are not a multiple of {MXFP4_BLOCK}"));
        }
        let part = |suffix: &str, extent: Vec<usize>| Part {
            name: format!("{}{suffix}", want.name),
            dtypes: &[Dtype::U8],
            extent: Extent::Exact(extent),
        };
        let blocks = cols / MXFP4_BLOCK;
        Ok(vec![
            part("_blocks", vec![experts, rows, blocks, MXFP4_BLOCK / 2]),
            part("_scales", vec![experts, rows, blocks]),
        ])
    }

    fn load(
        &self,
        _store: &Store,
        want: &Want,
        parts: &[Stored<'_>],
        rows: Range<usize>,
    ) -> Result<Elements, CheckpointError> {
        match (want.shape, parts) {
            (Shape::Experts { cols, .. }, [blocks, scales]) => {
                // The small half first: a bad scale is then found before the large read.
                let scales = e8m0_scales(*scales, &rows, cols)?;
                let codes = bytes::codes(*blocks, rows.start * cols / 2..rows.end * cols / 2)?;
                Ok(Elements::Mxfp4 { codes, scales })
            }
            (Shape::Experts { .. }, _) => Err(misused(want)),
            _ => load_plain(want, parts, rows),
        }
    }
}

/// The scales of `rows` of `cols` elements; 255, E8M0's one value that is no number, is refused.
pub(super) fn e8m0_scales(
    tensor: Stored<'_>,
    rows: &Range<usize>,
    cols: usize,
) -> Result<Vec<u8>, CheckpointError> {
    let blocks = cols / MXFP4_BLOCK;
    let range = rows.start * blocks..rows.end * blocks;
    bytes::scales(tensor, range, |byte| byte == 255, ctxserve_core::e8m0)
}
