//! What the operator chooses, and why a start can fail.

use ctxserve_backend::DeviceError;
use thiserror::Error;

/// Limits of one engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Most sequences computed in one step. More than `max_batched_tokens` is cut to it, so that every running
    /// sequence can have a row in every step.
    pub max_num_seqs: usize,
    /// Most rows (decode tokens plus prompt tokens) of one step: the bound on how long a prefill can delay others.
    pub max_batched_tokens: usize,
    /// Longest prompt plus answer, tokens. `None` takes the model's own limit, or less where the KV budget holds less.
    pub max_model_len: Option<usize>,
    /// Bytes for keys and values. `None` takes room for one sequence of the longest length or for 16 sequences of
    /// 4,096 tokens, whichever is more.
    pub kv_bytes: Option<usize>,
    /// Sequences that may wait beyond the `max_num_seqs` that run.
    pub max_queued_requests: usize,
    /// Prompt tokens that may wait. A request is never refused for its own length alone: an empty queue takes it.
    pub max_queued_tokens: usize,
    /// Keep what was computed for prompts and answers, as far as there is room, for prompts that begin alike.
    pub prefix_caching: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_num_seqs: 64,
            max_batched_tokens: 512,
            max_model_len: None,
            kv_bytes: None,
            max_queued_requests: 256,
            max_queued_tokens: 1 << 20,
            prefix_caching: true,
        }
    }
}

/// Why an engine could not start.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum EngineError {
    /// A limit makes no sense by itself.
    #[error("{field} {message}")]
    Config {
        /// The field of [`EngineConfig`], or the part of the model's description.
        field: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// `max_model_len` exceeds what the model was made for.
    #[error("max_model_len {asked} exceeds the model's {max} positions")]
    ContextTooLong {
        /// Tokens asked for.
        asked: usize,
        /// Tokens the model supports.
        max: usize,
    },
    /// The KV budget cannot hold one sequence.
    #[error(
        "the KV cache budget of {budget} bytes cannot hold one sequence of {max_model_len} tokens, which needs \
         {needed} bytes; raise the budget, or lower max_model_len to at most {fits}"
    )]
    KvTooSmall {
        /// Bytes allowed.
        budget: usize,
        /// Bytes that one sequence of `max_model_len` needs.
        needed: usize,
        /// Tokens asked for.
        max_model_len: usize,
        /// The longest sequence that the budget holds, tokens.
        fits: usize,
    },
    /// The device refused the KV pools.
    #[error("allocating the KV cache: {0}")]
    Device(#[from] DeviceError),
    /// The operating system refused a thread.
    #[error("starting the engine thread: {0}")]
    Thread(String),
}
