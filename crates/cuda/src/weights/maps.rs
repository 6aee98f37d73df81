//! Heads on their way into panels: which row or column of the checkpoint comes where.

use ctxserve_backend::AttentionSpec;

use crate::ops::attention::HEAD_DIM;

/// Source rows of the QKV matrix in the order of the panels: in q and k heads rotary pairs side by side, heads padded.
pub(super) fn qkv_rows(spec: &AttentionSpec) -> Vec<i32> {
    let half = spec.head_dim / 2;
    let heads = spec.heads + 2 * spec.kv_heads;
    let mut map = vec![-1; heads * HEAD_DIM];
    for (head, rows) in map.chunks_mut(HEAD_DIM).enumerate() {
        let first = head * spec.head_dim;
        let rotated = head < spec.heads + spec.kv_heads;
        for at in 0..spec.head_dim {
            let place = match (rotated, at < half) {
                (true, true) => 2 * at,
                (true, false) => 2 * (at - half) + 1,
                (false, _) => natural(at, half),
            };
            rows[place] = (first + at) as i32;
        }
    }
    map
}

/// Where element `at` of a head is once kernels have it in their natural order: the second half begins in the middle of
/// the padded head, as rotation leaves it.
fn natural(at: usize, half: usize) -> usize {
    if at < half { at } else { HEAD_DIM / 2 + at - half }
}

/// Source columns of the output projection: heads padded.
pub(super) fn output_cols(spec: &AttentionSpec) -> Vec<i32> {
    let mut map = vec![-1; spec.heads * HEAD_DIM];
    for (head, cols) in map.chunks_mut(HEAD_DIM).enumerate() {
        for at in 0..spec.head_dim {
            cols[natural(at, spec.head_dim / 2)] = (head * spec.head_dim + at) as i32;
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(heads: usize, kv_heads: usize, head_dim: usize) -> AttentionSpec {
        AttentionSpec { heads, kv_heads, head_dim, scale: 1.0, window: None, norm_eps: 1e-5 }
    }

    #[test]
    fn rotary_pairs_sit_side_by_side() {
        let map = qkv_rows(&spec(1, 1, 64));
        assert_eq!(map[..4], [0, 32, 1, 33]);
        assert_eq!(map[64..68], [64, 96, 65, 97]);
        // Values keep their order.
        assert_eq!(map[128..132], [128, 129, 130, 131]);
        let mut sorted = map.clone();
        sorted.sort_unstable();
        assert!(sorted.iter().copied().eq(0..192));
    }

    #[test]
    fn short_heads_are_padded() {
        let map = qkv_rows(&spec(2, 1, 4));
        assert_eq!(map[..5], [0, 2, 1, 3, -1]);
        assert_eq!(map[64..69], [4, 6, 5, 7, -1]);
        assert_eq!(map[192..195], [12, 13, -1]);
        assert_eq!(map[224..227], [14, 15, -1]);
        assert_eq!(output_cols(&spec(2, 1, 4))[96..99], [6, 7, -1]);
    }
}
