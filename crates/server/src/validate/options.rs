//! Sampling, stopping and output options.

use std::collections::BTreeMap;
use std::sync::Arc;

use ctxserve_core::{SamplingParams, StopRules, TokenId};

use crate::error::ApiError;
use crate::limits::Limits;
use crate::state::ServerState;
use crate::wire::fields::GenerationFields;

/// What both generation routes take from a request, checked.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) model: String,
    pub(crate) n: usize,
    pub(crate) sampling: SamplingParams,
    pub(crate) rules: StopRules,
    pub(crate) stop: Arc<[String]>,
    pub(crate) include_stop: bool,
    pub(crate) stream: bool,
    pub(crate) usage: StreamUsage,
    pub(crate) skip_special: bool,
    pub(crate) return_token_ids: bool,
    /// As asked; the context may hold less.
    pub(crate) max_tokens: Option<usize>,
    /// What keeps the prompt's prefix apart from others'.
    pub(crate) salt: Option<Arc<str>>,
}

/// When frames of a stream carry usage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamUsage {
    /// Never.
    Off,
    /// In a last frame without choices; null before.
    Last,
    /// In every frame.
    Every,
}

/// Log-probabilities as the route asked for them, and the field that a bound names.
pub(crate) type Logprobs = Option<(usize, &'static str)>;

/// Checks what the routes share. `max_tokens` is the route's own field, if it has one, else `fields.max_tokens`.
///
/// # Errors
/// 400 naming the field, 404 for an unknown model.
pub(crate) fn options(
    state: &ServerState,
    fields: GenerationFields,
    max_tokens: Option<(u64, &'static str)>,
    logprobs: Logprobs,
) -> Result<Options, ApiError> {
    let model = state.model(fields.model.as_deref())?;
    let vocab = state.engine().info().vocab_size;
    let limits = &state.config().limits;
    let n = choices(fields.n, fields.best_of, limits.max_n)?;
    let stream = fields.stream.unwrap_or(false);
    let usage = stream_usage(&fields, stream)?;
    let max_tokens = max_tokens.or(fields.max_tokens.map(|most| (most, "max_tokens")));
    let max_tokens = max_tokens.map(|(most, param)| positive(param, most)).transpose()?;
    let min_tokens = to_usize(fields.min_tokens.unwrap_or(0));
    if max_tokens.is_some_and(|most| min_tokens > most) {
        let message = format!("min_tokens ({min_tokens}) must not exceed max_tokens");
        return Err(ApiError::invalid("min_tokens", message));
    }
    let rules = StopRules {
        eos: state.eos(),
        token_ids: stop_ids(
            fields.stop_token_ids.clone().unwrap_or_default(),
            vocab,
            limits.max_stop_token_ids,
        )?,
        ignore_eos: fields.ignore_eos.unwrap_or(false),
    };
    let stop = stop_strings(fields.stop.as_ref().map_or(&[], |stop| &stop.0), limits)?;
    let salt = cache_salt(fields.cache_salt.as_deref())?;
    let sampling = sampling(state, &fields, min_tokens, logprobs, vocab)?;
    Ok(Options {
        model,
        n,
        sampling,
        rules,
        stop,
        include_stop: fields.include_stop_str_in_output.unwrap_or(false),
        stream,
        usage,
        skip_special: fields.skip_special_tokens.unwrap_or(true),
        return_token_ids: fields.return_token_ids.unwrap_or(false),
        max_tokens,
        salt,
    })
}

/// Most tokens to generate after `prompt` tokens: what was asked for or `default`, cut to what the context holds.
///
/// # Errors
/// 400 when the context holds nothing more, or less than `min_tokens`.
pub(crate) fn room(
    state: &ServerState,
    options: &Options,
    default: Option<usize>,
    prompt: usize,
    param: &'static str,
) -> Result<usize, ApiError> {
    let max = state.engine().info().max_model_len;
    let left = max.saturating_sub(prompt);
    if left == 0 {
        return Err(ApiError::context_length(prompt, max, param));
    }
    let most = options.max_tokens.or(default).map_or(left, |most| most.min(left));
    let least = options.sampling.min_tokens;
    if least > left {
        let message =
            format!("min_tokens is {least}, the context has room for {left} tokens after the prompt");
        return Err(ApiError::invalid("min_tokens", message));
    }
    Ok(most.max(least))
}

fn choices(n: Option<u64>, best_of: Option<u64>, most: usize) -> Result<usize, ApiError> {
    let asked = n.unwrap_or(1);
    let n = positive("n", asked)?;
    if n > most {
        return Err(ApiError::invalid("n", format!("n must be at most {most}, got {n}")));
    }
    if best_of.is_some_and(|best_of| best_of != asked) {
        return Err(ApiError::unsupported("best_of", "best_of is only supported when it equals n"));
    }
    Ok(n)
}

fn stream_usage(fields: &GenerationFields, stream: bool) -> Result<StreamUsage, ApiError> {
    let Some(asked) = &fields.stream_options else { return Ok(StreamUsage::Off) };
    if !stream {
        return Err(ApiError::invalid(
            "stream_options",
            "stream_options is only allowed when stream is true",
        ));
    }
    Ok(match (asked.include_usage, asked.continuous_usage_stats) {
        (Some(true), Some(true)) => StreamUsage::Every,
        (Some(true), _) => StreamUsage::Last,
        _ => StreamUsage::Off,
    })
}

/// A count that a machine of this width cannot hold is as good as infinite.
fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

fn positive(param: &'static str, value: u64) -> Result<usize, ApiError> {
    if value == 0 {
        return Err(ApiError::invalid(param, format!("{param} must be at least 1")));
    }
    Ok(to_usize(value))
}

fn stop_ids(ids: Vec<TokenId>, vocab: usize, most: usize) -> Result<Vec<TokenId>, ApiError> {
    let param = "stop_token_ids";
    if ids.len() > most {
        return Err(ApiError::invalid(
            param,
            format!("{} stop token ids, at most {most} are allowed", ids.len()),
        ));
    }
    match ids.iter().find(|&&id| id as usize >= vocab) {
        Some(id) => {
            Err(ApiError::invalid(param, format!("token id {id} is outside the vocabulary of {vocab}")))
        }
        None => Ok(ids),
    }
}

fn stop_strings(strings: &[String], limits: &Limits) -> Result<Arc<[String]>, ApiError> {
    let fail = |message| Err(ApiError::invalid("stop", message));
    let most = limits.max_stop_strings;
    if strings.len() > most {
        return fail(format!("{} stop strings, at most {most} are allowed", strings.len()));
    }
    if strings.iter().any(String::is_empty) {
        return fail("a stop string must not be empty".to_owned());
    }
    let most = limits.max_stop_bytes;
    if strings.iter().any(|s| s.len() > most) {
        return fail(format!("a stop string must be at most {most} bytes"));
    }
    Ok(strings.into())
}

/// Longest `cache_salt`, bytes.
const MAX_SALT: usize = 128;

/// One alphabet and length, checked here and nowhere below: it ends up in keys of caches.
fn cache_salt(salt: Option<&str>) -> Result<Option<Arc<str>>, ApiError> {
    let Some(salt) = salt else { return Ok(None) };
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.:".contains(&byte);
    if !(1..=MAX_SALT).contains(&salt.len()) || !salt.bytes().all(known) {
        let message = format!("cache_salt is 1 to {MAX_SALT} letters, digits, '_', '-', '.' or ':'");
        return Err(ApiError::invalid("cache_salt", message));
    }
    Ok(Some(salt.into()))
}

fn sampling(
    state: &ServerState,
    fields: &GenerationFields,
    min_tokens: usize,
    logprobs: Logprobs,
    vocab: usize,
) -> Result<SamplingParams, ApiError> {
    let config = state.config();
    let (default, limits) = (&config.default_sampling, &config.limits);
    if let Some((count, param)) = logprobs
        && count > limits.max_logprobs
    {
        let most = limits.max_logprobs;
        return Err(ApiError::invalid(param, format!("{param} must be at most {most}")));
    }
    let top_k = match fields.top_k {
        None => default.top_k,
        Some(-1 | 0) => 0,
        Some(k) if k > 0 => u32::try_from(k).unwrap_or(u32::MAX),
        Some(k) => return Err(ApiError::invalid("top_k", format!("top_k must be -1, 0 or more, got {k}"))),
    };
    let sampling = SamplingParams {
        temperature: fields.temperature.unwrap_or(default.temperature),
        top_p: fields.top_p.unwrap_or(default.top_p),
        top_k,
        min_p: fields.min_p.unwrap_or(default.min_p),
        presence_penalty: fields.presence_penalty.unwrap_or(default.presence_penalty),
        frequency_penalty: fields.frequency_penalty.unwrap_or(default.frequency_penalty),
        repetition_penalty: fields.repetition_penalty.unwrap_or(default.repetition_penalty),
        logit_bias: logit_bias(fields, limits.max_logit_bias)?,
        // Any 64 bits make a seed; negative ones are as good as others.
        seed: fields.seed.map(i64::cast_unsigned),
        logprobs: logprobs.map(|(count, _)| count),
        min_tokens,
    };
    sampling.validate(vocab)?;
    Ok(sampling)
}

fn logit_bias(fields: &GenerationFields, most: usize) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let count = fields.logit_bias.as_ref().map_or(0, BTreeMap::len);
    if count > most {
        let message = format!("logit_bias has {count} entries, at most {most} are allowed");
        return Err(ApiError::invalid("logit_bias", message));
    }
    let entries = fields.logit_bias.iter().flatten().map(|(key, &bias)| match key.parse() {
        Ok(id) => Ok((id, bias)),
        Err(_) => {
            let shown: String = key.chars().take(32).collect();
            Err(ApiError::invalid("logit_bias", format!("logit_bias key {shown:?} is not a token id")))
        }
    });
    entries.collect()
}
