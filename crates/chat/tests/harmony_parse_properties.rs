//! What holds of every token sequence.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests, too")]

#[path = "support/parse.rs"]
mod support;

use std::sync::Arc;

use ctxserve_chat::testing::demo_tokenizer;
use ctxserve_chat::{
    Collector, Delta, End, ParserOptions, Place, Segment, Tokenizer, end_of, segments_to_ids,
};
use proptest::prelude::*;
use serde_json::Value;

use support::{check_order, format, parse, visible};

const CONTROL: [&str; 9] = [
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|channel|>",
    "<|constrain|>",
    "<|return|>",
    "<|call|>",
    "<|endoftext|>",
    "<|startoftext|>",
];

/// Words of headers, and text that looks like markup without being it.
const WORDS: [&str; 24] = [
    "assistant",
    "user",
    "tool",
    "analysis",
    "commentary",
    "final",
    " to=functions.f",
    " to=assistant",
    " json",
    "json",
    " code",
    "??",
    "finalx",
    "Commentary?",
    "functions.g",
    " ",
    "\n",
    "{\"a\":",
    "1}",
    "\"\\q\n",
    "]",
    "{",
    "'",
    "é",
];

/// A piece of a sequence. Marks are text that stands nowhere else, so that its loss would show.
#[derive(Clone, Debug)]
enum Piece {
    Control(usize),
    Word(usize),
    Mark,
    Bytes(Vec<u8>),
    Id(u32),
}

fn piece() -> impl Strategy<Value = Piece> {
    prop_oneof![
        6 => (0..CONTROL.len()).prop_map(Piece::Control),
        5 => (0..WORDS.len()).prop_map(Piece::Word),
        3 => Just(Piece::Mark),
        1 => prop::collection::vec(any::<u8>(), 1..4).prop_map(Piece::Bytes),
        1 => any::<u32>().prop_map(Piece::Id),
    ]
}

fn pieces() -> impl Strategy<Value = Vec<Piece>> {
    prop::collection::vec(piece(), 0..40)
}

/// Ids, and the marks among them.
fn ids(tokenizer: &Tokenizer, pieces: &[Piece]) -> (Vec<u32>, Vec<String>) {
    let (mut ids, mut marks) = (Vec::new(), Vec::new());
    for (at, piece) in pieces.iter().enumerate() {
        match piece {
            Piece::Control(which) => ids.extend(tokenizer.special_id(CONTROL[*which])),
            Piece::Word(which) => ids.extend(tokenizer.encode(WORDS[*which])),
            Piece::Mark => {
                let words = [format!("zq{at}x"), format!("zq{at}y")];
                ids.extend(tokenizer.encode(&format!(" {} {} ", words[0], words[1])));
                marks.extend(words);
            }
            Piece::Bytes(bytes) => ids.extend(tokenizer.encode_bytes(bytes).unwrap()),
            // Half of them within the vocabulary.
            Piece::Id(id) if id % 2 == 0 => ids.push(id % u32::try_from(tokenizer.len()).unwrap()),
            Piece::Id(id) => ids.push(*id),
        }
    }
    (ids, marks)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    /// HAR-01, HAR-02, HAR-03: of any sequence.
    #[test]
    fn no_text_is_lost_and_no_markup_shown(pieces in pieces(), stop in any::<bool>()) {
        let tokenizer = demo_tokenizer();
        let format = format("harmony", &tokenizer);
        let (ids, marks) = ids(&tokenizer, &pieces);
        let end = if stop { End::Stop } else { End::Cut };
        let (deltas, answer) = parse(format.as_ref(), &ids, end, ParserOptions::default());
        check_order(&deltas, &answer.finish_reason);
        let visible = visible(&answer);
        for mark in &marks {
            prop_assert!(visible.contains(mark), "{mark} is not in {answer:?}");
        }
        // The markup is spelt nowhere in the text, except where a vocabulary's own tokens make it up.
        if !pieces.iter().any(|piece| matches!(piece, Piece::Bytes(_) | Piece::Id(_))) {
            prop_assert!(!visible.contains("<|"), "{answer:?}");
        }
    }

    #[test]
    fn without_calls_there_are_none(pieces in pieces(), stop in any::<bool>()) {
        let tokenizer = demo_tokenizer();
        let format = format("harmony", &tokenizer);
        let (ids, marks) = ids(&tokenizer, &pieces);
        let end = if stop { End::Stop } else { End::Cut };
        let (deltas, answer) = parse(format.as_ref(), &ids, end, ParserOptions { calls: false, ..ParserOptions::default() });
        check_order(&deltas, &answer.finish_reason);
        prop_assert!(answer.tool_calls.is_empty() && answer.finish_reason != "tool_calls");
        let visible = visible(&answer);
        for mark in &marks {
            prop_assert!(visible.contains(mark), "{mark} is not in {answer:?}");
        }
    }

    #[test]
    fn well_formed_answers_come_back_whole(messages in prop::collection::vec(message(), 1..6)) {
        let tokenizer = demo_tokenizer();
        check_well_formed(&tokenizer, &messages);
    }

    #[test]
    fn arguments_that_are_json_come_back_byte_for_byte(value in json(), pretty in any::<bool>()) {
        let tokenizer = demo_tokenizer();
        let format = format("harmony", &tokenizer);
        let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) }.unwrap();
        let mut ids = tokenizer.encode_with_control("<|channel|>commentary to=functions.f <|constrain|>json<|message|>");
        ids.extend(tokenizer.encode(&text));
        ids.extend(tokenizer.encode_with_control("<|call|>"));
        let (_, answer) = parse(format.as_ref(), &ids, End::Stop, ParserOptions::default());
        prop_assert_eq!(&answer.tool_calls[0].arguments, &text);
        prop_assert!(answer.recovery.is_empty(), "{:?}", answer);
    }

    #[test]
    fn damaged_strings_are_repaired_to_json(text in "[ -~\n\t\u{0}-\u{1f}é😀]{0,40}") {
        // Every backslash and control character may stand, quotes and the last backslash may not.
        let text = text.replace('"', "'");
        let body = format!("{{\"k\":\"{}\"}}", text.trim_end_matches('\\'));
        let tokenizer = demo_tokenizer();
        let format = format("harmony", &tokenizer);
        let mut ids = tokenizer.encode_with_control("<|channel|>commentary to=functions.f json<|message|>");
        ids.extend(tokenizer.encode(&body));
        ids.extend(tokenizer.encode_with_control("<|call|>"));
        let (_, answer) = parse(format.as_ref(), &ids, End::Stop, ParserOptions::default());
        let arguments = &answer.tool_calls[0].arguments;
        let value: Value = serde_json::from_str(arguments).unwrap_or_else(|e| panic!("{e}: {body:?} {arguments:?}"));
        prop_assert!(value["k"].is_string());
        prop_assert!(answer.reasoning.is_none());
    }
}

/// A well-formed message: header, text, and where the text goes.
#[derive(Clone, Debug)]
enum Message {
    Analysis(String),
    Preamble(String),
    Final(String),
    Call(usize, &'static str, String),
}

fn message() -> impl Strategy<Value = Message> {
    let text = "[ -~\n日é😀]{1,30}";
    prop_oneof![
        text.prop_map(Message::Analysis),
        text.prop_map(Message::Preamble),
        text.prop_map(Message::Final),
        (0..HEADERS.len(), prop_oneof![Just("f"), Just("get_weather"), Just("a-b.c")], json())
            .prop_map(|(header, name, value)| Message::Call(header, name, value.to_string())),
    ]
}

/// The spellings of a call's header that are all well-formed.
const HEADERS: [(&str, &str); 7] = [
    ("<|channel|>commentary to=functions.", " <|constrain|>json"),
    ("<|channel|>commentary to=functions.", "<|constrain|>json"),
    ("<|channel|>commentary to=functions.", " json"),
    ("<|channel|>commentary to=functions.", ""),
    (" to=functions.", "<|channel|>commentary <|constrain|>json"),
    (" to=functions.", "<|channel|>commentary json"),
    (" to=functions.", "<|channel|>commentary"),
];

fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[ -~\n\u{1}日😀]{0,12}".prop_map(Value::from),
    ];
    let value = leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map("[a-z\"{}]{0,6}", inner, 0..4)
                .prop_map(|map| map.into_iter().collect()),
        ]
    });
    prop::collection::hash_map("[a-z]{0,6}", value, 0..4).prop_map(|map| map.into_iter().collect())
}

fn check_well_formed(tokenizer: &Arc<Tokenizer>, messages: &[Message]) {
    let format = format("harmony", tokenizer);
    let mut parser = format.parser(ParserOptions::default());
    let mut deltas = Vec::new();
    let (mut content, mut reasoning, mut calls) = (String::new(), String::new(), Vec::new());
    let last = messages.len() - 1;
    let mut push = |text: &str, control: bool, place: Place, deltas: &mut Vec<Delta>| {
        let ids = if control { tokenizer.encode_with_control(text) } else { tokenizer.encode(text) };
        for id in ids {
            assert_eq!(parser.push(id, deltas), place, "{:?}", tokenizer.token_text(id));
        }
    };
    for (at, message) in messages.iter().enumerate() {
        if at > 0 {
            push("<|start|>assistant", true, Place::Markup, &mut deltas);
        }
        let (header, text, place, end) = match message {
            Message::Analysis(text) => {
                reasoning.push_str(text);
                ("<|channel|>analysis".to_owned(), text, Place::Reasoning, "<|end|>")
            }
            Message::Preamble(text) => {
                content.push_str(text);
                ("<|channel|>commentary".to_owned(), text, Place::Content, "<|end|>")
            }
            Message::Final(text) => {
                content.push_str(text);
                let end = if at == last { "<|return|>" } else { "<|end|>" };
                ("<|channel|>final".to_owned(), text, Place::Content, end)
            }
            Message::Call(header, name, arguments) => {
                calls.push((*name, arguments.as_str()));
                let (before, after) = HEADERS[*header];
                (format!("{before}{name}{after}"), arguments, Place::Arguments, "<|call|>")
            }
        };
        push(&(header + "<|message|>"), true, Place::Markup, &mut deltas);
        push(text, false, place, &mut deltas);
        push(end, true, Place::Markup, &mut deltas);
    }
    let outcome = parser.finish(End::Stop, &mut deltas);
    let finish = if calls.is_empty() { "stop" } else { "tool_calls" };
    check_order(&deltas, finish);
    let mut collector = Collector::default();
    deltas.iter().for_each(|delta| collector.add(delta));
    let whole = collector.into_message();
    assert_eq!(outcome.recoveries, Vec::<&str>::new());
    assert_eq!(outcome.finish.as_str(), finish);
    assert_eq!(whole.content.unwrap_or_default(), content);
    assert_eq!(whole.reasoning.unwrap_or_default(), reasoning);
    let got: Vec<_> = whole.calls.iter().map(|call| (call.name.as_str(), call.arguments.as_str())).collect();
    assert_eq!(got, calls);
}

/// The answers of the numbered cases.
fn case_ids(tokenizer: &Tokenizer) -> Vec<Vec<u32>> {
    let case = |line: &str| {
        let case: Value = serde_json::from_str(line).unwrap();
        let segments: Vec<Segment> = serde_json::from_value(case["segments"].clone()).unwrap();
        segments_to_ids(tokenizer, &segments).unwrap()
    };
    include_str!("cases/harmony.jsonl").lines().map(case).collect()
}

/// Cut anywhere, an answer is whole up to there: the deltas of the longer begin with those of the shorter, and only
/// what is said in the end differs.
#[test]
fn every_case_can_be_cut_anywhere() {
    let tokenizer = demo_tokenizer();
    let format = format("harmony", &tokenizer);
    for ids in case_ids(&tokenizer) {
        // Long cases differ from short ones in length alone.
        for cut in 0..ids.len().min(80) {
            let (deltas, answer) = parse(format.as_ref(), &ids[..cut], End::Cut, ParserOptions::default());
            check_order(&deltas, &answer.finish_reason);
            let ended = end_of(&ids[..cut], format.stop_ids());
            if ended == End::Cut && answer.tool_calls.is_empty() {
                let after_stop = ids[..cut].iter().any(|id| format.stop_ids().contains(id));
                assert!(after_stop || answer.finish_reason == "length", "{answer:?}");
            }
        }
    }
}

/// HAR-06: A client that takes deltas as they come and one that takes them all at the end see the same message.
#[test]
fn every_split_into_pushes_gives_the_same_deltas() {
    let tokenizer = demo_tokenizer();
    let format = format("harmony", &tokenizer);
    for ids in case_ids(&tokenizer) {
        let end = end_of(&ids, format.stop_ids());
        let (whole, _) = parse(format.as_ref(), &ids, end, ParserOptions::default());
        for chunk in [1, 2, 3, 7] {
            let mut parser = format.parser(ParserOptions::default());
            let mut streamed = Vec::new();
            for ids in ids.chunks(chunk) {
                let mut deltas = Vec::new();
                ids.iter().for_each(|id| {
                    parser.push(*id, &mut deltas);
                });
                streamed.append(&mut deltas);
            }
            parser.finish(end, &mut streamed);
            assert_eq!(streamed, whole);
        }
    }
}

/// Text of a plain answer, of reasoning and of arguments is sent as soon as its characters are whole.
#[test]
fn text_streams() {
    let tokenizer = demo_tokenizer();
    let format = format("harmony", &tokenizer);
    let call = "<|channel|>commentary to=functions.f json<|message|>";
    for (head, text) in [
        ("<|channel|>final<|message|>", "It was a dark and stormy night."),
        ("<|channel|>analysis<|message|>", "It was a dark and stormy night."),
        ("", "It was a dark and stormy night."),
        (call, "{\"text\": \"It was a dark\\n and stormy night.\"}"),
    ] {
        let mut parser = format.parser(ParserOptions::default());
        let mut deltas = Vec::new();
        for id in tokenizer.encode_with_control(head) {
            parser.push(id, &mut deltas);
        }
        deltas.clear();
        let mut seen = String::new();
        let ids = tokenizer.encode(text);
        for (at, id) in ids.iter().enumerate() {
            parser.push(*id, &mut deltas);
            for delta in deltas.drain(..) {
                match delta {
                    Delta::Reasoning(text) | Delta::Content(text) | Delta::CallArguments { text, .. } => {
                        seen.push_str(&text);
                    }
                    Delta::CallStart { .. } | Delta::CallEnd { .. } => {}
                }
            }
            let so_far = tokenizer.decode(&ids[..=at], false);
            // An escape sequence is held until it is whole.
            assert!(seen == so_far || so_far.ends_with('\\'), "{seen:?} of {so_far:?}");
        }
    }
}
