//! From flags to a running engine: what `serve` and `bench` share.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ctxserve_chat::{ChatFormat, Conversation, Message, Tokenizer};
use ctxserve_core::{Event, FinishReason, GenerateRequest, RequestId, SamplingParams, StopRules};
use ctxserve_engine::{Bytes, Engine, EngineConfig, EngineHandle, Runner};
use ctxserve_models::{LoadOptions, ModelInfo, inspect};
use ctxserve_server::{ServerConfig, ServerState};

use crate::cli::options::{DeviceOptions, LogOptions, ServeOptions};
use crate::cli::values::{Values, from_file};
use crate::device::{self, Limits, Plan, Target};
use crate::logging;
use crate::memory::budget;
use crate::model::{Body, Model};
use crate::profile;
use crate::sampling;
use crate::source::Source;

/// What is run when no model is named.
const DEFAULT_MODEL: &str = "demo";

/// What was asked for; nothing is opened yet.
pub(crate) struct Asked {
    /// Every flag.
    pub(crate) options: ServeOptions,
    /// What the flags were read from, files and profile included.
    pub(crate) values: Values,
    name: String,
    source: Source,
    plan: Plan,
}

impl Asked {
    /// Reads flags, `--config` and the model's profile, and starts the log.
    ///
    /// # Errors
    /// Flags that make no sense or that this build cannot honour.
    pub(crate) fn read(mut values: Values) -> anyhow::Result<Self> {
        if let Some(path) = values.text("config").map(PathBuf::from) {
            values.offer_all(from_file(&path)?);
        }
        let asked = values.text("model").map(str::to_owned);
        let name = asked.as_deref().unwrap_or(DEFAULT_MODEL).to_owned();
        let profile = profile::find(&name)?;
        let place =
            profile.as_ref().and_then(|(_, profile)| profile.text("model")).unwrap_or(&name).to_owned();
        let profile_name = profile.as_ref().map(|(name, _)| *name);
        if let Some((_, profile)) = profile {
            values.offer_all(profile);
        }
        logging::start(&LogOptions::new(&values)?);
        let options = ServeOptions::new(&values, |name| std::env::var(name).ok())?;
        tracing::info!("ctxserve {}", env!("CARGO_PKG_VERSION"));
        if asked.is_none() {
            tracing::warn!(
                "no model named: this is demo, whose weights are random and whose answers mean nothing"
            );
        }
        if let Some(profile) = profile_name {
            tracing::info!("profile {profile}: {place}");
        }
        options.notes.iter().for_each(|note| tracing::warn!("{note}"));
        let source: Source = place.parse()?;
        let plan = device::plan(&options.device, options.engine.max_batched_tokens)?;
        plan.notes.iter().for_each(|note| tracing::warn!("{note}"));
        Ok(Self { options, values, name, source, plan })
    }

    /// Finds the model, downloads it if need be, and settles every limit. No weight is read.
    ///
    /// # Errors
    /// A model that cannot be found or run, and limits that it or the memory does not have.
    pub(crate) fn open(self) -> anyhow::Result<Opened> {
        let start = Instant::now();
        let Self { mut options, values, name, source, plan } = self;
        let model = Model::open(&source, &name, &options.model)?;
        let (plan, info, Sized { engine, room }) = settle(&mut options, &values, &model, plan)?;
        let load = load_options(&plan);
        let family = info.as_ref().map(|info| info.family);
        let (asked, template) =
            (options.model.chat_format.as_deref(), options.model.chat_template.as_deref());
        let format = model.format(asked, family, template)?;
        ServeOptions::check_parsers(&values, format.name())?;
        describe(&model, info.as_ref(), format.name());
        let server = server_config(&options, &model, info.as_ref(), &*format)?;
        server.check(&*format).context("--default-chat-template-kwargs")?;
        let times = StartTimes { open: start.elapsed(), ..StartTimes::default() };
        let target = plan.target;
        Ok(Opened { info, engine, room, server, model, format, target, device: options.device, load, times })
    }
}

/// A model that can be started.
pub(crate) struct Opened {
    /// The model's facts; a script has none.
    pub(crate) info: Option<ModelInfo>,
    /// The engine's limits.
    pub(crate) engine: EngineConfig,
    /// Bytes free beside the weights, if known.
    pub(crate) room: Option<usize>,
    /// The server's settings.
    pub(crate) server: ServerConfig,
    model: Model,
    format: Arc<dyn ChatFormat>,
    target: Target,
    device: DeviceOptions,
    load: LoadOptions,
    times: StartTimes,
}

impl Opened {
    /// What the memory of the device gives, if it can be measured.
    ///
    /// # Errors
    /// A device fault.
    pub(crate) fn bandwidth(&self) -> anyhow::Result<Option<f64>> {
        self.target.bandwidth()
    }

    /// Loads the weights, starts the engine and generates one token.
    ///
    /// # Errors
    /// Weights that cannot be read or do not fit, and a model that cannot generate.
    pub(crate) fn start(self) -> anyhow::Result<Started> {
        let mut times = self.times;
        let mut start = Instant::now();
        let mut lap = || std::mem::replace(&mut start, Instant::now()).elapsed();
        let root = self.model.root;
        let runner: Box<dyn Runner> = match self.model.body {
            Body::Checkpoint(checkpoint) => {
                let info = self.info.as_ref().context("nothing is known of the model")?;
                let limits = Limits {
                    chunk: self.engine.max_batched_tokens,
                    sequences: self.engine.max_num_seqs.min(self.engine.max_batched_tokens),
                    context: self.engine.max_model_len.unwrap_or(0),
                };
                self.target.open(&checkpoint, &self.device, self.load, limits, info)?
            }
            Body::Script(runner) => Box::new(runner),
        };
        times.weights = lap();
        let engine = Engine::start(runner, self.engine)?;
        engine.info().kv.to_string().lines().for_each(|line| tracing::info!("{line}"));
        times.engine = lap();
        if self.info.is_some() {
            warm_up(&engine, &*self.format).context("the first token")?;
        }
        times.first_token = lap();
        let Self { server, format, .. } = self;
        Ok(Started { engine, root, server, tokenizer: self.model.tokenizer, format, times })
    }
}

/// A running engine and what a server needs beside it.
pub(crate) struct Started {
    /// The engine.
    pub(crate) engine: EngineHandle,
    /// Where the model came from.
    pub(crate) root: String,
    /// The server's settings.
    pub(crate) server: ServerConfig,
    /// Where the time went.
    pub(crate) times: StartTimes,
    tokenizer: Arc<Tokenizer>,
    format: Arc<dyn ChatFormat>,
}

impl Started {
    /// What the routes share.
    ///
    /// # Errors
    /// Settings that contradict each other.
    pub(crate) fn state(&self) -> anyhow::Result<ServerState> {
        let (tokenizer, format) = (Arc::clone(&self.tokenizer), Arc::clone(&self.format));
        Ok(ServerState::new(self.engine.clone(), tokenizer, format, self.server.clone())?)
    }
}

/// The parts of a start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct StartTimes {
    /// Finding the model, downloads included, and reading its configuration, headers and tokenizer.
    pub(crate) open: Duration,
    /// Weights onto the device.
    pub(crate) weights: Duration,
    /// Memory of the KV cache, and the engine's thread.
    pub(crate) engine: Duration,
    /// The first token.
    pub(crate) first_token: Duration,
}

impl fmt::Display for StartTimes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [open, weights, engine, first] =
            [self.open, self.weights, self.engine, self.first_token].map(|part| part.as_secs_f64());
        write!(f, "open {open:.1}, weights {weights:.1}, KV cache {engine:.1}, first token {first:.1}")
    }
}

fn load_options(plan: &Plan) -> LoadOptions {
    LoadOptions { page_size: plan.page_size, kv_dtype: plan.kv_dtype }
}

/// The plan, the model's facts under it, and sizes that fit: of the CPU, if a GPU that nobody asked for cannot hold the model.
fn settle(
    options: &mut ServeOptions,
    values: &Values,
    model: &Model,
    mut plan: Plan,
) -> anyhow::Result<(Plan, Option<ModelInfo>, Sized)> {
    loop {
        if values.get("max-num-seqs").is_none() {
            options.engine.max_num_seqs = plan.sequences;
        }
        let info = match &model.body {
            Body::Checkpoint(checkpoint) => Some(inspect(checkpoint, &load_options(&plan))?),
            Body::Script(_) => None,
        };
        let why = match engine_config(options, info.as_ref(), &plan) {
            Ok(sized) => return Ok((plan, info, sized)),
            Err(why) => why,
        };
        match device::instead(&options.device, options.engine.max_batched_tokens, &plan, &why) {
            Some(other) => plan = other,
            None => return Err(why),
        }
        plan.notes.iter().for_each(|note| tracing::warn!("{note}"));
    }
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

/// Limits that fit.
struct Sized {
    engine: EngineConfig,
    /// Bytes free beside the weights, if known.
    room: Option<usize>,
}

/// The engine's limits, with a KV cache that fits into memory beside the weights.
fn engine_config(options: &ServeOptions, info: Option<&ModelInfo>, plan: &Plan) -> anyhow::Result<Sized> {
    let (engine, chunk) = (&options.engine, plan.chunk);
    let (mut kv_bytes, mut max_model_len, mut left) = (options.device.kv_bytes, engine.max_model_len, None);
    if let Some(info) = info {
        let context = engine.max_model_len.unwrap_or(info.max_context).min(info.max_context);
        let limits = Limits { chunk, sequences: engine.max_num_seqs.min(chunk), context };
        let room = plan.target.room(info, limits, options.device.gpu_share)?;
        if let (Some(asked), Some(free), true) = (kv_bytes, room.free, room.take_all)
            && asked > free
        {
            let (asked, free) = (Bytes(asked), Bytes(free));
            bail!("--kv-cache-memory-bytes {asked}: {free} are free beside weights and workspace");
        }
        if room.take_all {
            kv_bytes = kv_bytes.or(room.free);
        }
        let budget = budget(&info.kv, info.max_context, chunk, engine, kv_bytes, room.free)?;
        let weights = Bytes(room.weights);
        let stored = usize::try_from(info.weight_bytes).unwrap_or(usize::MAX);
        if room.weights > stored.saturating_add(stored / 64) {
            let stored = Bytes(stored);
            tracing::info!("weights of {stored} take {weights}: codes without kernels become bfloat16");
        }
        let free = room.free.map_or_else(|| "an unknown amount".to_owned(), |free| Bytes(free).to_string());
        let (workspace, reserve) = (Bytes(room.workspace), Bytes(room.reserve));
        tracing::info!(
            "memory: weights {weights}, workspace {workspace}, driver and graphs {reserve}, KV cache up to {} of the {free} left",
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
        (kv_bytes, max_model_len, left) = (Some(budget.bytes), Some(budget.max_model_len), room.free);
    }
    let config = EngineConfig {
        max_num_seqs: engine.max_num_seqs,
        max_batched_tokens: chunk,
        max_model_len,
        kv_bytes,
        max_queued_requests: engine.max_queued_requests,
        max_queued_tokens: engine.max_queued_tokens,
        prefix_caching: engine.prefix_caching,
    };
    Ok(Sized { engine: config, room: left })
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
        default_template_arguments: options.model.template_arguments.clone(),
        enable_auto_tool_choice: options.http.auto_tools,
        reasoning_names: options.http.reasoning_names,
        drain_timeout: options.http.drain,
        limits: options.http.limits.clone(),
        metrics_without_key: options.http.metrics_without_key,
        browsers: options.http.browsers.clone(),
        ..ServerConfig::default()
    })
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
        guide: None,
        salt: None,
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
