//! The numbered cases of `cases/hermes.jsonl`, with tags as single tokens and spelt out.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests, too")]

#[path = "support/parse.rs"]
mod support;

use ctxserve_chat::hermes::parse::RECOVERIES;
use ctxserve_chat::testing::qwen_tokenizer;
use ctxserve_chat::{End, ParserOptions, end_of};
use serde::Deserialize;

use support::{Answer, format, parse};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    /// The answer, with its control tokens spelt.
    text: String,
    /// Functions on offer; without it, any.
    tools: Option<Vec<String>>,
    /// Whether the prompt left the thinking open.
    #[serde(default)]
    thinking: bool,
    /// Whether the answer was cut; without it, the last token tells.
    cut: Option<bool>,
    expect: Answer,
}

fn cases() -> Vec<Case> {
    let lines = include_str!("cases/hermes.jsonl").lines();
    lines.map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))).collect()
}

/// Ids of the text; `spelt`: tags as the ordinary tokens of their letters.
fn ids(text: &str, spelt: bool) -> Vec<u32> {
    let tokenizer = qwen_tokenizer();
    let ids = tokenizer.encode_with_control(text);
    if !spelt {
        return ids;
    }
    let spell = |id: u32| {
        let text = tokenizer.token_text(id).unwrap();
        let is_tag = tokenizer.is_control(id) && !text.starts_with("<|");
        if is_tag { tokenizer.encode(&text) } else { vec![id] }
    };
    ids.into_iter().flat_map(spell).collect()
}

fn options(case: &Case) -> ParserOptions {
    let tools = case.tools.as_ref().map(|tools| tools.clone().into());
    ParserOptions { calls: true, tools, thinking: case.thinking }
}

#[test]
fn cases_hold() {
    let format = format("hermes", &qwen_tokenizer());
    let mut failures = Vec::new();
    for case in cases() {
        for spelt in [false, true] {
            let ids = ids(&case.text, spelt);
            let end = match case.cut {
                Some(true) => End::Cut,
                Some(false) => End::Stop,
                None => end_of(&ids, format.stop_ids()),
            };
            let (_, got) = parse(format.as_ref(), &ids, end, options(&case));
            if got != case.expect {
                failures
                    .push(format!("{} ({spelt})\n     got {got:?}\n    want {:?}", case.name, case.expect));
            }
        }
    }
    assert!(failures.is_empty(), "{} cases fail:\n{}", failures.len(), failures.join("\n"));
}

/// With `tool_choice: "none"`, or without tools, everything is text as it was written.
#[test]
fn without_calls_tags_are_text() {
    let format = format("hermes", &qwen_tokenizer());
    for case in cases().into_iter().filter(|case| !case.text.contains("think") && !case.thinking) {
        let ids = ids(&case.text, false);
        let text = qwen_tokenizer().decode(&ids, true).replace("<|fim_prefix|>", "");
        for options in [
            ParserOptions { calls: false, ..ParserOptions::default() },
            ParserOptions { tools: Some(Vec::new().into()), ..ParserOptions::default() },
        ] {
            let (_, got) = parse(format.as_ref(), &ids, End::Stop, options);
            assert_eq!(got.content.as_deref(), Some(text.as_str()), "{}", case.name);
            assert!(got.tool_calls.is_empty() && got.reasoning.is_none() && got.finish_reason == "stop");
        }
    }
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
