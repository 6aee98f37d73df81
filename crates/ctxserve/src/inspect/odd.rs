//! What is odd about a checkpoint: nothing that keeps it from being served.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use ctxserve_chat::Tokenizer;
use ctxserve_checkpoint::{Checkpoint, Shape, Want};
use ctxserve_core::{Elements, TokenId};
use ctxserve_models::ModelInfo;
use serde_json::Value;

/// Names that are listed before the rest is counted.
const SHOWN: usize = 3;

/// Files that other programs read and this one never does.
const UNREAD: &[&str] = &[".py", ".bin", ".pt", ".pth", ".pkl", ".gguf", ".onnx"];

/// `<|return|>` and `<|call|>` of gpt-oss.
const GPT_OSS_RETURN: TokenId = 200_002;
const GPT_OSS_CALL: TokenId = 200_012;

/// What was found out so far.
pub(super) struct Looked<'a> {
    pub(super) dir: &'a Path,
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) wants: &'a [Want],
    pub(super) info: &'a ModelInfo,
    pub(super) tokenizer: &'a anyhow::Result<Option<Arc<Tokenizer>>>,
    pub(super) chat_format: &'a str,
    /// Where the chat format ends turns; `None` where it does not go with the tokenizer.
    pub(super) stop_ids: Option<&'a [TokenId]>,
}

/// Everything odd, one sentence each.
pub(super) fn find(looked: &Looked<'_>) -> anyhow::Result<Vec<String>> {
    let mut odd = Vec::new();
    tokenizer(looked, &mut odd);
    ends(looked, &mut odd);
    files(looked, &mut odd);
    factors(looked, &mut odd)?;
    Ok(odd)
}

/// The first of a list, and how many more there are.
fn listed(items: &[String]) -> String {
    let shown = items.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    match items.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

fn tokenizer(looked: &Looked<'_>, odd: &mut Vec<String>) {
    let tokenizer = match looked.tokenizer {
        Ok(Some(tokenizer)) => tokenizer,
        Ok(None) => return odd.push("there is no tokenizer.json: --tokenizer must name one".to_owned()),
        Err(error) => return odd.push(format!("tokenizer.json cannot be read: {error:#}")),
    };
    let (ids, logits) = (tokenizer.len(), looked.info.vocab_size);
    if ids > logits {
        odd.push(format!("the tokenizer has {ids} ids and the model only {logits} logits"));
    }
    let gap = |&id: &TokenId| tokenizer.token_bytes(id).is_none();
    let gaps: Vec<TokenId> = (0..TokenId::try_from(ids).unwrap_or(TokenId::MAX)).filter(gap).collect();
    if let (Some(first), Some(last)) = (gaps.first(), gaps.last()) {
        odd.push(format!(
            "the tokenizer has no token for {} of its {ids} ids, {first} to {last}",
            gaps.len()
        ));
    }
    if looked.stop_ids.is_none() {
        odd.push(format!("the tokenizer lacks control tokens of {}", looked.chat_format));
    }
}

/// Where turns end: as the chat format has it, or, without a tokenizer, the ids of gpt-oss, which are the same in all of its
/// checkpoints.
pub(super) fn ends_of<'a>(stop_ids: Option<&'a [TokenId]>, family: &str, vocab: usize) -> &'a [TokenId] {
    stop_ids.unwrap_or(match family {
        "gpt_oss" if vocab > GPT_OSS_CALL as usize => &[GPT_OSS_RETURN, GPT_OSS_CALL],
        _ => &[],
    })
}

/// Ends of turns that the files should name, or name in vain.
fn ends(looked: &Looked<'_>, odd: &mut Vec<String>) {
    let text = |id: TokenId| {
        let tokenizer = looked.tokenizer.as_ref().ok().and_then(Option::as_ref);
        tokenizer.and_then(|tokenizer| tokenizer.token_text(id))
    };
    let named = ends_of(looked.stop_ids, looked.info.family, looked.info.vocab_size);
    let missing = named.iter().filter(|id| !looked.info.eos.contains(id));
    let missing = missing.map(|&id| match text(id) {
        Some(text) => format!("{id} {text}"),
        None => id.to_string(),
    });
    let missing: Vec<String> = missing.collect();
    if !missing.is_empty() {
        let named = listed(&missing);
        odd.push(format!("eos_token_id does not name {named}: this server ends turns there, others may not"));
    }
    for (file, value) in [
        ("config.json", Some(looked.checkpoint.config())),
        ("generation_config.json", looked.checkpoint.generation_config()),
    ] {
        let Some(value) = value else {
            odd.push(format!("there is no {file}"));
            continue;
        };
        let ids = match value.get("eos_token_id") {
            Some(Value::Array(list)) => list.as_slice(),
            Some(one) => std::slice::from_ref(one),
            None => &[],
        };
        let outside = ids.iter().filter_map(Value::as_u64).filter(|&id| id >= looked.info.vocab_size as u64);
        let outside: Vec<String> = outside.map(|id| id.to_string()).collect();
        if !outside.is_empty() {
            let (ids, logits) = (listed(&outside), looked.info.vocab_size);
            odd.push(format!("{file} ends turns at {ids}, and there are {logits} logits"));
        }
    }
}

fn files(looked: &Looked<'_>, odd: &mut Vec<String>) {
    let there = |name: &str| looked.dir.join(name).is_file();
    let inside = || {
        let text = std::fs::read_to_string(looked.dir.join("tokenizer_config.json")).ok()?;
        serde_json::from_str::<Value>(&text).ok()?.get("chat_template").cloned()
    };
    if !there("chat_template.jinja") && !there("chat_template.json") && inside().is_none_or(|it| it.is_null())
    {
        odd.push(format!("there is no chat template; prompts are {}", looked.chat_format));
    }
    if looked.checkpoint.config().get("auto_map").is_some_and(|map| !map.is_null()) {
        odd.push("config.json names code in auto_map, which is never run".to_owned());
    }
    let Ok(entries) = std::fs::read_dir(looked.dir) else { return };
    let mut unread: Vec<String> = entries
        .flatten()
        .take(10_000)
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| UNREAD.iter().any(|ending| name.ends_with(ending)))
        .collect();
    unread.sort();
    if !unread.is_empty() {
        odd.push(format!("{} are there and not read", listed(&unread)));
    }
}

/// NVFP4 factors: those of one product should be equal, those of inputs measured.
fn factors(looked: &Looked<'_>, odd: &mut Vec<String>) -> anyhow::Result<()> {
    let mut products: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    let (mut absent, mut ones, mut count) = (0, 0, 0);
    for want in looked.wants {
        let Shape::Matrix { rows, .. } = want.shape else { continue };
        let matrix = looked.checkpoint.rows(want, 0..rows.min(1))?;
        let Elements::Nvfp4 { runs, .. } = matrix.elements() else { continue };
        for run in runs {
            count += 1;
            absent += usize::from(run.input.is_none());
            ones += usize::from(run.input == Some(1.0));
            products.entry(product(&want.name)).or_default().push(run.weight);
        }
    }
    let differ = |factors: &Vec<f32>| factors.iter().any(|factor| Some(factor) != factors.first());
    let unequal: Vec<String> =
        products.into_iter().filter(|(_, factors)| differ(factors)).map(|(name, _)| name).collect();
    if !unequal.is_empty() {
        odd.push(format!(
            "projections that are computed together have factors of their own: {}",
            listed(&unequal)
        ));
    }
    if count > 0 && absent == count {
        odd.push("inputs have no factors: only weights were quantised".to_owned());
    } else if count > 0 && ones == count {
        odd.push("every input_scale is 1: inputs were not calibrated".to_owned());
    } else if absent > 0 {
        odd.push(format!("{absent} of {count} quantised matrices have no factor for their inputs"));
    }
    Ok(())
}

/// What servers compute in one product.
fn product(name: &str) -> String {
    let module = name.strip_suffix(".weight").unwrap_or(name);
    match module.rsplit_once('.') {
        Some((layer, "q_proj" | "k_proj" | "v_proj")) => format!("{layer}.{{q,k,v}}_proj"),
        Some((layer, "gate_proj" | "up_proj")) => format!("{layer}.{{gate,up}}_proj"),
        _ => module.to_owned(),
    }
}
