//! Any sequence of tokens is a message, nothing in it is lost, and it does not matter how it was cut.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too")]

#[path = "support/parse.rs"]
mod support;

use ctxserve_chat::testing::qwen_tokenizer;
use ctxserve_chat::{Delta, End, ParserOptions};
use proptest::prelude::*;
use serde_json::Value;

use support::{Answer, check_order, format, parse, visible};

/// Pieces of answers, well-formed and not.
const PIECES: [&str; 34] = [
    "<tool_call>",
    "</tool_call>",
    "<think>",
    "</think>",
    "<tool_call>\n{\"name\": \"f\", \"arguments\": ",
    "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"",
    "\n<tool_call>\n{\"name\": \"nobody\", \"arguments\": {}}",
    "{\"arguments\": {}, \"name\": \"g\"}",
    "{\"arguments\": \"",
    "}\n</tool_call>",
    "}}\n</tool_call>\n",
    "{\"name\": \"",
    "\"name\": ",
    "\"arguments\": ",
    "\"x\": ",
    "{",
    "}",
    "[",
    "]",
    "\"",
    "\\",
    "\\\"",
    "\\u00",
    ", ",
    ": ",
    "\n",
    "\n\n",
    " ",
    "<",
    "</",
    "<tool_",
    "null",
    "<|im_end|>",
    "<|vision_start|>",
];

/// Marks are text that stands nowhere else, so that its loss would show.
#[derive(Clone, Debug)]
enum Piece {
    Known(usize),
    Mark,
    Bytes(Vec<u8>),
    Id(u32),
}

fn pieces() -> impl Strategy<Value = Vec<Piece>> {
    let piece = prop_oneof![
        10 => (0..PIECES.len()).prop_map(Piece::Known),
        3 => Just(Piece::Mark),
        1 => prop::collection::vec(any::<u8>(), 1..4).prop_map(Piece::Bytes),
        1 => any::<u32>().prop_map(Piece::Id),
    ];
    prop::collection::vec(piece, 0..30)
}

/// Ids, and the marks among them.
fn ids(pieces: &[Piece]) -> (Vec<u32>, Vec<String>) {
    let tokenizer = qwen_tokenizer();
    let (mut ids, mut marks) = (Vec::new(), Vec::new());
    for (at, piece) in pieces.iter().enumerate() {
        match piece {
            Piece::Known(which) => ids.extend(tokenizer.encode_with_control(PIECES[*which])),
            Piece::Mark => {
                let mark = format!("zq{at}x");
                ids.extend(tokenizer.encode(&mark));
                marks.push(mark);
            }
            Piece::Bytes(bytes) => ids.extend(tokenizer.encode_bytes(bytes).unwrap()),
            // Half of them within the vocabulary.
            Piece::Id(id) if id % 2 == 0 => ids.push(id % u32::try_from(tokenizer.len()).unwrap()),
            Piece::Id(id) => ids.push(*id),
        }
    }
    (ids, marks)
}

/// Every character by itself, as the tokens of its bytes.
fn spelt(ids: &[u32]) -> Vec<u32> {
    let tokenizer = qwen_tokenizer();
    let spell = |id: &u32| {
        let bytes = tokenizer.token_bytes(*id).unwrap_or_default();
        if tokenizer.is_special(*id) || bytes.is_empty() || bytes.starts_with(b"<|") {
            return vec![*id];
        }
        bytes.iter().flat_map(|byte| tokenizer.encode_bytes(&[*byte]).unwrap()).collect()
    };
    ids.iter().flat_map(spell).collect()
}

fn options(declared: bool, thinking: bool) -> ParserOptions {
    let tools = declared.then(|| vec!["f".to_owned(), "g".to_owned()].into());
    ParserOptions { calls: true, tools, thinking }
}

fn read(ids: &[u32], end: End, options: ParserOptions) -> (Vec<Delta>, Answer) {
    parse(format("hermes", &qwen_tokenizer()).as_ref(), ids, end, options)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn no_text_is_lost(
        pieces in pieces(), stop in any::<bool>(), declared in any::<bool>(), thinking in any::<bool>(),
    ) {
        let (ids, marks) = ids(&pieces);
        let end = if stop { End::Stop } else { End::Cut };
        let (deltas, answer) = read(&ids, end, options(declared, thinking));
        check_order(&deltas, &answer.finish_reason);
        let visible = visible(&answer);
        // The head of a call that was cut is markup.
        let beheaded = answer.recovery.iter().any(|name| name == "call_cut");
        for mark in &marks {
            prop_assert!(beheaded || visible.contains(mark), "{mark} is not in {answer:?}");
        }
        if !pieces.iter().any(|piece| matches!(piece, Piece::Bytes(_) | Piece::Id(_))) {
            prop_assert!(!visible.contains("<|"), "{answer:?}");
        }
        for call in &answer.tool_calls {
            prop_assert!(!declared || ["f", "g"].contains(&call.name.as_str()), "{answer:?}");
        }
    }

    /// Tokens are only a way to spell the text.
    #[test]
    fn tokens_do_not_matter(pieces in pieces(), stop in any::<bool>(), thinking in any::<bool>()) {
        let (ids, _) = ids(&pieces);
        let end = if stop { End::Stop } else { End::Cut };
        let (_, whole) = read(&ids, end, options(true, thinking));
        let (_, spelt) = read(&spelt(&ids), end, options(true, thinking));
        prop_assert_eq!(whole, spelt);
    }

    /// HER-01, HER-06: of any arguments.
    #[test]
    fn arguments_come_back_byte_for_byte(
        value in json(), pretty in any::<bool>(), ascii in any::<bool>(), before in "[a-z .]{0,8}", again in any::<bool>(),
    ) {
        let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) }.unwrap();
        let text = if ascii { escaped(&text) } else { text };
        let call = format!("<tool_call>\n{{\"name\": \"f\", \"arguments\": {text}}}\n</tool_call>");
        let answer = format!("{before}\n{call}{}<|im_end|>", if again { "\n".to_owned() + &call } else { String::new() });
        let ids = qwen_tokenizer().encode_with_control(&answer);
        for ids in [ids.clone(), spelt(&ids)] {
            let (deltas, answer) = read(&ids, End::Stop, options(true, false));
            check_order(&deltas, &answer.finish_reason);
            prop_assert_eq!(answer.tool_calls.len(), 1 + usize::from(again));
            for call in &answer.tool_calls {
                prop_assert_eq!(&call.arguments, &text);
            }
            prop_assert!(answer.recovery.is_empty(), "{:?}", answer);
            prop_assert_eq!(answer.finish_reason, "tool_calls");
            let before = Some(before.clone()).filter(|text| !text.trim().is_empty());
            prop_assert_eq!(answer.content, before);
        }
    }

}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Cut anywhere, a well-formed answer is its own beginning, without any markup.
    #[test]
    fn a_cut_answer_is_a_beginning(
        thoughts in prop::option::of("[a-z \n]{1,20}"), before in "[a-z \n.]{0,20}", value in json(), after in "[a-z .]{0,8}",
    ) {
        let thoughts = thoughts.map(|text| format!("<think>\n{text}\n</think>\n\n")).unwrap_or_default();
        let call = format!("<tool_call>\n{{\"name\": \"f\", \"arguments\": {value}}}\n</tool_call>");
        let ids = qwen_tokenizer().encode_with_control(&format!("{thoughts}{before}\n{call}{after}\n{call}"));
        let ids = spelt(&ids);
        let (_, whole) = read(&ids, End::Cut, options(true, false));
        let empty = String::new();
        for cut in 0..ids.len() {
            let (deltas, answer) = read(&ids[..cut], End::Cut, options(true, false));
            check_order(&deltas, &answer.finish_reason);
            let content = answer.content.unwrap_or_default();
            // White space or half a tag at the cut was held back and is shown in the end.
            let shown = content.rfind('<').map_or(content.as_str(), |at| &content[..at]).trim_end();
            prop_assert!(whole.content.as_ref().unwrap_or(&empty).starts_with(shown), "{cut}: {content:?}");
            prop_assert!(!content.contains("tool_call>") && !content.contains('{'), "{cut}: {content:?}");
            let reasoning = answer.reasoning.unwrap_or_default();
            let reasoning = reasoning.split('<').next().unwrap_or_default();
            prop_assert!(whole.reasoning.as_ref().unwrap_or(&empty).starts_with(reasoning.trim_end_matches('\n')));
            for (cut, whole) in answer.tool_calls.iter().zip(&whole.tool_calls) {
                // A character that was cut.
                let arguments = cut.arguments.trim_end_matches('\u{fffd}');
                prop_assert!(cut.name == whole.name && whole.arguments.starts_with(arguments));
            }
        }
    }
}

fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "([ -~\n\u{1}日😀]|</tool_call>|\n<tool_call>|</think>){0,8}".prop_map(Value::from),
    ];
    let value = leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map("[a-z\"{}]{0,6}", inner, 0..4)
                .prop_map(|map| map.into_iter().collect()),
        ]
    });
    prop::collection::hash_map("(name|arguments|[a-z<>-]{0,6})", value, 0..4)
        .prop_map(|map| map.into_iter().collect())
}

/// JSON with everything beyond ASCII escaped.
fn escaped(json: &str) -> String {
    let mut out = String::new();
    for c in json.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
        }
    }
    out
}

/// Text of a plain answer, of reasoning and of arguments is sent as soon as it cannot be markup.
#[test]
fn text_streams() {
    let tokenizer = qwen_tokenizer();
    let format = format("hermes", &tokenizer);
    let call = "<tool_call>\n{\"name\": \"f\", \"arguments\": ";
    for (head, text, thinking) in [
        ("", "It was a dark and stormy night; a < b.", false),
        ("<think>\n", "It was a dark and stormy night.", false),
        ("", "It was a dark and stormy night.", true),
        (call, "{\"text\": \"It was a dark\\n and stormy night.\", \"n\": [1, 2]}", false),
    ] {
        let mut parser = format.parser(options(true, thinking));
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
                if let Delta::Reasoning(text) | Delta::Content(text) | Delta::CallArguments { text, .. } =
                    delta
                {
                    seen.push_str(&text);
                }
            }
            let so_far = tokenizer.decode(&ids[..=at], false);
            // An escape sequence, or what may begin a tag, is held until it is whole.
            assert!(seen == so_far || so_far.ends_with(['\\', '<']), "{seen:?} of {so_far:?}");
        }
    }
}
