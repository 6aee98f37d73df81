//! What an operator may set.

use std::time::Duration;

use ctxserve_core::{SamplingParams, TokenId};

/// The date that formats may put into the prompt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PromptDate {
    /// The current day, UTC.
    #[default]
    Today,
    /// Always this `YYYY-MM-DD`, for reproducible prompts.
    Fixed(String),
    /// None.
    Omitted,
}

/// Settings of the HTTP server. Everything has a default.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Names that requests may use for the model; the first is the default and the metrics label. Not empty.
    pub served_model_names: Vec<String>,
    /// `root` of `/v1/models`: where the weights came from.
    pub model_root: String,
    /// When not empty, every route but the health probes needs `Authorization: Bearer` with one of them.
    pub api_keys: Vec<String>,
    /// Leave `/metrics` open although keys are set.
    pub metrics_without_key: bool,
    /// Sampling where a request is silent (the checkpoint's generation config or a profile).
    pub default_sampling: SamplingParams,
    /// `max_tokens` of a chat request that sets none; `None` is the rest of the context.
    pub default_max_tokens: Option<usize>,
    /// End-of-turn ids of the checkpoint; those of the chat format are added.
    pub eos: Vec<TokenId>,
    /// Accept `tools` with the implied `tool_choice: "auto"`.
    pub enable_auto_tool_choice: bool,
    /// Keep reasoning of turns before the last final answer in prompts.
    pub keep_reasoning: bool,
    /// Date in prompts.
    pub prompt_date: PromptDate,
    /// Largest request body, bytes.
    pub max_body_bytes: usize,
    /// How long a body may take to arrive.
    pub body_timeout: Duration,
    /// How long the headers of a request may take to arrive.
    pub header_timeout: Duration,
    /// Most tools in one request.
    pub max_tools: usize,
    /// Longest silence of a stream before a comment is sent.
    pub keep_alive: Duration,
    /// `/health` turns 503 when work is pending and the engine has not finished a step for this long.
    pub stall_timeout: Duration,
    /// How long running requests may take to finish after shutdown began.
    pub drain_timeout: Duration,
    /// `system_fingerprint` of responses.
    pub system_fingerprint: String,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            served_model_names: vec!["default".to_owned()],
            model_root: String::new(),
            api_keys: Vec::new(),
            metrics_without_key: false,
            default_sampling: SamplingParams::default(),
            default_max_tokens: None,
            eos: Vec::new(),
            enable_auto_tool_choice: true,
            keep_reasoning: false,
            prompt_date: PromptDate::Today,
            max_body_bytes: 32 << 20,
            body_timeout: Duration::from_secs(60),
            header_timeout: Duration::from_secs(30),
            max_tools: 1024,
            keep_alive: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(120),
            drain_timeout: Duration::from_secs(30),
            system_fingerprint: concat!("ctxserve-", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}
