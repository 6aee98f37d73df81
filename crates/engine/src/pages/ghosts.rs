//! What was in the prefix tree once, so that a miss can be explained.

use std::collections::HashMap;

/// Entries of one generation; two are kept. An entry is 16 bytes or so.
const GENERATION: usize = 1 << 16;

/// Why something is no longer in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    /// Its pages were needed.
    Evicted,
    /// The cache was reset.
    Reset,
}

/// Paths that are gone, by their hashes: the last 64 Ki at least.
#[derive(Debug, Default)]
pub(super) struct Ghosts {
    young: HashMap<u64, Lost>,
    old: HashMap<u64, Lost>,
}

impl Ghosts {
    /// A path is gone.
    pub(super) fn add(&mut self, chain: u64, how: Lost) {
        if self.young.len() >= GENERATION {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(chain, how);
    }

    /// How a path went.
    pub(super) fn get(&self, chain: u64) -> Option<Lost> {
        self.young.get(&chain).or_else(|| self.old.get(&chain)).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_are_remembered_and_the_first_forgotten() {
        let mut ghosts = Ghosts::default();
        (0..3 * GENERATION as u64).for_each(|chain| ghosts.add(chain, Lost::Evicted));
        ghosts.add(7, Lost::Reset);
        assert_eq!(ghosts.get(0), None);
        assert_eq!(ghosts.get(3 * GENERATION as u64 - GENERATION as u64), Some(Lost::Evicted));
        assert_eq!(ghosts.get(7), Some(Lost::Reset));
        assert!(ghosts.young.len() + ghosts.old.len() <= 2 * GENERATION);
    }
}
