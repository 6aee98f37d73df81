//! Rotary angles: plain RoPE and YaRN (arXiv 2309.00071).

use std::f64::consts::TAU;

use ctxserve_backend::RopeTable;

/// YaRN's extension of a context, applied at every length.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// How many times longer the context becomes.
    pub factor: f64,
    /// Rotations over the original context above which a frequency is kept.
    pub beta_fast: f64,
    /// Rotations below which a frequency is divided by `factor`.
    pub beta_slow: f64,
    /// Positions of the original context.
    pub original_positions: f64,
    /// Round the ramp's bounds outwards to whole dimensions.
    pub truncate: bool,
    /// Factor on cos and sin; see [`Yarn::default_attention_factor`].
    pub attention_factor: f64,
}

impl Yarn {
    /// `0.1 * weight * ln(factor) + 1`, and 1 where nothing is extended.
    pub fn default_attention_factor(factor: f64, weight: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
    }

    /// Pair indices between which frequencies go over from kept to divided.
    fn ramp(&self, theta: f64, head_dim: usize) -> (f64, f64) {
        let dim = head_dim as f64;
        let turns_at = |turns: f64| dim * (self.original_positions / (turns * TAU)).ln() / (2.0 * theta.ln());
        let (low, high) = (turns_at(self.beta_fast), turns_at(self.beta_slow));
        let (low, high) = if self.truncate { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        // A ramp without width would divide by zero.
        (low, if low == high { high + 0.001 } else { high })
    }
}

/// Inverse frequencies of a head of `head_dim` elements (even) and base `theta` (above 1), extended by `yarn`.
pub fn rope_table(theta: f64, head_dim: usize, yarn: Option<&Yarn>) -> RopeTable {
    let inverse = |pair: usize| theta.powf(-((2 * pair) as f64) / head_dim as f64);
    let plain = (0..head_dim / 2).map(inverse);
    let Some(yarn) = yarn else { return RopeTable { inv_freq: plain.collect(), mscale: 1.0 } };
    let (low, high) = yarn.ramp(theta, head_dim);
    let extend = |(pair, kept): (usize, f64)| {
        let divided = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
        kept * (divided / yarn.factor + (1.0 - divided))
    };
    RopeTable { inv_freq: plain.enumerate().map(extend).collect(), mscale: yarn.attention_factor }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpt_oss(truncate: bool) -> Yarn {
        let attention_factor = Yarn::default_attention_factor(32.0, 1.0);
        let (beta_fast, beta_slow, original_positions) = (32.0, 1.0, 4096.0);
        Yarn { factor: 32.0, beta_fast, beta_slow, original_positions, truncate, attention_factor }
    }

    fn close(got: f64, want: f64) -> bool {
        // The published vectors have eight digits, the last one cut rather than rounded.
        (got / want - 1.0).abs() < 1e-7
    }

    #[test]
    fn gpt_oss_bounds_are_not_rounded() {
        let (low, high) = gpt_oss(false).ramp(150_000.0, 64);
        assert!((low - 8.092_779).abs() < 1e-6 && (high - 17.398_025).abs() < 1e-6, "{low} {high}");
        let table = rope_table(150_000.0, 64, Some(&gpt_oss(false)));
        assert_eq!(table.inv_freq.len(), 32);
        assert!(close(table.mscale, 1.346_573_59), "{}", table.mscale);
        let expected = [
            (0, 1.0),
            (8, 5.081_327_5e-2),
            (9, 3.170_569_6e-2),
            (12, 6.794_959_5e-3),
            (16, 4.564_839_2e-4),
            (17, 1.293_187_0e-4),
            (18, 3.830_881_2e-5),
            (31, 3.023_511_4e-7),
        ];
        for (pair, want) in expected {
            assert!(close(table.inv_freq[pair], want), "{pair}: {} instead of {want}", table.inv_freq[pair]);
        }
    }

    #[test]
    fn truncation_rounds_the_bounds_outwards() {
        assert_eq!(gpt_oss(true).ramp(150_000.0, 64), (8.0, 18.0));
        let table = rope_table(150_000.0, 64, Some(&gpt_oss(true)));
        for (pair, want) in [(9, 3.162_075_2e-2), (16, 5.809_475_0e-4), (17, 2.279_477_8e-4)] {
            assert!(close(table.inv_freq[pair], want), "{pair}: {}", table.inv_freq[pair]);
        }
    }

    #[test]
    fn no_extension_is_plain_rope() {
        let plain = rope_table(10_000.0, 8, None);
        let expected = [1.0, 0.1, 0.01, 0.001];
        assert!(plain.inv_freq.iter().zip(expected).all(|(&got, want)| close(got, want)), "{plain:?}");
        assert_eq!(plain.mscale, 1.0);
        let attention_factor = Yarn::default_attention_factor(1.0, 1.0);
        let identity = Yarn { factor: 1.0, attention_factor, ..gpt_oss(false) };
        let table = rope_table(10_000.0, 8, Some(&identity));
        assert!(table.inv_freq.iter().zip(&plain.inv_freq).all(|(&a, &b)| close(a, b)), "{table:?}");
        assert_eq!(table.mscale, 1.0);
    }

    #[test]
    fn a_ramp_without_width_stays_finite() {
        // Both bounds are cut to zero: every frequency but the first is divided.
        let yarn = Yarn { original_positions: TAU, ..gpt_oss(false) };
        let table = rope_table(10_000.0, 8, Some(&yarn));
        assert!(table.inv_freq.iter().all(|f| f.is_finite()), "{table:?}");
        assert!(close(table.inv_freq[0], 1.0) && close(table.inv_freq[1], 0.1 / 32.0), "{table:?}");
    }
}
