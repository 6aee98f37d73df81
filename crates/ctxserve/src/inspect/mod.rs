//! `inspect`: what a checkpoint is, what it takes, what will fit, and what is odd about it.

mod fit;
mod odd;

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use ctxserve_backend::{KvDtype, KvSpec};
use ctxserve_chat::Tokenizer;
use ctxserve_checkpoint::{Checkpoint, Want};
use ctxserve_core::TokenId;
use ctxserve_engine::Bytes;
use ctxserve_models::{LoadOptions, ModelInfo, inspect, wants};
use serde::Serialize;
use serde_json::Value;

use crate::cli::checkpoints::InspectArgs;
use crate::model::{format_of, open_format};
use crate::source;
use fit::Fit;

/// Positions per page, where no device has its say.
const PAGE_SIZE: usize = 16;
/// A chunk of prefill, which a sliding window must hold beside itself.
const CHUNK: usize = 512;

/// All that is found out.
#[derive(Debug, Serialize)]
struct Findings {
    path: String,
    architecture: String,
    family: &'static str,
    description: String,
    format: &'static str,
    layers: usize,
    vocab_size: usize,
    context: usize,
    bytes: u64,
    bytes_by_kind: Vec<Kind>,
    kv: Vec<Kv>,
    fit: Fit,
    chat_format: &'static str,
    /// Ids of the tokenizer; null without one.
    tokenizer_ids: Option<usize>,
    eos: Vec<Eos>,
    odd: Vec<String>,
}

/// The tensors of one purpose.
#[derive(Debug, Serialize)]
struct Kind {
    kind: &'static str,
    bytes: u64,
    tensors: usize,
}

/// What keys and values of a sequence take.
#[derive(Debug, Serialize)]
struct Kv {
    dtype: &'static str,
    /// Of layers that see the whole sequence.
    bytes_per_token: usize,
    /// Of layers with a sliding window, together, however long the sequence.
    window_bytes: usize,
}

#[derive(Debug, Serialize)]
struct Eos {
    id: TokenId,
    text: Option<String>,
}

/// Prints what is found out about a checkpoint.
///
/// # Errors
/// A checkpoint that cannot be found, read or served.
pub fn run(args: &InspectArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let dir = source::locate(&args.source)?;
    let findings = look(&dir)?;
    if args.json {
        writeln!(out, "{:#}", serde_json::to_value(&findings)?)?;
    } else {
        print(&findings, out)?;
    }
    Ok(())
}

fn look(dir: &Path) -> anyhow::Result<Findings> {
    let checkpoint = Checkpoint::open(dir)?;
    let wants = wants(&checkpoint)?;
    let info = described(&checkpoint, PAGE_SIZE, KvDtype::Bf16)?;
    let chat_format = format_of(info.family);
    let tokenizer = tokenizer(&checkpoint);
    let known = tokenizer.as_ref().ok().and_then(Option::as_ref);
    let stop_ids = known
        .and_then(|tokenizer| open_format(chat_format, tokenizer, Some(dir), None).ok())
        .map(|format| format.stop_ids().to_vec());
    let odd = odd::find(&odd::Looked {
        dir,
        checkpoint: &checkpoint,
        wants: &wants,
        info: &info,
        tokenizer: &tokenizer,
        chat_format,
        stop_ids: stop_ids.as_deref(),
    })?;
    Ok(Findings {
        path: dir.display().to_string(),
        architecture: architecture(checkpoint.config()),
        family: info.family,
        description: info.description.clone(),
        format: checkpoint.format_name(),
        layers: info.layers,
        vocab_size: info.vocab_size,
        context: info.max_context,
        bytes: checkpoint.total_bytes(),
        bytes_by_kind: kinds(&checkpoint, &wants)?,
        kv: [KvDtype::Bf16, KvDtype::Fp8E4m3]
            .into_iter()
            .map(|dtype| Ok(kv(&described(&checkpoint, PAGE_SIZE, dtype)?.kv, dtype)))
            .collect::<anyhow::Result<_>>()?,
        fit: Fit::find(&checkpoint),
        chat_format,
        tokenizer_ids: known.map(|tokenizer| tokenizer.len()),
        eos: info
            .eos
            .iter()
            .map(|&id| Eos { id, text: known.and_then(|tokenizer| tokenizer.token_text(id)) })
            .collect(),
        odd,
    })
}

fn described(checkpoint: &Checkpoint, page_size: usize, kv_dtype: KvDtype) -> anyhow::Result<ModelInfo> {
    Ok(inspect(checkpoint, &LoadOptions { page_size, kv_dtype })?)
}

/// The checkpoint's tokenizer, if it has one and it can be read.
fn tokenizer(checkpoint: &Checkpoint) -> anyhow::Result<Option<Arc<Tokenizer>>> {
    let Some(json) = checkpoint.tokenizer_json()? else { return Ok(None) };
    Ok(Some(Arc::new(Tokenizer::from_bytes(&json)?)))
}

fn architecture(config: &Value) -> String {
    let names = config.get("architectures").and_then(Value::as_array).into_iter().flatten();
    let names: Vec<&str> = names.filter_map(Value::as_str).collect();
    names.join(", ").chars().take(200).collect()
}

/// Bytes by what they are for.
fn kinds(checkpoint: &Checkpoint, wants: &[Want]) -> anyhow::Result<Vec<Kind>> {
    let mut kinds: Vec<Kind> = ["embedding", "attention", "experts or MLP", "head", "norms"]
        .map(|kind| Kind { kind, bytes: 0, tensors: 0 })
        .into();
    for want in wants {
        let at = match want.name.as_str() {
            name if name.contains("norm") => 4,
            name if name.contains("embed") => 0,
            name if name.contains("attn") => 1,
            name if name.starts_with("lm_head") => 3,
            _ => 2,
        };
        if let Some(kind) = kinds.get_mut(at) {
            kind.bytes += checkpoint.stored_bytes(std::slice::from_ref(want))?;
            kind.tensors += 1;
        }
    }
    kinds.retain(|kind| kind.tensors > 0);
    Ok(kinds)
}

fn spelled(dtype: KvDtype) -> &'static str {
    match dtype {
        KvDtype::F32 => "float32",
        KvDtype::Bf16 => "bfloat16",
        KvDtype::Fp8E4m3 => "fp8",
    }
}

fn kv(spec: &KvSpec, dtype: KvDtype) -> Kv {
    let of = |windowed: bool| {
        (0..spec.groups.len()).filter(move |&at| spec.groups[at].window.is_some() == windowed)
    };
    Kv {
        dtype: spelled(dtype),
        bytes_per_token: of(false).map(|group| spec.page_bytes(group) / spec.page_size).sum(),
        window_bytes: of(true)
            .map(|group| spec.pages_for(group, usize::MAX / 2, CHUNK).saturating_mul(spec.page_bytes(group)))
            .sum(),
    }
}

fn size(bytes: u64) -> Bytes {
    Bytes(usize::try_from(bytes).unwrap_or(usize::MAX))
}

fn print(findings: &Findings, out: &mut impl Write) -> std::io::Result<()> {
    let mut line = |key: &str, value: String| writeln!(out, "{key:<14}{value}");
    line("path", findings.path.clone())?;
    line("architecture", format!("{} ({})", findings.architecture, findings.description))?;
    line("format", findings.format.to_owned())?;
    line("size", size(findings.bytes).to_string())?;
    for kind in &findings.bytes_by_kind {
        line("", format!("{:>11}  {} ({} tensors)", size(kind.bytes).to_string(), kind.kind, kind.tensors))?;
    }
    line("context", format!("{} positions", findings.context))?;
    for kv in &findings.kv {
        let window = match kv.window_bytes {
            0 => String::new(),
            bytes => format!(", and {} for all sliding windows of a sequence", Bytes(bytes)),
        };
        line("KV cache", format!("{}: {} a token{window}", kv.dtype, Bytes(kv.bytes_per_token)))?;
    }
    findings.fit.lines().into_iter().try_for_each(|text| line("fits", text))?;
    line("chat format", findings.chat_format.to_owned())?;
    let tokenizer = findings.tokenizer_ids.map_or_else(|| "none".to_owned(), |ids| format!("{ids} ids"));
    line("tokenizer", format!("{tokenizer}, {} logits", findings.vocab_size))?;
    let eos = findings.eos.iter().map(|eos| match &eos.text {
        Some(text) => format!("{} {text}", eos.id),
        None => eos.id.to_string(),
    });
    line("ends turns", eos.collect::<Vec<_>>().join(", "))?;
    if findings.odd.is_empty() {
        line("odd", "nothing".to_owned())?;
    }
    findings.odd.iter().try_for_each(|odd| line("odd", odd.clone()))
}

#[cfg(test)]
mod tests;
