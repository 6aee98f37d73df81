//! Hugging Face MXFP4: expert stacks as `_blocks` and `_scales`, everything else in floats.
//!
//! `_blocks` U8 `[E, out, in/32, 16]` and `_scales` U8 `[E, out, in/32]` are byte for byte what
//! [`Elements::Mxfp4`] holds, so they are read straight into place.

use ctxserve_core::{Elements, MXFP4_BLOCK};

use super::{QuantFormat, load_plain, misused, plain};
use crate::check::{Extent, Part, Shape, Want};
use crate::dtype::Dtype;
use crate::error::CheckpointError;
use crate::parallel;
use crate::store::{Store, Stored};
use crate::values::{PIECE, coordinates};

/// E8M0's one value that is no number.
const NAN_SCALE: u8 = 255;

#[derive(Debug)]
pub(super) struct Mxfp4;

impl QuantFormat for Mxfp4 {
    fn name(&self) -> &'static str {
        "mxfp4"
    }

    fn claims(&self, method: Option<&str>) -> bool {
        method == Some("mxfp4")
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

    fn load(&self, _store: &Store, want: &Want, parts: &[Stored<'_>]) -> Result<Elements, CheckpointError> {
        match (want.shape, parts) {
            (Shape::Experts { .. }, [blocks, scales]) => {
                // The small half first: a bad scale is then found before the large read.
                let scales = read_scales(*scales)?;
                let mut codes = blocks.allocate(blocks.bytes())?;
                parallel::pieces(&mut codes, PIECE, |first, piece| blocks.read_at(first, piece))?;
                Ok(Elements::Mxfp4 { codes, scales })
            }
            (Shape::Experts { .. }, _) => Err(misused(want)),
            _ => load_plain(want, parts),
        }
    }
}

fn read_scales(tensor: Stored<'_>) -> Result<Vec<u8>, CheckpointError> {
    let mut scales = tensor.allocate(tensor.bytes())?;
    parallel::pieces(&mut scales, PIECE, |first, piece: &mut [u8]| {
        tensor.read_at(first, piece)?;
        // Without a branch per byte this runs at the speed of memory.
        if !piece.iter().fold(false, |any, &scale| any | (scale == NAN_SCALE)) {
            return Ok(());
        }
        let inside = piece.iter().position(|&scale| scale == NAN_SCALE).unwrap_or_default();
        let at = coordinates(first + inside, tensor.shape());
        Err(tensor.error(format!("scale {at:?} is NaN (byte {NAN_SCALE})")))
    })?;
    Ok(scales)
}
