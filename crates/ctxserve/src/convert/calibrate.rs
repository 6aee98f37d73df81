//! What the inputs of products reach on a text: the model reads it on the CPU.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use ctxserve_backend::{Backend, Batch, KvPlan, PageId, PageTable, SampleRow, SequenceSlice};
use ctxserve_chat::Tokenizer;
use ctxserve_checkpoint::{Checkpoint, Want};
use ctxserve_core::{SamplingParams, TokenId};
use ctxserve_models::{LoadOptions, inspect, load};

use crate::device::{Product, observer};

/// Tokens of a sequence: what is usual for calibration.
const SEQUENCE: usize = 1024;
/// Bytes that are read for a token; texts have four or five.
const BYTES_PER_TOKEN: usize = 16;

/// The beginning of a text, as sequences of at most 1,024 tokens, none longer than `context`.
///
/// # Errors
/// A file that cannot be read, is not UTF-8 or has no text.
pub(super) fn sequences(
    tokenizer: &Tokenizer,
    file: &Path,
    tokens: usize,
    context: usize,
) -> anyhow::Result<Vec<Vec<TokenId>>> {
    let name = file.display();
    let limit = tokens.saturating_mul(BYTES_PER_TOKEN);
    let mut bytes = Vec::new();
    let opened = File::open(file).with_context(|| name.to_string())?;
    opened.take(limit as u64).read_to_end(&mut bytes).with_context(|| name.to_string())?;
    let text = match std::str::from_utf8(&bytes) {
        Ok(text) => text,
        // Where it was cut a character may be, too.
        Err(error) if error.error_len().is_none() && bytes.len() == limit => {
            std::str::from_utf8(bytes.get(..error.valid_up_to()).unwrap_or_default())?
        }
        Err(error) => bail!("{name} is not UTF-8 from byte {} on", error.valid_up_to()),
    };
    let mut ids = tokenizer.encode(text);
    ids.truncate(tokens);
    if ids.is_empty() {
        bail!("{name} has no text");
    }
    Ok(ids.chunks(SEQUENCE.min(context).max(1)).map(<[TokenId]>::to_vec).collect())
}

/// The largest magnitude of the inputs of each projection, by module, over these sequences. `progress` is told how many
/// were read.
///
/// # Errors
/// A model that does not load, an id that it does not have, inputs that are not finite.
pub(super) fn inputs(
    checkpoint: &Checkpoint,
    wants: &[Want],
    sequences: &[Vec<TokenId>],
    mut progress: impl FnMut(usize),
) -> anyhow::Result<BTreeMap<String, f32>> {
    let (mut backend, peaks) = observer()?;
    let options = LoadOptions::default();
    let spec = inspect(checkpoint, &options)?.kv;
    let model = load(checkpoint, &mut backend, &options, &mut |_| ())?;
    let longest = sequences.iter().map(Vec::len).max().unwrap_or(0);
    let pages = longest.div_ceil(spec.page_size);
    let table = PageTable { first: 0, pages: (0..PageId::try_from(pages)?).collect() };
    let tables = Arc::new(vec![table; spec.groups.len()]);
    let mut kv = backend.allocate_kv(&KvPlan { pages: vec![pages; spec.groups.len()], spec })?;
    let greedy = Arc::new(SamplingParams::greedy());
    for (done, tokens) in sequences.iter().enumerate() {
        progress(done);
        let rows = 0..tokens.len();
        let (key, tables) = (done as u64, Arc::clone(&tables));
        // Without logits the last layer would be left out.
        let sample = Some(SampleRow::new(Arc::clone(&greedy)));
        let slice = SequenceSlice { key, rows, start: 0, feed: None, tables, sample };
        let batch = Batch { tokens: tokens.clone(), sequences: vec![slice] };
        model.forward(&mut backend, &mut kv, &batch)?;
    }
    let mut inputs = BTreeMap::new();
    for (product, modules) in products(wants) {
        let mut found = peaks.all().into_iter().filter(|(of, _)| *of == product).map(|(_, peak)| peak);
        for modules in modules {
            let peak = found.next().with_context(|| format!("{} was never computed", modules.join(", ")))?;
            inputs.extend(modules.into_iter().map(|module| (module, peak)));
        }
    }
    if let Some((module, peak)) = inputs.iter().find(|(_, peak)| !peak.is_finite()) {
        bail!("{module}: inputs reach {peak}");
    }
    Ok(inputs)
}

/// The modules of each product, in the order of the layers: the order in which a backend is given their matrices.
fn products(wants: &[Want]) -> Vec<(Product, Vec<Vec<String>>)> {
    let leaves: [(Product, &[&str]); 4] = [
        (Product::Qkv, &["q_proj", "k_proj", "v_proj"]),
        (Product::Output, &["o_proj"]),
        (Product::GateUp, &["gate_proj", "up_proj"]),
        (Product::Down, &["down_proj"]),
    ];
    let modules = || wants.iter().filter_map(|want| want.name.strip_suffix(".weight")?.rsplit_once('.'));
    let of = |leaves: &[&str]| {
        let mut found: Vec<(&str, Vec<String>)> = Vec::new();
        for (layer, leaf) in modules().filter(|(_, leaf)| leaves.contains(leaf)) {
            let module = format!("{layer}.{leaf}");
            match found.last_mut() {
                Some((last, modules)) if *last == layer => modules.push(module),
                _ => found.push((layer, vec![module])),
            }
        }
        found.into_iter().map(|(_, modules)| modules).collect()
    };
    leaves.map(|(product, leaves)| (product, of(leaves))).into()
}

#[cfg(test)]
mod tests {
    use ctxserve_models::wants;
    use serde_json::Value;

    use super::*;
    use crate::convert::tests::golden;

    /// The prompts of a golden, and the inputs that transformers computed of them.
    fn expected(name: &str) -> (Vec<Vec<TokenId>>, BTreeMap<String, f32>) {
        let json = |file: &str| -> Value {
            serde_json::from_slice(&std::fs::read(golden(name).join(file)).unwrap()).unwrap()
        };
        let cases = json("expected.json")["cases"].as_array().unwrap().clone();
        let prompt = |case: Value| serde_json::from_value(case["prompt"].clone()).unwrap();
        (cases.into_iter().map(prompt).collect(), serde_json::from_value(json("inputs.json")).unwrap())
    }

    #[test]
    fn inputs_reach_what_they_reach_in_transformers() {
        for name in ["qwen3", "qwen3_served"] {
            let (prompts, expected) = expected(name);
            let checkpoint = Checkpoint::open(&golden(name)).unwrap();
            let wants = wants(&checkpoint).unwrap();
            let mut seen = Vec::new();
            let found = inputs(&checkpoint, &wants, &prompts, |done| seen.push(done)).unwrap();
            assert!(seen.into_iter().eq(0..prompts.len()));
            assert!(found.keys().eq(expected.keys()), "{name}: {found:?}");
            for (module, &wanted) in &expected {
                let found = found[module];
                assert!((found - wanted).abs() < 1e-4 * wanted, "{name}, {module}: {found} for {wanted}");
            }
            // Each sequence counts: the largest of all is in no single one.
            let first = inputs(&checkpoint, &wants, &prompts[..1], |_| ()).unwrap();
            assert!(first.iter().all(|(module, peak)| *peak <= found[module]) && first != found, "{name}");
        }
    }

    #[test]
    fn ids_that_a_model_lacks_are_an_error() {
        let checkpoint = Checkpoint::open(&golden("qwen3")).unwrap();
        let wants = wants(&checkpoint).unwrap();
        assert!(inputs(&checkpoint, &wants, &[vec![1, 512]], |_| ()).is_err());
    }

    #[test]
    fn texts_are_cut_into_sequences() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("text");
        let tokenizer = Tokenizer::from_bytes(ctxserve_chat::demo_tokenizer_json()).unwrap();
        let cut = |bytes: &[u8], tokens, context| {
            std::fs::write(&file, bytes).unwrap();
            sequences(&tokenizer, &file, tokens, context).map_err(|error| error.to_string())
        };
        let text = "The quick brown fox jumps over the lazy dog. <|call|> ".repeat(400);
        let ids = tokenizer.encode(&text);
        assert!(ids.len() > 2 * SEQUENCE && !ids.iter().any(|&id| tokenizer.is_control(id)));
        let all = cut(text.as_bytes(), usize::MAX, usize::MAX).unwrap();
        assert_eq!((all.concat(), all[0].len()), (ids.clone(), SEQUENCE));
        let some = cut(text.as_bytes(), 100, 64).unwrap();
        assert_eq!((some.len(), some.concat().as_slice()), (2, &ids[..100]));
        // Two bytes a character, and a limit that falls into one.
        assert_eq!(cut("xé".repeat(30).as_bytes(), 1, 9).unwrap().concat().len(), 1);
        assert!(cut(b"ab\xff", 100, 9).unwrap_err().contains("not UTF-8 from byte 2"));
        assert!(cut(b"ab\xc3", 100, 9).unwrap_err().contains("not UTF-8"));
        assert!(cut(b"", 100, 9).unwrap_err().contains("no text"));
        assert!(sequences(&tokenizer, Path::new("/no/such"), 1, 1).is_err());
    }
}
