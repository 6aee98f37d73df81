//! `serve`: from flags to a ready server, and to its end.

use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, bail};
use ctxserve_chat::{ChatFormat, Conversation, Message};
use ctxserve_core::{Event, FinishReason, GenerateRequest, RequestId, SamplingParams, StopRules};
use ctxserve_engine::{Bytes, Engine, EngineConfig, EngineHandle, EngineState, Runner};
use ctxserve_models::{LoadOptions, ModelInfo, inspect};
use ctxserve_server::{ServerConfig, ServerState};

use crate::cli::options::{HttpOptions, LogOptions, ServeOptions};
use crate::cli::values::{Values, from_file};
use crate::device;
use crate::logging;
use crate::memory::{budget, free_bytes};
use crate::model::{Body, Model};
use crate::profile;
use crate::sampling;
use crate::signals;
use crate::source::Source;

/// What is served when no model is named.
const DEFAULT_MODEL: &str = "demo";

/// Serves until a signal or a fault.
///
/// # Errors
/// Whatever keeps it from starting, or ended it.
pub fn serve(mut values: Values) -> anyhow::Result<()> {
    let start = Instant::now();
    if let Some(path) = values.text("config").map(PathBuf::from) {
        values.offer_all(from_file(&path)?);
    }
    let asked = values.text("model").map(str::to_owned);
    let name = asked.as_deref().unwrap_or(DEFAULT_MODEL);
    let profile = profile::find(name)?;
    let place = profile.as_ref().and_then(|(_, profile)| profile.text("model")).unwrap_or(name).to_owned();
    let profile_name = profile.as_ref().map(|(name, _)| *name);
    if let Some((_, profile)) = profile {
        values.offer_all(profile);
    }
    logging::start(&LogOptions::new(&values)?);
    let options = ServeOptions::new(&values, |name| std::env::var(name).ok())?;
    tracing::info!("ctxserve {}", env!("CARGO_PKG_VERSION"));
    if asked.is_none() {
        tracing::warn!(
            "no model named: serving demo, whose weights are random and whose answers mean nothing"
        );
    }
    if let Some(profile) = profile_name {
        tracing::info!("profile {profile}: {place}");
    }
    options.notes.iter().for_each(|note| tracing::warn!("{note}"));
    let source: Source = place.parse()?;
    let plan = device::plan(&options.device, options.engine.max_batched_tokens)?;
    plan.notes.iter().for_each(|note| tracing::warn!("{note}"));
    let listener = bind(&options.http)?;

    let model = Model::open(&source, name, &options.model)?;
    let load_options = LoadOptions { page_size: options.device.page_size, kv_dtype: plan.kv_dtype };
    let info = match &model.body {
        Body::Checkpoint(checkpoint) => Some(inspect(checkpoint, &load_options)?),
        Body::Script(_) => None,
    };
    let family = info.as_ref().map(|info| info.family);
    let format = model.format(options.model.chat_format.as_deref(), family)?;
    ServeOptions::check_parsers(&values, format.name())?;
    describe(&model, info.as_ref(), format.name());

    let engine_config = engine_config(&options, info.as_ref(), plan.chunk)?;
    let config = server_config(&options, &model, info.as_ref(), &*format)?;
    let engine = start_engine(model.body, &options, load_options, engine_config)?;
    engine.info().kv.to_string().lines().for_each(|line| tracing::info!("{line}"));
    if info.is_some() {
        warm_up(&engine, &*format).context("the first token")?;
    }
    let state = ServerState::new(engine, model.tokenizer, format, config)?;
    run(listener, state, start)
}

/// Takes the port before anything slow happens.
fn bind(http: &HttpOptions) -> anyhow::Result<TcpListener> {
    let place = format!("{}:{}", http.host, http.port);
    let addresses: Vec<SocketAddr> = (http.host.trim_matches(['[', ']']), http.port)
        .to_socket_addrs()
        .with_context(|| format!("--host {}: no such address", http.host))?
        .collect();
    let listener = TcpListener::bind(&addresses[..]).with_context(|| format!("cannot listen on {place}"))?;
    listener.set_nonblocking(true).context("the listening socket")?;
    Ok(listener)
}

fn describe(model: &Model, info: Option<&ModelInfo>, format: &str) {
    tracing::info!("model: {}", model.root);
    if let Some(info) = info {
        tracing::info!("{}", info.description);
    }
    tracing::info!("tokenizer: {} ids; chat format: {format}", model.tokenizer.len());
    if let Some(info) = info
        && model.tokenizer.len() > info.vocab_size
    {
        let (ids, logits) = (model.tokenizer.len(), info.vocab_size);
        tracing::warn!(
            "the tokenizer has {ids} ids and the model {logits}: texts that need the others are refused"
        );
    }
}

/// The engine's limits, with a KV cache that fits into memory beside the weights.
fn engine_config(
    options: &ServeOptions,
    info: Option<&ModelInfo>,
    chunk: usize,
) -> anyhow::Result<EngineConfig> {
    let engine = &options.engine;
    let (mut kv_bytes, mut max_model_len) = (options.device.kv_bytes, engine.max_model_len);
    if let Some(info) = info {
        let weights = usize::try_from(info.weight_bytes).unwrap_or(usize::MAX);
        let free = free_bytes().map(|free| {
            if weights > free {
                tracing::warn!("the weights take {} and {} of memory are free", Bytes(weights), Bytes(free));
            }
            free.saturating_sub(weights)
        });
        let budget = budget(&info.kv, info.max_context, chunk, engine, kv_bytes, free)?;
        let left = free.map_or_else(|| "an unknown amount".to_owned(), |free| Bytes(free).to_string());
        tracing::info!(
            "memory: weights {}, KV cache up to {}, {left} free beside the weights",
            Bytes(weights),
            Bytes(budget.bytes)
        );
        if let Some(full) = budget.shortened_from {
            tracing::warn!(
                "sequences are limited to {} tokens instead of {full}: the KV cache has {}; see \
                 --kv-cache-memory-bytes and --kv-cache-dtype",
                budget.max_model_len,
                Bytes(budget.bytes),
            );
        }
        (kv_bytes, max_model_len) = (Some(budget.bytes), Some(budget.max_model_len));
    }
    Ok(EngineConfig {
        max_num_seqs: engine.max_num_seqs,
        max_batched_tokens: chunk,
        max_model_len,
        kv_bytes,
        max_queued_requests: engine.max_queued_requests,
        max_queued_tokens: engine.max_queued_tokens,
    })
}

fn server_config(
    options: &ServeOptions,
    model: &Model,
    info: Option<&ModelInfo>,
    format: &dyn ChatFormat,
) -> anyhow::Result<ServerConfig> {
    let vocab = info.map_or_else(|| model.tokenizer.len(), |info| info.vocab_size);
    if let Some(id) = format.stop_ids().iter().find(|&&id| id as usize >= vocab) {
        bail!("chat format {} ends turns with token {id}, and the model has {vocab}", format.name());
    }
    let defaults = sampling::defaults(
        &options.model.generation,
        model.generation_config(),
        &options.model.overrides,
        vocab,
    )?;
    let names = &options.model.served_names;
    Ok(ServerConfig {
        served_model_names: if names.is_empty() { vec![model.name.clone()] } else { names.clone() },
        model_root: model.root.clone(),
        api_keys: options.http.api_keys.clone(),
        default_sampling: defaults.sampling,
        default_max_tokens: defaults.max_tokens,
        eos: info.map(|info| info.eos.clone()).unwrap_or_default(),
        enable_auto_tool_choice: options.http.auto_tools,
        drain_timeout: options.http.drain,
        ..ServerConfig::default()
    })
}

fn start_engine(
    body: Body,
    options: &ServeOptions,
    load_options: LoadOptions,
    config: EngineConfig,
) -> anyhow::Result<EngineHandle> {
    let runner: Box<dyn Runner> = match body {
        Body::Checkpoint(checkpoint) => device::open(&checkpoint, &options.device, load_options)?,
        Body::Script(runner) => Box::new(runner),
    };
    Ok(Engine::start(runner, config)?)
}

/// Generates one token: a model that cannot is found out here and not by the first client.
fn warm_up(engine: &EngineHandle, format: &dyn ChatFormat) -> anyhow::Result<()> {
    let hello = Message::User { name: None, content: "Hello".to_owned() };
    let mut prompt = format.render(&Conversation { messages: vec![hello], ..Conversation::default() })?;
    prompt.truncate(engine.info().max_model_len.saturating_sub(1).max(1));
    let vocab = engine.info().vocab_size;
    prompt.retain(|&id| (id as usize) < vocab);
    let mut events = engine.submit(GenerateRequest {
        id: RequestId(u64::MAX),
        prompt: prompt.into(),
        sampling: SamplingParams::greedy(),
        stop: StopRules::default(),
        max_tokens: 1,
    })?;
    let mut tokens = 0;
    while let Some(event) = events.blocking_next() {
        match event {
            Event::Token(_) => tokens += 1,
            Event::Finished { reason: FinishReason::Error(what) | FinishReason::Fault(what), .. } => {
                bail!(what)
            }
            Event::Finished { .. } if tokens == 0 => bail!("the model generated nothing"),
            Event::Admitted | Event::Finished { .. } => {}
        }
    }
    Ok(())
}

fn run(listener: TcpListener, state: ServerState, start: Instant) -> anyhow::Result<()> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("async runtime")?;
    let end = runtime.block_on(async {
        let address = listener.local_addr()?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let stop = signals::stop()?;
        let names = state.config().served_model_names.join(", ");
        let seconds = start.elapsed().as_secs_f64();
        tracing::info!("serving {names}; ready on http://{address} in {seconds:.1}s");
        ctxserve_server::serve(listener, state, stop).await
    });
    runtime.shutdown_background();
    match end? {
        EngineState::Faulted(what) => bail!("the engine failed: {what}"),
        EngineState::Running | EngineState::Draining | EngineState::Stopped => {
            tracing::info!("stopped");
            Ok(())
        }
    }
}
