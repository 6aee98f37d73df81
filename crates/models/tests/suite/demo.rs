//! The demo model: random, the same everywhere, and pleasant enough to serve.

use ctxserve_checkpoint::Checkpoint;
use ctxserve_core::TokenId;
use ctxserve_cpu::CpuBackend;
use ctxserve_models::demo::{DemoSpec, checkpoint};
use ctxserve_models::{LoadOptions, inspect};

use crate::common::{Driver, Random, Sequence, argmax, relative_l2};

const EOS: TokenId = 900;

fn spec(seed: u64) -> DemoSpec {
    DemoSpec {
        seed,
        vocab_size: 1000,
        eos: vec![EOS, 901],
        avoids: (902..916).chain([17]).collect(),
        follows: vec![(40, 910), (910, 41), (41, 42), (42, 911)],
    }
}

fn embedding(checkpoint: &Checkpoint) -> ctxserve_core::Matrix {
    checkpoint.matrix("model.embed_tokens.weight", 1000, 128).unwrap()
}

/// Logits after each of some random prompts that end in `last`.
fn logits_after(last: TokenId, prompts: usize) -> Vec<Vec<f32>> {
    let mut driver = Driver::new(&checkpoint(&spec(1)).unwrap(), CpuBackend::plain(), 50);
    let mut random = Random(3);
    let mut logits = Vec::new();
    for _ in 0..prompts {
        let mut ids = random.ids(30, 900);
        ids.push(last);
        let mut sequence = Sequence::default();
        logits.extend(driver.step(&mut [(&mut sequence, &ids, true)]));
        driver.finish(sequence);
    }
    logits
}

fn probability(logits: &[f32], id: TokenId) -> f64 {
    let weight = |logit: f32| f64::from(logit).exp();
    weight(logits[id as usize]) / logits.iter().map(|&logit| weight(logit)).sum::<f64>()
}

#[test]
fn a_seed_fixes_the_weights() {
    let [a, b, c] = [1, 1, 2].map(|seed| embedding(&checkpoint(&spec(seed)).unwrap()));
    assert_eq!(a, b);
    assert_ne!(a, c);
}

#[test]
fn it_is_a_gpt_oss_of_its_tokenizer() {
    let info = inspect(&checkpoint(&spec(1)).unwrap(), &LoadOptions::default()).unwrap();
    assert_eq!((info.family, info.vocab_size, info.layers), ("gpt_oss", 1000, 2));
    assert_eq!(info.eos, [EOS, 901]);
    assert_eq!(info.kv.groups.len(), 2);
    assert!(info.weight_bytes < 2_000_000, "{}", info.weight_bytes);
}

#[test]
fn ids_outside_the_vocabulary_are_ignored() {
    let odd =
        DemoSpec { eos: vec![5000], avoids: vec![5000], follows: vec![(1, 5000), (5000, 1)], ..spec(1) };
    let info = inspect(&checkpoint(&odd).unwrap(), &LoadOptions::default()).unwrap();
    assert_eq!(info.eos, [] as [TokenId; 0]);
}

#[test]
fn it_ends_its_turn_now_and_then() {
    let logits = logits_after(500, 64);
    let mean = logits.iter().map(|row| probability(row, EOS)).sum::<f64>() / 64.0;
    assert!((1.0 / 128.0..1.0 / 32.0).contains(&mean), "one turn in {}", 1.0 / mean);
}

#[test]
fn it_avoids_what_it_should_and_says_a_variety() {
    let logits: Vec<_> = (500..564).flat_map(|last| logits_after(last, 1)).collect();
    for row in &logits {
        let avoided: f64 = spec(1).avoids.iter().map(|&id| probability(row, id)).sum();
        assert!(avoided < 1e-4, "{avoided}");
    }
    let best: std::collections::BTreeSet<TokenId> = logits.iter().map(|row| argmax(row)).collect();
    assert!(best.len() > 20, "{best:?}");
}

#[test]
fn what_came_before_matters() {
    let logits = logits_after(500, 16);
    for pair in logits.windows(2) {
        assert!(relative_l2(&pair[0], &pair[1]) > 0.1, "{}", relative_l2(&pair[0], &pair[1]));
    }
}

#[test]
fn it_follows_where_it_is_told_to() {
    for (before, after) in spec(1).follows {
        for row in logits_after(before, 16) {
            let follows = probability(&row, after);
            assert!(follows > 0.98, "{after} after {before}: {follows}");
        }
    }
}
