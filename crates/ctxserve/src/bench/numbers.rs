//! Random numbers, and what is made of many measured ones.

use ctxserve_core::TokenId;

/// SplitMix64 (Steele, Lea, Flood 2014): the same prompts for the same seed, on every machine.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Token ids below `vocab`.
    pub(super) fn prompt(&mut self, length: usize, vocab: usize) -> Vec<TokenId> {
        let vocab = vocab.max(1) as u64;
        (0..length).map(|_| TokenId::try_from(self.next() % vocab).unwrap_or_default()).collect()
    }
}

/// The value that `share` of all values do not exceed (nearest rank); `None` of none.
pub(super) fn quantile(values: &[f64], share: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

/// The median run by what is `measured` of it: of two in the middle the larger. `None` of none.
pub(super) fn median<T>(runs: &[T], measured: impl Fn(&T) -> f64) -> Option<&T> {
    let mut sorted: Vec<&T> = runs.iter().collect();
    sorted.sort_by(|a, b| measured(a).total_cmp(&measured(b)));
    sorted.get(sorted.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_repeatable_and_inside_the_vocabulary() {
        let (mut one, mut other) = (Random::new(1), Random::new(1));
        let first = one.prompt(1000, 50);
        assert_eq!(first, other.prompt(1000, 50));
        assert_ne!(first, one.prompt(1000, 50), "every prompt is new");
        assert!(first.iter().all(|&id| id < 50));
        assert!((0..50).all(|id| first.contains(&id)));
        assert_ne!(first, Random::new(2).prompt(1000, 50));
        // The generator's published first output for seed 0.
        assert_eq!(Random::new(0).next(), 0xe220_a839_7b1d_cdaf);
    }

    #[test]
    fn quantiles_are_measured_values() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(quantile(&values, 0.5), Some(50.0));
        assert_eq!(quantile(&values, 0.99), Some(99.0));
        assert_eq!(quantile(&[3.0], 0.5), Some(3.0));
        assert_eq!(quantile(&[1.0, 2.0], 0.99), Some(2.0));
        assert_eq!(quantile(&[], 0.5), None);
    }

    #[test]
    fn the_median_run_is_one_that_was_run() {
        assert_eq!(median(&[3.0, 1.0, 2.0], |&run| run), Some(&2.0));
        assert_eq!(median(&[1.0, 2.0], |&run| run), Some(&2.0));
        assert_eq!(median(&[], |&run: &f64| run), None);
    }
}
