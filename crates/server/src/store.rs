//! Responses that clients may come back to, within bounds on their number and on their bytes.
//!
//! A response belongs to the API key that made it: for any other key it does not exist. What was used longest ago goes first.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(crate) use crate::http::guard::Tenant as Owner;

/// Bytes that an entry takes beside its texts.
const ENTRY_BYTES: usize = 512;
/// Bytes that an item takes beside its text.
const ITEM_BYTES: usize = 96;

/// An item of a conversation as JSON, with its id.
#[derive(Clone, Debug, Default)]
pub(crate) struct StoredItem {
    pub(crate) id: String,
    pub(crate) json: Box<str>,
}

/// Bytes held somewhere below a store, given back when dropped.
#[derive(Debug)]
struct Charge {
    held: Arc<AtomicUsize>,
    bytes: usize,
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// What one response added to a conversation. Responses that continue it share it, and keep it when it is deleted itself.
#[derive(Debug)]
pub(crate) struct Link {
    previous: Option<Arc<Link>>,
    pub(crate) input: Vec<StoredItem>,
    pub(crate) output: Vec<StoredItem>,
    _charge: Charge,
}

impl Link {
    /// The conversation up to here, oldest first.
    pub(crate) fn items(self: &Arc<Self>) -> Vec<&StoredItem> {
        let mut links: Vec<&Link> = Vec::new();
        let mut next = Some(self);
        while let Some(link) = next {
            links.push(link);
            next = link.previous.as_ref();
        }
        links.into_iter().rev().flat_map(|link| link.input.iter().chain(&link.output)).collect()
    }
}

impl Drop for Link {
    /// Link by link: a long conversation must not recurse.
    fn drop(&mut self) {
        let mut next = self.previous.take();
        while let Some(link) = next.and_then(Arc::into_inner) {
            let mut link = link;
            next = link.previous.take();
        }
    }
}

/// A stored response; `L` is what still runs for it.
#[derive(Debug)]
pub(crate) struct Stored<L> {
    pub(crate) body: Body<L>,
    pub(crate) link: Arc<Link>,
    charge: Option<Arc<Charge>>,
}

impl<L> Clone for Stored<L> {
    fn clone(&self) -> Self {
        Self { body: self.body.clone(), link: Arc::clone(&self.link), charge: self.charge.clone() }
    }
}

/// Its response object.
#[derive(Debug)]
pub(crate) enum Body<L> {
    /// Still growing.
    Live(Arc<L>),
    /// As JSON, and what is left of its run.
    Done(Arc<str>, Option<Arc<L>>),
}

impl<L> Clone for Body<L> {
    fn clone(&self) -> Self {
        match self {
            Self::Live(live) => Self::Live(Arc::clone(live)),
            Self::Done(json, live) => Self::Done(Arc::clone(json), live.clone()),
        }
    }
}

struct Entry<L> {
    owner: Owner,
    used: u64,
    stored: Stored<L>,
}

struct Inner<L> {
    entries: HashMap<String, Entry<L>>,
    /// Ids by when they were last used.
    order: BTreeMap<u64, String>,
    /// Where an item of an owner can be found: its id to that of the response.
    items: HashMap<(Owner, String), String>,
    clock: u64,
}

/// The store.
pub(crate) struct Store<L> {
    inner: Mutex<Inner<L>>,
    held: Arc<AtomicUsize>,
    max_entries: usize,
    max_bytes: usize,
}

impl<L> Store<L> {
    pub(crate) fn new(max_entries: usize, max_bytes: usize) -> Self {
        let inner =
            Inner { entries: HashMap::new(), order: BTreeMap::new(), items: HashMap::new(), clock: 0 };
        Self { inner: Mutex::new(inner), held: Arc::default(), max_entries, max_bytes }
    }

    /// Whether anything can be stored.
    pub(crate) fn is_on(&self) -> bool {
        self.max_entries > 0 && self.max_bytes > 0
    }

    fn lock(&self) -> MutexGuard<'_, Inner<L>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn charge(&self, bytes: usize) -> Charge {
        self.held.fetch_add(bytes, Ordering::Relaxed);
        Charge { held: Arc::clone(&self.held), bytes }
    }

    /// A link of a conversation after `previous`.
    pub(crate) fn link(
        &self,
        previous: Option<Arc<Link>>,
        input: Vec<StoredItem>,
        output: Vec<StoredItem>,
    ) -> Arc<Link> {
        let size = |item: &StoredItem| item.id.len() * 2 + item.json.len() + ITEM_BYTES;
        let bytes = input.iter().chain(&output).map(size).sum();
        Arc::new(Link { previous, input, output, _charge: self.charge(bytes) })
    }

    /// Puts a response in, and drops what that leaves no room for. What still runs is not dropped: the engine bounds how much
    /// that is. `kept` is what is left of its run, in bytes.
    pub(crate) fn put(&self, owner: Owner, id: &str, body: Body<L>, kept: usize, link: Arc<Link>) {
        self.insert(self.lock(), owner, id, body, kept, link);
    }

    /// As [`Store::put`] in the place of a response that is still there, and says whether it was.
    pub(crate) fn replace(
        &self,
        owner: Owner,
        id: &str,
        body: Body<L>,
        kept: usize,
        link: Arc<Link>,
    ) -> bool {
        let inner = self.lock();
        let there = inner.entries.contains_key(id);
        if there {
            self.insert(inner, owner, id, body, kept, link);
        }
        there
    }

    fn insert(
        &self,
        mut inner: MutexGuard<'_, Inner<L>>,
        owner: Owner,
        id: &str,
        body: Body<L>,
        kept: usize,
        link: Arc<Link>,
    ) {
        let bytes = match &body {
            Body::Live(_) => ENTRY_BYTES,
            Body::Done(json, _) => json.len() + kept + ENTRY_BYTES,
        };
        let charge = Some(Arc::new(self.charge(bytes)));
        inner.remove(id);
        inner.clock += 1;
        let used = inner.clock;
        inner.order.insert(used, id.to_owned());
        for item in link.input.iter().chain(&link.output) {
            inner.items.insert((owner, item.id.clone()), id.to_owned());
        }
        inner.entries.insert(id.to_owned(), Entry { owner, used, stored: Stored { body, link, charge } });
        let over = |inner: &Inner<L>| {
            inner.entries.len() > self.max_entries || self.held.load(Ordering::Relaxed) > self.max_bytes
        };
        while over(&inner) {
            let oldest = inner.order.values().find(|id| inner.is_done(id)).cloned();
            let Some(oldest) = oldest else { break };
            inner.remove(&oldest);
        }
    }

    /// A response of this owner.
    pub(crate) fn get(&self, owner: Owner, id: &str) -> Option<Stored<L>> {
        let mut inner = self.lock();
        let entry = inner.entries.get(id).filter(|entry| entry.owner == owner)?;
        let (used, stored) = (entry.used, entry.stored.clone());
        inner.clock += 1;
        let now = inner.clock;
        inner.order.remove(&used);
        inner.order.insert(now, id.to_owned());
        if let Some(entry) = inner.entries.get_mut(id) {
            entry.used = now;
        }
        Some(stored)
    }

    /// An item of a response of this owner.
    pub(crate) fn item(&self, owner: Owner, id: &str) -> Option<StoredItem> {
        let inner = self.lock();
        let entry = inner.entries.get(inner.items.get(&(owner, id.to_owned()))?)?;
        let link = &entry.stored.link;
        link.input.iter().chain(&link.output).find(|item| item.id == id).cloned()
    }

    /// Takes a response of this owner out.
    pub(crate) fn remove(&self, owner: Owner, id: &str) -> Option<Stored<L>> {
        let mut inner = self.lock();
        inner.entries.get(id).filter(|entry| entry.owner == owner)?;
        inner.remove(id)
    }
}

impl<L> Inner<L> {
    fn is_done(&self, id: &str) -> bool {
        self.entries.get(id).is_some_and(|entry| matches!(entry.stored.body, Body::Done(..)))
    }

    fn remove(&mut self, id: &str) -> Option<Stored<L>> {
        let entry = self.entries.remove(id)?;
        self.order.remove(&entry.used);
        for item in entry.stored.link.input.iter().chain(&entry.stored.link.output) {
            let key = (entry.owner, item.id.clone());
            if self.items.get(&key).is_some_and(|response| response == id) {
                self.items.remove(&key);
            }
        }
        Some(entry.stored)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Plain = Store<()>;

    fn put(store: &Plain, owner: Owner, id: &str, previous: Option<Arc<Link>>, bytes: usize) {
        let item = StoredItem { id: format!("item_{id}"), json: "x".repeat(bytes).into() };
        let link = store.link(previous, vec![item], Vec::new());
        store.put(owner, id, Body::Done("{}".into(), None), 0, link);
    }

    fn previous(store: &Plain, id: &str) -> Option<Arc<Link>> {
        Some(store.get(None, id).unwrap().link)
    }

    /// RSP-06: by number, and what was used longest ago goes first.
    #[test]
    fn the_number_is_bounded() {
        let store = Plain::new(3, 1 << 20);
        for id in ["a", "b", "c"] {
            put(&store, None, id, None, 10);
        }
        assert!(store.get(None, "a").is_some());
        put(&store, None, "d", None, 10);
        assert!(store.get(None, "b").is_none() && store.item(None, "item_b").is_none());
        for id in ["a", "c", "d"] {
            assert!(store.get(None, id).is_some(), "{id}");
        }
    }

    /// RSP-06: by bytes, also of what conversations share, and all of them come back.
    #[test]
    fn bytes_are_bounded_and_returned() {
        let store = Plain::new(100, 10_000);
        put(&store, None, "0", None, 1000);
        for n in 1..50 {
            let before = previous(&store, &(n - 1).to_string());
            put(&store, None, &n.to_string(), before, 1000);
            assert!(store.held.load(Ordering::Relaxed) <= 10_000 || store.lock().entries.is_empty());
            if store.get(None, &n.to_string()).is_none() {
                put(&store, None, &n.to_string(), None, 1000);
            }
        }
        let ids: Vec<String> = store.lock().entries.keys().cloned().collect();
        assert!(!ids.is_empty());
        for id in ids {
            store.remove(None, &id);
        }
        assert_eq!(store.held.load(Ordering::Relaxed), 0);
        let inner = store.lock();
        assert!(inner.order.is_empty() && inner.items.is_empty());
    }

    #[test]
    fn an_owner_sees_only_its_own() {
        let store = Plain::new(10, 1 << 20);
        put(&store, Some(0), "a", None, 1);
        for other in [None, Some(1)] {
            assert!(store.get(other, "a").is_none());
            assert!(store.item(other, "item_a").is_none());
            assert!(store.remove(other, "a").is_none());
        }
        assert!(store.item(Some(0), "item_a").is_some());
        assert!(store.remove(Some(0), "a").is_some() && store.get(Some(0), "a").is_none());
    }

    #[test]
    fn a_conversation_outlives_its_parts_and_its_end_does_not_recurse() {
        let store = Plain::new(usize::MAX, usize::MAX);
        put(&store, None, "0", None, 1);
        for n in 1..100_000 {
            let before = previous(&store, &(n - 1).to_string());
            put(&store, None, &n.to_string(), before, 1);
            store.remove(None, &(n - 1).to_string());
        }
        let last = previous(&store, "99999").unwrap();
        assert_eq!(last.items().len(), 100_000);
        assert_eq!(last.items()[0].id, "item_0");
        store.remove(None, "99999");
        drop(last);
        assert_eq!(store.held.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_runs_stays() {
        let store = Plain::new(1, 1 << 20);
        let link = || store.link(None, Vec::new(), Vec::new());
        store.put(None, "live", Body::Live(Arc::new(())), 0, link());
        store.put(None, "done", Body::Done("{}".into(), None), 0, link());
        assert!(store.get(None, "live").is_some() && store.get(None, "done").is_none());
        assert!(store.replace(None, "live", Body::Done("{}".into(), None), 0, link()));
        store.remove(None, "live");
        assert!(!store.replace(None, "live", Body::Done("{}".into(), None), 0, link()));
    }
}
