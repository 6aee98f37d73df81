//! The numbered cases of `cases/harmony.jsonl`, with the demo vocabulary and with gpt-oss's.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests, too")]

#[path = "support/parse.rs"]
mod support;

use std::sync::Arc;

use ctxserve_chat::harmony::parse::RECOVERIES;
use ctxserve_chat::testing::{demo_tokenizer, o200k_tokenizer};
use ctxserve_chat::{End, ParserOptions, Segment, Tokenizer, end_of, segments_to_ids};
use serde::Deserialize;

use support::{Answer, format, parse};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    segments: Vec<Segment>,
    /// Whether the answer was cut; without it, the last token tells.
    cut: Option<bool>,
    expect: Answer,
}

fn cases() -> Vec<Case> {
    let lines = include_str!("cases/harmony.jsonl").lines();
    lines.map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

fn run(tokenizer: &Arc<Tokenizer>) {
    let format = format("harmony", tokenizer);
    let mut failures = Vec::new();
    for case in cases() {
        let ids = segments_to_ids(tokenizer, &case.segments).unwrap();
        let end = match case.cut {
            Some(true) => End::Cut,
            Some(false) => End::Stop,
            None => end_of(&ids, format.stop_ids()),
        };
        let (_, got) = parse(format.as_ref(), &ids, end, ParserOptions::default());
        if got != case.expect {
            failures.push(format!("{}\n     got {got:?}\n    want {:?}", case.name, case.expect));
        }
    }
    assert!(failures.is_empty(), "{} cases fail:\n{}", failures.len(), failures.join("\n"));
}

/// HAR-02, HAR-04, HAR-09, HAR-10: the numbered cases.
#[test]
fn cases_hold_with_the_demo_vocabulary() {
    run(&demo_tokenizer());
}

/// HAR-02, HAR-04: the same with the tokens that gpt-oss has.
#[test]
fn cases_hold_with_the_vocabulary_of_gpt_oss() {
    run(&o200k_tokenizer());
}

#[test]
fn cases_have_names_of_their_own_and_known_recoveries() {
    let cases = cases();
    assert!(cases.len() >= 120);
    let mut names: Vec<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), cases.len());
    let used: Vec<&String> = cases.iter().flat_map(|case| &case.expect.recovery).collect();
    for name in &used {
        assert!(RECOVERIES.iter().any(|(known, _)| known == name), "{name}");
    }
    for (name, meaning) in RECOVERIES {
        assert!(used.iter().any(|used| used == name), "no case shows {name}: {meaning}");
    }
}
