//! Two matrices into one, row by row in turns.

use bytemuck::Pod;
use ctxserve_core::Elements;

use crate::parallel;
use crate::values::PIECE;

/// The rows of `even` and `odd`, `rows` each, in turns; `None` when they are not stored alike.
pub(crate) fn rows(even: &Elements, odd: &Elements, rows: usize) -> Option<Elements> {
    Some(match (even, odd) {
        (Elements::F32(a), Elements::F32(b)) => Elements::F32(in_turns(a, b, rows)?),
        (Elements::Bf16(a), Elements::Bf16(b)) => Elements::Bf16(in_turns(a, b, rows)?),
        (Elements::Mxfp4 { codes: a, scales: s }, Elements::Mxfp4 { codes: b, scales: t }) => {
            Elements::Mxfp4 { codes: in_turns(a, b, rows)?, scales: in_turns(s, t, rows)? }
        }
        (
            Elements::Affine { bits, group, codes: a, scales: s, offsets: u },
            Elements::Affine { bits: other_bits, group: other_group, codes: b, scales: t, offsets: v },
        ) if bits == other_bits && group == other_group => Elements::Affine {
            bits: *bits,
            group: *group,
            codes: in_turns(a, b, rows)?,
            scales: in_turns(s, t, rows)?,
            offsets: in_turns(u, v, rows)?,
        },
        _ => return None,
    })
}

fn in_turns<T: Pod + Send + Sync>(even: &[T], odd: &[T], rows: usize) -> Option<Vec<T>> {
    let width = even.len().checked_div(rows).unwrap_or(0);
    if even.len() != odd.len() || width * rows != even.len() {
        return None;
    }
    let mut out = vec![T::zeroed(); even.len() * 2];
    if width == 0 {
        return Some(out);
    }
    let pairs = (PIECE / size_of::<T>() / (2 * width)).max(1);
    let filled = parallel::pieces(&mut out, 2 * width * pairs, |at, piece| {
        let from = at / 2;
        for (i, pair) in piece.chunks_exact_mut(2 * width).enumerate() {
            let place = from + i * width..from + (i + 1) * width;
            let (first, second) = pair.split_at_mut(width);
            first.copy_from_slice(even.get(place.clone()).ok_or(())?);
            second.copy_from_slice(odd.get(place).ok_or(())?);
        }
        Ok::<_, ()>(())
    });
    filled.ok().map(|()| out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_alternate_whatever_their_number() {
        for (count, width) in [(0, 3), (1, 1), (3, 4), (700, 5000)] {
            let of = |offset: usize| (0..count * width).map(|i| (2 * i + offset) as f32).collect::<Vec<_>>();
            let (even, odd) = (of(0), of(1));
            let found = rows(&Elements::F32(even.clone()), &Elements::F32(odd.clone()), count).unwrap();
            let Elements::F32(found) = found else { panic!("f32") };
            assert_eq!(found.len(), 2 * count * width);
            for (i, value) in found.into_iter().enumerate() {
                let (row, col) = (i / width, i % width);
                let from = if row % 2 == 0 { &even } else { &odd };
                assert_eq!(value, from[row / 2 * width + col], "{count} x {width}: {row}, {col}");
            }
        }
    }

    #[test]
    fn what_is_stored_differently_is_not_mixed() {
        let floats = Elements::F32(vec![1.0; 4]);
        assert!(rows(&floats, &Elements::F32(vec![1.0; 8]), 2).is_none());
        assert!(rows(&floats, &floats, 3).is_none());
        let packed = Elements::Mxfp4 { codes: vec![0; 32], scales: vec![0; 2] };
        assert!(rows(&floats, &packed, 2).is_none());
        assert!(rows(&packed, &packed, 2).is_some());
    }
}
