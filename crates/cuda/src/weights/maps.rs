//! Rows and columns on their way into panels: which of the checkpoint's comes where.

use ctxserve_backend::AttentionSpec;

/// Rows of gate, and as many of up, that lie together.
const GROUP: usize = 8;

/// Source rows of the QKV matrix in the order of the panels: in q and k heads rotary pairs side by side, heads padded to `padded`
/// elements.
pub(super) fn qkv_rows(spec: &AttentionSpec, padded: usize) -> Vec<i32> {
    let half = spec.head_dim / 2;
    let heads = spec.heads + 2 * spec.kv_heads;
    let mut map = vec![-1; heads * padded];
    for (head, rows) in map.chunks_mut(padded).enumerate() {
        let first = head * spec.head_dim;
        let rotated = head < spec.heads + spec.kv_heads;
        for at in 0..spec.head_dim {
            let place = match (rotated, at < half) {
                (true, true) => 2 * at,
                (true, false) => 2 * (at - half) + 1,
                (false, _) => natural(at, half, padded),
            };
            rows[place] = (first + at) as i32;
        }
    }
    map
}

/// Where element `at` of a head is once kernels have it in their natural order: the second half begins in the middle of
/// the padded head, as rotation leaves it.
pub(super) fn natural(at: usize, half: usize, padded: usize) -> usize {
    if at < half { at } else { padded / 2 + at - half }
}

/// Source columns of the output projection: heads padded to `padded` elements.
pub(super) fn output_cols(spec: &AttentionSpec, padded: usize) -> Vec<i32> {
    let mut map = vec![-1; spec.heads * padded];
    for (head, cols) in map.chunks_mut(padded).enumerate() {
        for at in 0..spec.head_dim {
            cols[natural(at, spec.head_dim / 2, padded)] = (head * spec.head_dim + at) as i32;
        }
    }
    map
}

/// Source rows of gate and up, `inner` each, padded to `padded`: of every 16 rows the first 8 are gate, the others up.
pub(super) fn gate_up_rows(inner: usize, padded: usize) -> Vec<i32> {
    let source = |row: usize| {
        let (half, at) = (row / GROUP % 2, row / (2 * GROUP) * GROUP + row % GROUP);
        if at < inner { (half * inner + at) as i32 } else { -1 }
    };
    (0..2 * padded).map(source).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(heads: usize, kv_heads: usize, head_dim: usize) -> AttentionSpec {
        AttentionSpec { heads, kv_heads, head_dim, scale: 1.0, window: None, norm_eps: 1e-5 }
    }

    #[test]
    fn rotary_pairs_sit_side_by_side() {
        let map = qkv_rows(&spec(1, 1, 64), 64);
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
        let map = qkv_rows(&spec(2, 1, 4), 64);
        assert_eq!(map[..5], [0, 2, 1, 3, -1]);
        assert_eq!(map[64..69], [4, 6, 5, 7, -1]);
        assert_eq!(map[192..195], [12, 13, -1]);
        assert_eq!(map[224..227], [14, 15, -1]);
        assert_eq!(output_cols(&spec(2, 1, 4), 64)[96..99], [6, 7, -1]);
    }

    #[test]
    fn long_heads_have_their_own_padding() {
        let map = qkv_rows(&spec(1, 1, 96), 128);
        assert_eq!(map[..4], [0, 48, 1, 49]);
        assert_eq!(map[94..97], [47, 95, -1]);
        // Values: the second half begins in the middle.
        assert_eq!(map[256 + 47..256 + 49], [192 + 47, -1]);
        assert_eq!(map[256 + 64], 192 + 48);
        assert_eq!(output_cols(&spec(1, 1, 96), 128)[63..66], [-1, 48, 49]);
    }

    #[test]
    fn gate_and_up_alternate_in_groups_of_eight() {
        let map = gate_up_rows(20, 64);
        assert_eq!(map[..9], [0, 1, 2, 3, 4, 5, 6, 7, 20]);
        assert_eq!(map[15..17], [27, 8]);
        // Gate 16 to 19 and up 16 to 19, padded.
        assert_eq!(map[32..48], [16, 17, 18, 19, -1, -1, -1, -1, 36, 37, 38, 39, -1, -1, -1, -1]);
        assert!(map.len() == 128 && map[48..].iter().all(|&row| row == -1));
    }
}
