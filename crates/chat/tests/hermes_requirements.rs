//! The requirements on hermes answers, a test each. What the API makes of them is held by the server's tests.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests, too")]

#[path = "support/parse.rs"]
mod support;

use std::collections::BTreeMap;

use ctxserve_chat::testing::qwen_tokenizer;
use ctxserve_chat::{Delta, End, ParserOptions};
use serde::Deserialize;

use support::{Answer, check_order, format, parse};

/// What the parser makes of a text that was cut or ended, given in these chunks, with these functions on offer.
fn read(chunks: &[&str], tools: &[&str], thinking: bool, end: End) -> (Vec<Delta>, Answer) {
    let tokenizer = qwen_tokenizer();
    let ids: Vec<u32> = chunks.iter().flat_map(|chunk| tokenizer.encode_with_control(chunk)).collect();
    let tools: Vec<String> = tools.iter().map(|&tool| tool.to_owned()).collect();
    let options = ParserOptions { calls: true, tools: Some(tools.into()), thinking };
    let (deltas, answer) = parse(&*format("hermes", &tokenizer), &ids, end, options);
    check_order(&deltas, &answer.finish_reason);
    (deltas, answer)
}

/// A text cut into three: everywhere, and again a little later.
fn thirds(text: &str) -> Vec<[&str; 3]> {
    let cuts: Vec<usize> = (0..=text.len()).filter(|&at| text.is_char_boundary(at)).collect();
    let parts = |cuts: &[usize]| {
        let (first, last) = (cuts[0], cuts[cuts.len() - 1]);
        [&text[..first], &text[first..last], &text[last..]]
    };
    (1..7).flat_map(|apart| cuts.windows(apart)).map(parts).collect()
}

fn calls(answer: &Answer) -> Vec<(&str, &str)> {
    answer.tool_calls.iter().map(|call| (call.name.as_str(), call.arguments.as_str())).collect()
}

/// HER-01: any arguments survive every split, whole and streamed. `hermes_parse_properties` tries many more.
#[test]
fn her_01_arguments_survive_every_split() {
    for arguments in [
        "{}",
        "{\"n\": 1}",
        "{\"on\": false}",
        "{\"a\": {\"b\": {}}}",
        "{\"cmd\": \"mkdir t/{a,b\"}",
        "{\"a\": \"\\\"}\\\\\"}",
        "{\"é二🦀\": \"</tool_call>\"}",
    ] {
        let text = format!("<tool_call>\n{{\"name\": \"f\", \"arguments\": {arguments}}}\n</tool_call>");
        for chunks in thirds(&text) {
            let (deltas, answer) = read(&chunks, &["f"], false, End::Stop);
            assert_eq!(calls(&answer), [("f", arguments)], "{chunks:?}");
            let streamed: String = deltas
                .iter()
                .filter_map(|delta| match delta {
                    Delta::CallArguments { text, .. } => Some(text.as_str()),
                    _ => None,
                })
                .collect();
            assert_eq!(streamed, arguments, "{chunks:?}");
            assert_eq!(answer.finish_reason, "tool_calls");
        }
    }
}

/// HER-02: a name comes once and whole, and only a declared one.
#[test]
fn her_02_names_come_whole_once_they_are_known_to_be_declared() {
    let text = "<tool_call>{\"name\": \"find\", \"arguments\": {}}</tool_call>";
    let tokenizer = qwen_tokenizer();
    for tools in [&["find"][..], &["fi", "finder"]] {
        let names = |deltas: &[Delta]| -> Vec<String> {
            let name = |delta: &Delta| match delta {
                Delta::CallStart { name, .. } => Some(name.clone()),
                _ => None,
            };
            deltas.iter().filter_map(name).collect()
        };
        let declared = tools.contains(&"find");
        let (deltas, answer) = read(&[text], tools, false, End::Stop);
        assert_eq!(names(&deltas), if declared { vec!["find"] } else { vec![] });
        assert_eq!(answer.content.as_deref(), (!declared).then_some(text));
        // Not before the name's quote is there.
        let at = text.find("find").unwrap();
        for cut in at..at + 4 {
            let ids = tokenizer.encode_with_control(&text[..cut]);
            let options = ParserOptions {
                tools: Some(vec!["find".to_owned(), "f".to_owned()].into()),
                ..ParserOptions::default()
            };
            let format = format("hermes", &tokenizer);
            let (mut parser, mut deltas) = (format.parser(options), Vec::new());
            for id in ids {
                parser.push(id, &mut deltas);
            }
            assert!(names(&deltas).is_empty(), "{}", &text[..cut]);
        }
    }
}

/// HER-03: a tag in prose or code is content, and nothing is a call where no tools are declared.
#[test]
fn her_03_tags_in_prose_are_content() {
    let call = "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
    for (text, tools) in [
        ("Write `<tool_call>` before it, `</tool_call>` behind it.", &["f"][..]),
        ("```\n<tool_call>\nname: f\n</tool_call>\n```", &["f"]),
        ("A <tool_call>{\"nam\": 1}</tool_call> B", &["f"]),
        (call, &[]),
    ] {
        let (_, answer) = read(&[text], tools, false, End::Stop);
        assert_eq!((answer.content.as_deref(), answer.finish_reason.as_str()), (Some(text), "stop"));
        assert!(answer.tool_calls.is_empty());
    }
    assert_eq!(calls(&read(&[call], &["f"], false, End::Stop).1), [("f", "{}")]);
}

/// HER-04: a call in thinking that never ends is a call.
#[test]
fn her_04_calls_in_unclosed_thinking_count() {
    let call = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>";
    for (text, thinking) in
        [(format!("<think>\nI need it.\n{call}"), false), (format!("I need it.\n{call}"), true)]
    {
        let (_, answer) = read(&[&text], &["f"], thinking, End::Stop);
        assert_eq!(calls(&answer), [("f", "{\"a\": 1}")]);
        assert_eq!(answer.finish_reason, "tool_calls");
        assert_eq!(answer.reasoning.unwrap().trim(), "I need it.");
    }
}

/// HER-05: where an answer begins is told by the prompt's end, with tools and without.
#[test]
fn her_05_thinking_begins_where_the_prompt_ends() {
    let tokenizer = qwen_tokenizer();
    let format = format("hermes", &tokenizer);
    let call = "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
    for (prompt, text, reasoning, content) in [
        // Instruct models, and thinking turned off.
        ("<|im_start|>assistant\n", "Yes.", None, Some("Yes.")),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "Yes.", None, Some("Yes.")),
        // Thinking turned on, where the model opens it; and the 2507 models, whose template does.
        ("<|im_start|>assistant\n", "<think>\nHm.\n</think>\n\nYes.", Some("Hm."), Some("Yes.")),
        ("<|im_start|>assistant\n<think>\n", "Hm.\n</think>\n\nYes.", Some("Hm."), Some("Yes.")),
    ] {
        let thinking = format.leaves_thinking_open(&tokenizer.encode_with_control(prompt));
        for with_call in [false, true] {
            let text = format!("{text}{}", if with_call { call } else { "" });
            let (_, answer) = read(&[&text], &["f"], thinking, End::Stop);
            let found = (answer.reasoning.as_deref(), answer.content.as_deref());
            assert_eq!(found, (reasoning, content), "{prompt:?} {text:?}");
            assert_eq!(answer.tool_calls.len(), usize::from(with_call));
        }
    }
}

/// HER-06: arguments are the model's bytes.
#[test]
fn her_06_arguments_are_forwarded_byte_for_byte() {
    for arguments in [
        "{\"a\":1,  \"a\" : 1.0, \"u\": \"\\u00e9é\\/\"}",
        "{ \"n\": 123456789012345678901234567890, \"e\": 1E400 }",
        "[1,\n 2]",
        "__import__('os').system('id')",
    ] {
        let text = format!("<tool_call>{{\"name\": \"f\", \"arguments\": {arguments}}}</tool_call>");
        let (_, answer) = read(&[&text], &["f"], false, End::Stop);
        // What is no JSON, and cannot be made any, is a string of it.
        let quoted = serde_json::to_string(arguments).unwrap();
        let found = calls(&answer);
        assert!(found == [("f", arguments)] || found == [("f", quoted.as_str())], "{found:?}");
    }
}

/// HER-07: wherever an answer is cut, no tag shows and the words before it are there.
#[test]
fn her_07_a_cut_call_shows_no_tag() {
    let before = "Let me look.";
    let text =
        format!("{before}\n<tool_call>\n{{\"name\": \"f\", \"arguments\": {{\"a\": \"b\"}}}}\n</tool_call>");
    for cut in before.len()..text.len() {
        let (_, answer) = read(&[&text[..cut]], &["f"], false, End::Cut);
        let content = answer.content.unwrap();
        // Half a tag may be anything yet.
        let shown = content.split('<').next().unwrap();
        assert_eq!(shown.trim_end(), before, "{cut}");
        assert!(!content.contains("tool_call>") && !content.contains('{'), "{cut}: {content}");
    }
}

/// HER-08: what was held back as a tag comes as soon as it is none, and at the end.
#[test]
fn her_08_held_text_is_released() {
    let tokenizer = qwen_tokenizer();
    let format = format("hermes", &tokenizer);
    for held in ["<", "</", "<tool_", "</tool_call", "<think"] {
        let (_, answer) = read(&["a ", held], &["f"], false, End::Stop);
        assert_eq!(answer.content.unwrap(), format!("a {held}"));
        let mut parser = format.parser(ParserOptions::default());
        let mut deltas = Vec::new();
        for id in tokenizer.encode(&format!("a {held}")).into_iter().chain(tokenizer.encode("!")) {
            parser.push(id, &mut deltas);
        }
        let text = |delta: &Delta| match delta {
            Delta::Content(text) => text.clone(),
            other => panic!("{other:?}"),
        };
        assert_eq!(deltas.iter().map(text).collect::<String>(), format!("a {held}!"));
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fixtures {
    #[serde(rename = "about")]
    _about: String,
    cases: BTreeMap<String, Fixture>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fixture {
    #[serde(rename = "description")]
    _description: String,
    chunks: Vec<String>,
    tools: Vec<String>,
    #[serde(default)]
    cut: bool,
    calls: Vec<(String, String)>,
    normal_text: Option<String>,
    finish: Option<String>,
    /// How others answer, and why not so here.
    differs: Option<String>,
}

/// HER-09: the categories of the public conformance fixtures, with each deviation stated beside its case.
#[test]
fn her_09_the_shapes_of_the_conformance_fixtures() {
    let fixtures: Fixtures = serde_json::from_str(include_str!("cases/hermes_fixtures.json")).unwrap();
    let (mut failures, mut deviations) = (Vec::new(), 0);
    for (name, case) in &fixtures.cases {
        let tools: Vec<&str> = case.tools.iter().map(String::as_str).collect();
        let chunks: Vec<&str> = case.chunks.iter().map(String::as_str).collect();
        let end = if case.cut { End::Cut } else { End::Stop };
        let whole = chunks.concat();
        let wanted: Vec<(&str, &str)> =
            case.calls.iter().map(|(name, arguments)| (name.as_str(), arguments.as_str())).collect();
        let finish = if wanted.is_empty() { "stop" } else { "tool_calls" };
        let finish = case.finish.as_deref().unwrap_or(finish);
        deviations += usize::from(case.differs.is_some());
        for chunks in [&chunks[..], &[whole.as_str()]] {
            let (_, answer) = read(chunks, &tools, false, end);
            let found = (calls(&answer), answer.content.as_deref(), answer.finish_reason.as_str());
            if found != (wanted.clone(), case.normal_text.as_deref(), finish) {
                failures.push(format!("{name} in {} chunks: {found:?}", chunks.len()));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(fixtures.cases.len() > 25 && deviations > 5);
}
