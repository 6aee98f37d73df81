//! Expert stacks stored `[E, in, out]` into `[E, out, in]`, and back.

use std::convert::Infallible;
use std::ops::Range;

use bytemuck::Pod;
use ctxserve_core::Elements;
use half::{bf16, f16};

use crate::dtype::Dtype;
use crate::error::CheckpointError;
use crate::parallel;
use crate::store::Stored;
use crate::values::{self, Float, PIECE};

/// Side of the square that is transposed at once: two squares of f32 stay in the first-level cache.
const TILE: usize = 32;

/// Reads `experts` of a stack stored `[E, cols, rows]` and returns their elements as `[experts, rows, cols]`. Besides
/// the result it holds a few megabytes a thread.
pub(crate) fn read(
    tensor: Stored<'_>,
    experts: Range<usize>,
    rows: usize,
    cols: usize,
) -> Result<Elements, CheckpointError> {
    match tensor.dtype() {
        Dtype::F32 => stack::<f32>(tensor, experts, rows, cols).map(Elements::F32),
        Dtype::BF16 => stack::<bf16>(tensor, experts, rows, cols).map(Elements::Bf16),
        Dtype::F16 => stack::<f16>(tensor, experts, rows, cols).map(Elements::F32),
        other => Err(values::unreadable(tensor, other)),
    }
}

fn stack<T: Float>(
    tensor: Stored<'_>,
    experts: Range<usize>,
    rows: usize,
    cols: usize,
) -> Result<Vec<T::Wide>, CheckpointError> {
    let held = |&count: &usize| count <= tensor.count();
    let Some(end) = experts.end.checked_mul(rows).and_then(|out| out.checked_mul(cols)).filter(held) else {
        let (shape, end) = (tensor.shape(), experts.end);
        return Err(tensor.error(format!("shape {shape:?} does not hold [{end}, {cols}, {rows}]")));
    };
    let mut out = tensor.allocate::<T::Wide>(end.saturating_sub(experts.start * rows * cols))?;
    if out.is_empty() {
        return Ok(out);
    }
    // Whole tiles of input features per read, at least one.
    let strip = (PIECE / size_of::<T>() / rows / TILE * TILE).clamp(TILE, cols.next_multiple_of(TILE));
    parallel::pieces(&mut out, rows * cols, |at, out| {
        let expert = experts.start + at / (rows * cols);
        let mut scratch = tensor.allocate::<T>(strip.min(cols) * rows)?;
        for first in (0..cols).step_by(strip) {
            let height = strip.min(cols - first);
            let part = &mut scratch[..height * rows];
            values::read(tensor, (expert * cols + first) * rows, part)?;
            place(part, rows, out, cols, first);
        }
        Ok(())
    })?;
    Ok(out)
}

/// `[rows, cols]` as `[cols, rows]`.
pub(crate) fn turned<T: Pod + Send + Sync>(values: &[T], rows: usize, cols: usize) -> Vec<T> {
    let mut out = vec![T::zeroed(); values.len()];
    let Ok(()) = parallel::pieces(&mut out, rows * TILE, |at, strip| {
        // `rows` is not zero where there is a piece.
        let first = at / rows;
        for top in (0..rows).step_by(TILE) {
            let tall = TILE.min(rows - top);
            for (col, line) in (first..).zip(strip.chunks_exact_mut(rows)) {
                for (row, value) in (top..top + tall).zip(&mut line[top..top + tall]) {
                    *value = values[row * cols + col];
                }
            }
        }
        Ok::<_, Infallible>(())
    });
    out
}

/// Writes `part` `[height, rows]` as columns `first..first + height` of `out` `[rows, cols]`.
fn place<T: Float>(part: &[T], rows: usize, out: &mut [T::Wide], cols: usize, first: usize) {
    let height = part.len() / rows;
    for top in (0..height).step_by(TILE) {
        let tall = TILE.min(height - top);
        for left in (0..rows).step_by(TILE) {
            for row in left..rows.min(left + TILE) {
                let line = &mut out[row * cols + first + top..][..tall];
                for (i, value) in line.iter_mut().enumerate() {
                    *value = part[(top + i) * rows + row].widen();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turned_twice_is_as_it_was() {
        for (rows, cols) in [(0, 0), (1, 1), (3, 100), (100, 33), (70, 70)] {
            let values: Vec<u32> = (0..(rows * cols) as u32).collect();
            let out = turned(&values, rows, cols);
            for (i, &value) in out.iter().enumerate() {
                assert_eq!(value as usize, (i % rows) * cols + i / rows, "{rows} x {cols}");
            }
            assert_eq!(turned(&out, cols, rows), values);
        }
    }
}
