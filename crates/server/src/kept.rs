//! What requests leave behind for later ones, within bounds.

use std::hash::Hash;
use std::sync::{Mutex, MutexGuard, PoisonError};

use lru::LruCache;

/// Values by key, bounded in number and in bytes; what was not used for longest goes first.
pub(crate) struct Kept<K: Hash + Eq, V> {
    inner: Mutex<Inner<K, V>>,
    entries: usize,
    bytes: usize,
}

struct Inner<K: Hash + Eq, V> {
    values: LruCache<K, (V, usize)>,
    /// Sum of the values' weights.
    bytes: usize,
}

impl<K: Hash + Eq, V: Clone> Kept<K, V> {
    /// Room for so many values, and for so many bytes of them.
    pub(crate) fn new(entries: usize, bytes: usize) -> Self {
        let inner = Inner { values: LruCache::unbounded(), bytes: 0 };
        Self { inner: Mutex::new(inner), entries, bytes }
    }

    /// Puts a value in, which weighs about so many bytes, and takes out what then is too much. A value that is too large by
    /// itself is not kept, and neither is what its key had before.
    pub(crate) fn insert(&self, key: K, value: V, bytes: usize) {
        let mut inner = self.lock();
        inner.remove(&key);
        if bytes > self.bytes || self.entries == 0 {
            return;
        }
        inner.values.put(key, (value, bytes));
        inner.bytes += bytes;
        while inner.values.len() > self.entries || inner.bytes > self.bytes {
            let Some((_, (_, bytes))) = inner.values.pop_lru() else { break };
            inner.bytes -= bytes;
        }
    }

    /// The value of a key, which is then the one used last.
    pub(crate) fn get(&self, key: &K) -> Option<V> {
        self.lock().values.get(key).map(|(value, _)| value.clone())
    }

    /// Every value behind the lock is whole after each statement.
    fn lock(&self) -> MutexGuard<'_, Inner<K, V>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Hash + Eq, V> Inner<K, V> {
    fn remove(&mut self, key: &K) -> Option<V> {
        let (value, bytes) = self.values.pop(key)?;
        self.bytes -= bytes;
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_oldest_goes_first() {
        let kept = Kept::new(2, 100);
        kept.insert(1, 'a', 10);
        kept.insert(2, 'b', 10);
        assert_eq!(kept.get(&1), Some('a'), "now the one used last");
        kept.insert(3, 'c', 10);
        assert_eq!((kept.get(&1), kept.get(&2), kept.get(&3)), (Some('a'), None, Some('c')));
        kept.insert(4, 'd', 95);
        assert_eq!((kept.get(&1), kept.get(&3), kept.get(&4)), (None, None, Some('d')));
        kept.insert(4, 'e', 101);
        assert_eq!(kept.get(&4), None, "too large, and no longer what it was");
        assert_eq!(kept.lock().bytes, 0);
        let none = Kept::new(0, 100);
        none.insert(1, 'a', 1);
        assert_eq!(none.get(&1), None);
    }

    proptest! {
        /// Whatever is put in and taken out, both bounds hold and the weights add up.
        #[test]
        fn bounds_hold(steps in prop::collection::vec((0u8..8, 0usize..60, any::<bool>()), 1..60)) {
            let kept = Kept::new(5, 100);
            for (key, bytes, put) in steps {
                if put {
                    kept.insert(key, bytes, bytes);
                    prop_assert_eq!(kept.get(&key), Some(bytes));
                } else {
                    kept.lock().remove(&key);
                    prop_assert_eq!(kept.get(&key), None);
                }
                let inner = kept.lock();
                let sum: usize = inner.values.iter().map(|(_, (_, bytes))| bytes).sum();
                prop_assert!(inner.bytes == sum && sum <= 100 && inner.values.len() <= 5);
            }
        }
    }
}
