//! Whether what is to be measured fits the engine, decided before any weight is read.

use anyhow::bail;
use ctxserve_backend::KvSpec;
use ctxserve_engine::{Bytes, EngineConfig};
use ctxserve_models::ModelInfo;

use super::http::UNCOUNTED;
use crate::cli::bench::BenchOptions;
use crate::cli::options::EngineOptions;
use crate::cli::values::{OptionError, Origin, Values};
use crate::start::Opened;

/// Tokens that a sequence may decode after the measured ones, before it hears that it is no longer read.
const SLACK: usize = 8;

/// Most tokens that a sequence of a decode measurement grows to while it is measured: its prompt, its first token, those
/// decoded while other prompts are worked off, and the measured ones.
///
/// # Errors
/// Rows or positions that the engine does not have.
pub(super) fn length(
    (batch, prompt): (usize, usize),
    output: usize,
    chunk: usize,
    max_model_len: usize,
) -> anyhow::Result<usize> {
    if batch > chunk {
        bail!(
            "--batch {batch}: a step has at most {chunk} tokens, one for each sequence; see --max-num-batched-tokens"
        );
    }
    // A prompt that does not fit by itself need not be played.
    let ramp = if prompt < max_model_len { ramp(batch, prompt, chunk) } else { 0 };
    let length = prompt.saturating_add(output).saturating_add(1 + ramp);
    if length > max_model_len {
        bail!(
            "--batch {batch} --prompt {prompt} --output {output}: with its first token and {ramp} more while the \
             others are prefilled, a sequence grows to {length} tokens, and --max-model-len is {max_model_len}"
        );
    }
    Ok(length)
}

/// Steps from the first sequence's first token to the last one's, when all are submitted at once: a step has `chunk`
/// rows, one for each sequence that decodes, the rest for prompts in order.
fn ramp(batch: usize, prompt: usize, chunk: usize) -> usize {
    let (mut decoding, mut prefilled, mut ramp) = (0, 0, 0);
    while decoding < batch {
        ramp += usize::from(decoding > 0);
        prefilled += chunk.saturating_sub(decoding).max(1);
        decoding = prefilled / prompt.max(1);
    }
    ramp
}

/// Makes room in the limits for the largest batch, unless the user has set them.
///
/// # Errors
/// A limit of the user's that is too small.
pub(super) fn widen(
    engine: &mut EngineOptions,
    values: &Values,
    options: &BenchOptions,
) -> Result<(), OptionError> {
    let batch = options.decode.iter().map(|&(batch, _)| batch).max().unwrap_or(1);
    if let Some(given) =
        values.get("max-num-seqs").filter(|given| !matches!(given.origin, Origin::Profile(_)))
        && engine.max_num_seqs < batch
    {
        let what = format!("{} sequences at once, and --batch needs {batch}", engine.max_num_seqs);
        return Err(OptionError::Value { name: "max-num-seqs", origin: given.origin.clone(), what });
    }
    engine.max_num_seqs = engine.max_num_seqs.max(batch);
    for &(requests, prompt) in options.decode.iter().chain(&options.prefill) {
        engine.max_queued_requests = engine.max_queued_requests.max(requests);
        engine.max_queued_tokens = engine.max_queued_tokens.max(requests.saturating_mul(prompt));
    }
    Ok(())
}

/// Checks every case against the engine's limits, and makes the KV cache large enough unless the user has sized it.
///
/// # Errors
/// The first case that does not fit.
pub(super) fn fit(
    opened: &mut Opened,
    info: &ModelInfo,
    options: &BenchOptions,
    sized: bool,
) -> anyhow::Result<()> {
    let config = &mut opened.engine;
    let max_model_len = config.max_model_len.unwrap_or(info.max_context);
    let alone = |flag: &str, prompt: usize, answer: usize| {
        if prompt.saturating_add(answer) > max_model_len {
            bail!(
                "{flag} {prompt}: with {answer} for the answer that is more than --max-model-len, which is {max_model_len}"
            );
        }
        Ok(())
    };
    options
        .http
        .iter()
        .try_for_each(|&prompt| alone("--http --prompt", prompt, options.output.saturating_add(UNCOUNTED)))?;
    options.ttft.iter().try_for_each(|&prompt| alone("--ttft", prompt, 1))?;
    options.prefill.iter().try_for_each(|&(_, prompt)| alone("--prefill", prompt, 1))?;
    for &case in &options.decode {
        let length = length(case, options.output, config.max_batched_tokens, max_model_len)?;
        let (batch, prompt) = case;
        let needed = kv_bytes(&info.kv, batch, length + SLACK, config, max_model_len);
        if config.kv_bytes.is_some_and(|bytes| bytes >= needed) {
            continue;
        }
        let what = format!(
            "--batch {batch} --prompt {prompt} --output {}: the KV cache must have {}",
            options.output,
            Bytes(needed)
        );
        match (config.kv_bytes, opened.room) {
            (Some(bytes), _) if sized => bail!("{what}, and --kv-cache-memory-bytes is {}", Bytes(bytes)),
            (_, Some(room)) if room < needed => {
                bail!("{what}, and {} are free beside the weights", Bytes(room))
            }
            _ => config.kv_bytes = Some(needed),
        }
    }
    Ok(())
}

/// Bytes of a KV cache that holds `batch` sequences of `length` tokens at once, none of which waits or gives way.
fn kv_bytes(
    spec: &KvSpec,
    batch: usize,
    length: usize,
    config: &EngineConfig,
    max_model_len: usize,
) -> usize {
    // The scheduler keeps a page free for every running sequence.
    let held = length.saturating_add(spec.page_size);
    let seqs = config.max_num_seqs.min(config.max_batched_tokens).max(1);
    let chunk = config.max_batched_tokens.min(max_model_len);
    let pages = |group: usize| match spec.groups[group].window {
        None => spec.pages_for(group, held, 1).saturating_mul(batch).max(spec.pages_for(
            group,
            max_model_len,
            chunk,
        )),
        // The engine gives windows what the most sequences can hold before it gives the rest to full attention.
        Some(_) => spec
            .pages_for(group, max_model_len, 1)
            .saturating_mul(seqs - 1)
            .saturating_add(spec.pages_for(group, max_model_len, chunk)),
    };
    let bytes = |group| pages(group).saturating_mul(spec.page_bytes(group));
    let held = (0..spec.groups.len()).map(bytes).fold(0, usize::saturating_add);
    // Of what is left beside one sequence the engine keeps an eighth for the prefix cache.
    if config.prefix_caching { held.saturating_add(held / 7 + 1) } else { held }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ramp_is_the_steps_that_the_last_prompt_waits() {
        assert_eq!(ramp(1, 1024, 512), 0);
        // Both prompts in one step.
        assert_eq!(ramp(2, 16, 64), 0);
        // One prompt a step; the second step has one row less for prompts, so the second prompt ends in the third.
        assert_eq!(ramp(2, 64, 64), 2);
        // 17, 16 and 15 rows hold three prompts of 16.
        assert_eq!(ramp(3, 16, 17), 2);
        // Hardly a row left for prompts.
        assert_eq!(ramp(2, 10, 2), 10);
    }

    #[test]
    fn lengths_fit_or_say_why() {
        let of = |case, output, most| length(case, output, 64, most).map_err(|error| error.to_string());
        assert_eq!(of((1, 100), 10, 111), Ok(111));
        assert_eq!(of((2, 64), 10, 1000), Ok(64 + 1 + 2 + 10));
        let error = of((1, 100), 10, 110).unwrap_err();
        assert!(error.contains("111 tokens") && error.contains("--max-model-len is 110"), "{error}");
        let error = of((65, 100), 10, 1000).unwrap_err();
        assert!(error.contains("--batch 65") && error.contains("64 tokens"), "{error}");
        assert!(of((1, usize::MAX), usize::MAX, 1000).is_err());
    }
}
