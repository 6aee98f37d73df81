//! Packed codes and one-byte scales, read as they are stored.

use std::ops::Range;

use crate::error::CheckpointError;
use crate::parallel;
use crate::store::Stored;
use crate::values::{PIECE, coordinates};

/// Bytes `range` of a tensor.
pub(crate) fn codes(tensor: Stored<'_>, range: Range<usize>) -> Result<Vec<u8>, CheckpointError> {
    let mut codes = tensor.allocate(range.len())?;
    parallel::pieces(&mut codes, PIECE, |at, piece| tensor.read_at(range.start + at, piece))?;
    Ok(codes)
}

/// Scales `range` of a tensor of one byte an element. Those that are `bad` are refused, shown by their `value`.
pub(crate) fn scales(
    tensor: Stored<'_>,
    range: Range<usize>,
    bad: impl Fn(u8) -> bool + Sync,
    value: fn(u8) -> f32,
) -> Result<Vec<u8>, CheckpointError> {
    let mut scales = tensor.allocate(range.len())?;
    parallel::pieces(&mut scales, PIECE, |at, piece: &mut [u8]| {
        let first = range.start + at;
        tensor.read_at(first, piece)?;
        // Without a branch per byte this runs at the speed of memory.
        if !piece.iter().fold(false, |any, &scale| any | bad(scale)) {
            return Ok(());
        }
        let inside = piece.iter().position(|&scale| bad(scale)).unwrap_or_default();
        let byte = piece.get(inside).copied().unwrap_or_default();
        let place = coordinates(first + inside, tensor.shape());
        Err(tensor.error(format!("scale {place:?} is {} (byte {byte})", value(byte))))
    })?;
    Ok(scales)
}
