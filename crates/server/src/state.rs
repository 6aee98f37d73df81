//! What every route shares.

use std::hash::{BuildHasher, RandomState};
use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use ctxserve_chat::guide::Guides;
use ctxserve_chat::{ChatFormat, Tokenizer};
use ctxserve_core::{RequestId, TokenId};
use ctxserve_engine::EngineHandle;
use thiserror::Error;
use tokio::sync::Semaphore;

use crate::api::responses::live::Live;
use crate::config::ServerConfig;
use crate::error::ApiError;
use crate::http::origin::BrowsersError;
use crate::metrics::Metrics;
use crate::store::Store;
use crate::turns::Turns;

/// Requests that may be prepared at once, for each core.
const PREPARED_PER_CORE: usize = 2;

/// A server that cannot be set up.
#[derive(Debug, Error)]
pub enum ServerError {
    /// No name to serve the model under.
    #[error("served_model_names must not be empty")]
    NoModelName,
    /// An argument of the chat template that it does not take, or not so.
    #[error("default_template_arguments: {0}")]
    TemplateArguments(String),
    /// Settings for web pages that nobody should have.
    #[error(transparent)]
    Browsers(#[from] BrowsersError),
    /// The metrics recorder refused its tables.
    #[error("metrics: {0}")]
    Metrics(#[from] metrics_exporter_prometheus::BuildError),
}

/// Shared by all routes; cheap to clone.
#[derive(Clone)]
pub struct ServerState {
    inner: Arc<Inner>,
}

struct Inner {
    config: ServerConfig,
    engine: EngineHandle,
    tokenizer: Arc<Tokenizer>,
    format: Arc<dyn ChatFormat>,
    guides: Arc<Guides>,
    metrics: Metrics,
    responses: Store<Live>,
    turns: Turns,
    eos: Arc<[TokenId]>,
    /// Unix seconds.
    started: u64,
    next_request: AtomicU64,
    /// Bounds how many requests are parsed and rendered at once, and with it their memory and the cores they take.
    preparing: Arc<Semaphore>,
    /// Keyed at random per process: names made from it cannot be guessed from earlier ones.
    random: RandomState,
}

impl ServerState {
    /// Brings the parts together.
    ///
    /// # Errors
    /// See [`ServerError`].
    pub fn new(
        engine: EngineHandle,
        tokenizer: Arc<Tokenizer>,
        format: Arc<dyn ChatFormat>,
        config: ServerConfig,
    ) -> Result<Self, ServerError> {
        let model = config.served_model_names.first().ok_or(ServerError::NoModelName)?;
        config.check(&*format)?;
        let metrics = Metrics::new(model, &engine)?;
        let mut eos = config.eos.clone();
        eos.extend(format.stop_ids().iter().filter(|id| !config.eos.contains(id)));
        let guides = Arc::new(Guides::with_limits(Arc::clone(&tokenizer), config.limits.guides()));
        let warming = Arc::clone(&guides);
        // The first constrained request would wait for it; if there is no thread, it does.
        let _ = std::thread::Builder::new().name("vocabulary".to_owned()).spawn(move || warming.warm_up());
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        let inner = Inner {
            eos: eos.into(),
            metrics,
            responses: Store::new(
                config.limits.max_stored_responses,
                config.limits.max_stored_response_bytes,
            ),
            turns: Turns::new(config.limits.max_turn_bytes),
            started: unix_seconds(),
            next_request: AtomicU64::new(0),
            preparing: Arc::new(Semaphore::new(cores * PREPARED_PER_CORE)),
            random: RandomState::new(),
            config,
            engine,
            tokenizer,
            format,
            guides,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The operator's settings.
    pub fn config(&self) -> &ServerConfig {
        &self.inner.config
    }

    /// The engine behind the routes.
    pub fn engine(&self) -> &EngineHandle {
        &self.inner.engine
    }

    /// A place among the requests being prepared.
    pub(crate) fn preparing(&self) -> Arc<Semaphore> {
        Arc::clone(&self.inner.preparing)
    }

    pub(crate) fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.inner.tokenizer
    }

    pub(crate) fn format(&self) -> &dyn ChatFormat {
        &*self.inner.format
    }

    pub(crate) fn guides(&self) -> &Guides {
        &self.inner.guides
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.inner.metrics
    }

    /// Responses that clients may come back to.
    pub(crate) fn responses(&self) -> &Store<Live> {
        &self.inner.responses
    }

    /// What was answered, for histories that repeat it.
    pub(crate) fn turns(&self) -> &Turns {
        &self.inner.turns
    }

    /// End-of-turn ids of checkpoint and format.
    pub(crate) fn eos(&self) -> Arc<[TokenId]> {
        Arc::clone(&self.inner.eos)
    }

    pub(crate) fn started(&self) -> u64 {
        self.inner.started
    }

    pub(crate) fn next_request(&self) -> RequestId {
        RequestId(self.inner.next_request.fetch_add(1, Ordering::Relaxed))
    }

    /// `prefix` and 128 random bits in hex.
    pub(crate) fn random_name(&self, prefix: &str) -> String {
        let n = self.inner.next_request.fetch_add(1, Ordering::Relaxed);
        let (high, low) = (self.inner.random.hash_one((n, 0u8)), self.inner.random.hash_one((n, 1u8)));
        format!("{prefix}{high:016x}{low:016x}")
    }

    /// The served name that a request means.
    ///
    /// # Errors
    /// 404 for any other name.
    pub(crate) fn model(&self, asked: Option<&str>) -> Result<String, ApiError> {
        let names = &self.inner.config.served_model_names;
        match asked {
            None => Ok(names.first().cloned().unwrap_or_default()),
            Some(name) if names.iter().any(|n| n == name) => Ok(name.to_owned()),
            Some(name) => Err(ApiError::unknown_model(name)),
        }
    }
}

/// Seconds since 1970; zero on a clock before that.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}
