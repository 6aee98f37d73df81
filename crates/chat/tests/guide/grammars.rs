//! Grammars alone: every kind, followed by random choices.

use ctxserve_chat::guide::{Fault, Grammar, Guides};
use ctxserve_chat::testing::{demo_tokenizer, o200k_tokenizer};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::common::{Bench, Random, object, validate};

/// Text of a random answer under a grammar, ended by `<|return|>`.
fn text(bench: &Bench, grammar: &Grammar, random: &mut Random) -> Option<String> {
    let end = bench.tokenizer.special_id("<|return|>").unwrap();
    let mut guide = bench.guides.plain(grammar, &[end]).unwrap();
    let ids = bench.play(&mut *guide, random, 4000)?;
    assert!(guide.is_settled());
    Some(bench.tokenizer.decode(&ids[..ids.len() - 1], false))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Random schemas and random choices end in JSON that is valid for the schema.
    #[test]
    fn json_is_valid_for_its_schema(seed: u64) {
        let mut random = Random(seed);
        let bench = Bench::new("harmony");
        let schema = object(&mut random, 3);
        let grammar = Grammar::Json { schema: schema.clone(), strict: true };
        let Some(text) = text(&bench, &grammar, &mut random) else { return Ok(()) };
        let value: Value = serde_json::from_str(&text).expect(&text);
        prop_assert_eq!(validate(&value, &schema), Ok(()));
    }

    /// OPS-18: never more than eight white-space characters between two tokens of JSON, nor before or behind it.
    #[test]
    fn white_space_is_bounded(seed: u64) {
        let mut random = Random(seed);
        let bench = Bench::new("harmony");
        let schema = json!({"type": "array", "items": {"enum": ["x", 1, true]}, "maxItems": 4});
        let end = bench.tokenizer.special_id("<|return|>").unwrap();
        let mut guide = bench.guides.plain(&Grammar::Json { schema, strict: true }, &[end]).unwrap();
        let blank = |id: &u32| bench.tokenizer.token_bytes(*id).is_some_and(|text| text.trim_ascii().is_empty());
        let (mut run, mut longest) = (0, 0);
        for _ in 0..200 {
            let allowed = guide.allowed().unwrap();
            // Blanks as long as there are any.
            let ctxserve_core::Allowed::Only(mask) = &allowed else { break };
            let blanks: Vec<_> = mask.ids().filter(blank).collect();
            let id = if blanks.is_empty() { bench.pick(&allowed, &mut random) } else { *random.of(&blanks) };
            if id == end {
                break;
            }
            let bytes = bench.tokenizer.token_bytes(id).unwrap();
            let lead = bytes.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            longest = longest.max(run + lead);
            let tail = bytes.iter().rev().take_while(|byte| byte.is_ascii_whitespace()).count();
            run = if lead == bytes.len() { run + lead } else { tail };
            guide.accept(id).unwrap();
        }
        prop_assert!(longest <= 8, "{} blanks", longest);
    }
}

#[test]
fn every_kind_of_grammar() {
    let bench = Bench::new("harmony");
    let mut random = Random(1);
    for _ in 0..20 {
        let choice = Grammar::Choice(vec!["yes".into(), "no \"never\"\n".into(), "yesterday".into()]);
        let found = text(&bench, &choice, &mut random).unwrap();
        assert!(["yes", "no \"never\"\n", "yesterday"].contains(&found.as_str()), "{found:?}");
        let found = text(&bench, &Grammar::Regex(r"[0-9]{3}-[a-z]+@(x|y)\.com".into()), &mut random);
        if let Some(found) = found {
            assert!(found.ends_with(".com") && found.as_bytes()[3] == b'-', "{found:?}");
        }
        let lark = Grammar::Lark("start: \"(\" start \")\" | \"x\"".into());
        let found = text(&bench, &lark, &mut random).unwrap();
        let depth = found.len() / 2;
        assert_eq!(found, format!("{}x{}", "(".repeat(depth), ")".repeat(depth)));
        if let Some(found) = text(&bench, &Grammar::json_object(), &mut random) {
            // Numbers may be too large for any type: only the syntax counts.
            let syntax = serde_json::from_str::<serde::de::IgnoredAny>(&found);
            assert!(syntax.is_ok() && found.trim_start().starts_with('{'), "{found}");
        }
    }
}

/// Compiled grammars are kept for the next request, and only so many of them.
#[test]
fn grammars_are_kept_within_bounds() {
    let guides = Guides::new(demo_tokenizer());
    for i in 0..200 {
        guides.plain(&Grammar::Choice(vec![format!("{i}")]), &[0]).unwrap();
        guides.plain(&Grammar::json_object(), &[0]).unwrap();
    }
    assert!(guides.kept() <= 64, "{}", guides.kept());
}

/// A keyword that cannot be enforced is refused where the schema must hold, and left out where it need not.
#[test]
fn keywords_that_cannot_be_enforced() {
    let guides = Guides::new(demo_tokenizer());
    let schema = json!({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": true}}});
    let error = guides.plain(&Grammar::Json { schema: schema.clone(), strict: true }, &[0]).unwrap_err();
    assert!(error.fault == Fault::Content && error.what.contains("uniqueItems"), "{error}");
    guides.plain(&Grammar::Json { schema, strict: false }, &[0]).unwrap();
}

/// The vocabulary of gpt-oss: built once, masks in well under a millisecond. Printed, not judged.
#[test]
fn times_on_o200k() {
    let guides = Guides::new(o200k_tokenizer());
    let start = std::time::Instant::now();
    assert!(guides.warm_up());
    println!("vocabulary: {:?}", start.elapsed());
    let schema = json!({"type": "object", "properties": {"city": {"type": "string"}, "n": {"type": "integer"}}, "required": ["city", "n"], "additionalProperties": false});
    let grammar = Grammar::Json { schema, strict: true };
    for what in ["compile", "again"] {
        let start = std::time::Instant::now();
        guides.plain(&grammar, &[0]).unwrap();
        println!("{what}: {:?}", start.elapsed());
    }
    let mut guide = guides.plain(&grammar, &[200_002]).unwrap();
    let (mut worst, mut total) = (std::time::Duration::ZERO, std::time::Duration::ZERO);
    let ids = o200k_tokenizer().encode("{\"city\": \"Zürich, on the lake\", \"n\": 123}");
    for &id in &ids {
        let start = std::time::Instant::now();
        assert!(guide.allowed().unwrap().allows(id));
        guide.accept(id).unwrap();
        let took = start.elapsed();
        (worst, total) = (worst.max(took), total + took);
    }
    println!("{} masks: mean {:?}, worst {worst:?}", ids.len(), total / ids.len() as u32);
    assert!(guide.allowed().unwrap().allows(200_002));
}
