//! Compiling grammars within bounds, and keeping them for the next request.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::Instant;

use crate::Tokenizer;

use super::grammar::{Follower, Grammar};
use super::limits::{COMPILE_STACK, COMPILING, GuideLimits, KEPT, KEPT_BYTES};
use super::vocabulary::Vocabulary;

/// A grammar that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum CompileError {
    /// It is wrong, or beyond a bound.
    Invalid(String),
    /// Too many grammars are being compiled.
    Busy,
}

/// A compiled grammar at its beginning.
#[derive(Debug)]
pub(crate) struct Template(Mutex<Follower>);

impl Template {
    /// A text of its own.
    pub(crate) fn start(&self) -> Follower {
        lock(&self.0).fork()
    }
}

/// Compiles grammars over one tokenizer. Shared by all requests; memory is bounded by the grammars kept.
#[derive(Debug)]
pub struct Guides {
    tokenizer: Arc<Tokenizer>,
    limits: GuideLimits,
    vocabulary: OnceLock<Result<Arc<Vocabulary>, String>>,
    kept: Mutex<Kept>,
    places: Arc<Places>,
}

/// Compiled grammars by their sources, the one used last at the back.
#[derive(Debug, Default)]
struct Kept {
    entries: VecDeque<(String, Arc<Template>)>,
    bytes: usize,
}

/// Places for compiling threads.
#[derive(Debug, Default)]
struct Places {
    taken: Mutex<usize>,
    freed: Condvar,
}

/// Every value behind these locks is whole after each statement.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Places {
    fn take(places: &Arc<Self>, until: Instant) -> Option<Place> {
        let mut taken = lock(&places.taken);
        while *taken >= COMPILING {
            let left = until.checked_duration_since(Instant::now())?;
            taken = places.freed.wait_timeout(taken, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        *taken += 1;
        Some(Place(Arc::clone(places)))
    }
}

struct Place(Arc<Places>);

impl Drop for Place {
    fn drop(&mut self) {
        *lock(&self.0.taken) -= 1;
        self.0.freed.notify_one();
    }
}

impl Kept {
    fn find(&mut self, key: &str) -> Option<Arc<Template>> {
        let at = self.entries.iter().position(|(known, _)| known == key)?;
        let entry = self.entries.remove(at)?;
        let template = Arc::clone(&entry.1);
        self.entries.push_back(entry);
        Some(template)
    }

    fn keep(&mut self, key: String, template: Arc<Template>) {
        self.bytes += key.len();
        self.entries.push_back((key, template));
        while self.entries.len() > KEPT || self.bytes > KEPT_BYTES {
            let Some((key, _)) = self.entries.pop_front() else { return };
            self.bytes -= key.len();
        }
    }
}

impl Guides {
    /// One that builds what it needs when it is first used.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Self::with_limits(tokenizer, GuideLimits::DEFAULT)
    }

    /// As [`Guides::new`], within bounds of one's own.
    pub fn with_limits(tokenizer: Arc<Tokenizer>, limits: GuideLimits) -> Self {
        let (vocabulary, kept, places) = (OnceLock::new(), Mutex::default(), Arc::default());
        Self { tokenizer, limits, vocabulary, kept, places }
    }

    /// The vocabulary, built at the first call.
    ///
    /// # Errors
    /// A vocabulary that no trie can hold.
    pub(crate) fn vocabulary(&self) -> Result<Arc<Vocabulary>, CompileError> {
        let build = || {
            let tokenizer = Arc::clone(&self.tokenizer);
            catch_unwind(AssertUnwindSafe(|| Vocabulary::new(tokenizer)))
                .unwrap_or_else(|_| Err("the vocabulary does not fit a trie".to_owned()))
                .map(Arc::new)
        };
        self.vocabulary.get_or_init(build).clone().map_err(CompileError::Invalid)
    }

    /// Builds what the first constrained request would otherwise wait for; whether that worked.
    pub fn warm_up(&self) -> bool {
        self.vocabulary().is_ok()
    }

    /// Compiled grammars that are kept.
    pub fn kept(&self) -> usize {
        lock(&self.kept).entries.len()
    }

    /// The compiled grammar.
    ///
    /// # Errors
    /// See [`CompileError`].
    pub(crate) fn template(&self, grammar: &Grammar) -> Result<Arc<Template>, CompileError> {
        let key = grammar.key();
        if let Some(template) = lock(&self.kept).find(&key) {
            return Ok(template);
        }
        grammar.check(&self.limits).map_err(CompileError::Invalid)?;
        let vocabulary = self.vocabulary()?;
        let until = Instant::now() + self.limits.compile_time;
        let place = Places::take(&self.places, until).ok_or(CompileError::Busy)?;
        let (grammar, (done, outcome)) = (grammar.clone(), mpsc::sync_channel(1));
        let compile = move || {
            let compiled = catch_unwind(AssertUnwindSafe(|| {
                let mut follower = grammar.compile(&vocabulary)?;
                let (mask, may_end) = follower.next().map_err(|error| error.to_string())?;
                if mask.is_empty() && !may_end {
                    return Err("nothing matches it".to_owned());
                }
                Ok(follower)
            }));
            let compiled = compiled.unwrap_or_else(|_| Err("the grammar compiler failed on it".to_owned()));
            drop(place);
            // Nobody waits for what took too long.
            let _ = done.send(compiled);
        };
        let thread = thread::Builder::new().name("grammar".to_owned()).stack_size(COMPILE_STACK);
        thread.spawn(compile).map_err(|_| CompileError::Busy)?;
        let left = until.saturating_duration_since(Instant::now());
        let compiled = outcome.recv_timeout(left).unwrap_or_else(|_| {
            Err(format!("it does not compile within {} seconds", self.limits.compile_time.as_secs()))
        });
        let template = Arc::new(Template(Mutex::new(compiled.map_err(CompileError::Invalid)?)));
        lock(&self.kept).keep(key, Arc::clone(&template));
        Ok(template)
    }
}
