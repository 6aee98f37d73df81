//! Plain floating-point tensors into memory, in bounded pieces, each checked while it is in the cache.

use std::ops::Range;

use bytemuck::Pod;
use ctxserve_core::Elements;
use half::{bf16, f16};

use crate::dtype::Dtype;
use crate::error::CheckpointError;
use crate::parallel;
use crate::store::Stored;

/// Bytes per read where each piece is looked at or converted.
pub(crate) const PIECE: usize = 4 << 20;

/// The types that [`vector`] and [`elements`] read.
pub(crate) const FLOATS: &[Dtype] = &[Dtype::BF16, Dtype::F16, Dtype::F32];

/// A float as stored. `Wide` is what it becomes in memory: half precision has no encoding of its own there,
/// and bfloat16 would lose digits of it.
pub(crate) trait Float: Pod + Send + Sync {
    type Wide: Pod + Send + Sync;
    fn widen(self) -> Self::Wide;
    fn to_f32(self) -> f32;
    /// Exponent all ones: infinite or not a number.
    fn is_special(self) -> bool;
}

impl Float for bf16 {
    type Wide = Self;
    fn widen(self) -> Self {
        self
    }
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
    fn is_special(self) -> bool {
        self.to_bits() & 0x7f80 == 0x7f80
    }
}

impl Float for f16 {
    type Wide = f32;
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn to_f32(self) -> f32 {
        self.to_f32()
    }
    fn is_special(self) -> bool {
        self.to_bits() & 0x7c00 == 0x7c00
    }
}

impl Float for f32 {
    type Wide = Self;
    fn widen(self) -> Self {
        self
    }
    fn to_f32(self) -> f32 {
        self
    }
    fn is_special(self) -> bool {
        self.to_bits() & 0x7f80_0000 == 0x7f80_0000
    }
}

/// Reads elements `first..first + into.len()`, all of which must be finite.
pub(crate) fn read<T: Float>(
    tensor: Stored<'_>,
    first: usize,
    into: &mut [T],
) -> Result<(), CheckpointError> {
    let mut at = first;
    for piece in into.chunks_mut(PIECE / size_of::<T>()) {
        tensor.read_at(at * size_of::<T>(), bytemuck::cast_slice_mut(piece))?;
        // Without a branch per element this runs at the speed of memory.
        if piece.iter().fold(false, |any, value| any | value.is_special()) {
            let inside = piece.iter().position(|value| value.is_special()).unwrap_or_default();
            let value = piece.get(inside).map_or(f32::NAN, |value| value.to_f32());
            let index = coordinates(at + inside, tensor.shape());
            return Err(tensor.error(format!("element {index:?} is {value}")));
        }
        at += piece.len();
    }
    Ok(())
}

/// A whole tensor as f32.
pub(crate) fn vector(tensor: Stored<'_>) -> Result<Vec<f32>, CheckpointError> {
    f32s(tensor, 0..tensor.count())
}

/// Elements `range` of a tensor as f32.
pub(crate) fn f32s(tensor: Stored<'_>, range: Range<usize>) -> Result<Vec<f32>, CheckpointError> {
    fn converted<T: Float>(tensor: Stored<'_>, range: Range<usize>) -> Result<Vec<f32>, CheckpointError> {
        let mut values = tensor.allocate::<T>(range.len())?;
        read(tensor, range.start, &mut values)?;
        Ok(values.into_iter().map(T::to_f32).collect())
    }
    match tensor.dtype() {
        Dtype::F32 => converted::<f32>(tensor, range),
        Dtype::BF16 => converted::<bf16>(tensor, range),
        Dtype::F16 => converted::<f16>(tensor, range),
        other => Err(unreadable(tensor, other)),
    }
}

/// Elements `range` of a tensor in its own precision; half precision becomes f32.
pub(crate) fn elements(tensor: Stored<'_>, range: Range<usize>) -> Result<Elements, CheckpointError> {
    fn same<T: Float>(tensor: Stored<'_>, range: Range<usize>) -> Result<Vec<T>, CheckpointError> {
        let mut values = tensor.allocate::<T>(range.len())?;
        parallel::pieces(&mut values, PIECE / size_of::<T>(), |at, piece| {
            read(tensor, range.start + at, piece)
        })?;
        Ok(values)
    }
    match tensor.dtype() {
        Dtype::F32 => same(tensor, range).map(Elements::F32),
        Dtype::BF16 => same(tensor, range).map(Elements::Bf16),
        Dtype::F16 => {
            let mut values = tensor.allocate::<f32>(range.len())?;
            parallel::pieces(&mut values, PIECE / size_of::<f16>(), |at, piece| {
                let mut halves = tensor.allocate::<f16>(piece.len())?;
                read(tensor, range.start + at, &mut halves)?;
                for (value, half) in piece.iter_mut().zip(halves) {
                    *value = half.to_f32();
                }
                Ok(())
            })?;
            Ok(Elements::F32(values))
        }
        other => Err(unreadable(tensor, other)),
    }
}

/// Formats ask for [`FLOATS`] only, so this says that one forgot to.
pub(crate) fn unreadable(tensor: Stored<'_>, dtype: Dtype) -> CheckpointError {
    tensor.error(format!("{dtype} is not a floating-point type that is read"))
}

/// Row-major coordinates of the element with this linear index.
pub(crate) fn coordinates(mut index: usize, shape: &[usize]) -> Vec<usize> {
    let mut out: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&dim| {
            let at = index.checked_rem(dim).unwrap_or(0);
            index = index.checked_div(dim).unwrap_or(0);
            at
        })
        .collect();
    out.reverse();
    out
}
