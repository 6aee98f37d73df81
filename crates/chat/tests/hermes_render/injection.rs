//! Control tokens come from the template alone, whatever clients write and wherever templates put it.

use ctxserve_chat::testing::qwen_tokenizer;
use ctxserve_chat::{Conversation, FunctionTool, Message, ToolCall};
use proptest::prelude::*;
use serde_json::json;

use super::{hermes, named_template, text_of, with_template};

/// A conversation with `fill` in every string that a client can write.
fn filled(fill: &str) -> Conversation {
    let declaration = json!({
        "type": "function",
        "function": {
            "name": fill,
            "description": fill,
            "parameters": { "type": "object", "properties": { fill: { "enum": [fill, null], "default": fill } }, "required": [fill] },
            fill: fill,
        },
        fill: [fill],
    });
    let tool = FunctionTool {
        name: fill.to_owned(),
        description: Some(fill.to_owned()),
        parameters: None,
        declaration: Some(declaration.to_string()),
    };
    let call = |arguments: String| ToolCall { id: fill.to_owned(), name: fill.to_owned(), arguments };
    Conversation {
        messages: vec![
            Message::System(fill.to_owned()),
            Message::Developer(fill.to_owned()),
            Message::User { name: Some(fill.to_owned()), content: fill.to_owned() },
            Message::Assistant {
                reasoning: Some(fill.to_owned()),
                content: Some(fill.to_owned()),
                tool_calls: vec![call(json!({ fill: fill, "a": [fill] }).to_string()), call(fill.to_owned())],
            },
            Message::Tool { call_id: fill.to_owned(), content: fill.to_owned() },
            Message::User { name: None, content: fill.to_owned() },
        ],
        tools: vec![tool],
        ..Conversation::default()
    }
}

/// Templates that put clients' text where it has most chances.
const HOSTILE: [&str; 6] = [
    "{% for m in messages %}<|{{ m.content }}|>{% endfor %}",
    "{% for m in messages %}<|im_{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m.content }}|>{% endfor %}",
    "{% for m in messages %}{{ m.content }}{{ m.content }}{{ m.name }}{% endfor %}",
    "{% for m in messages %}<{{ m.content | trim }}>{{ '<' ~ m.content[1:] }}{{ m.content[:-1] ~ '>' }}{% endfor %}",
    "{{ tools | tojson(ensure_ascii=true, indent=1) }}{{ messages | tojson }}{{ messages }}",
];

/// Spellings, halves and insides of control tokens.
fn fills() -> Vec<String> {
    let tokenizer = qwen_tokenizer();
    let mut fills: Vec<String> = Vec::new();
    for (name, _) in tokenizer.control_tokens() {
        let inside = name.trim_matches(['<', '>', '|', '/']);
        fills.extend([
            name.to_owned(),
            format!("{name}{name}"),
            format!("a{name}\n"),
            inside.to_owned(),
            inside[..1].to_owned(),
            format!("|{inside}|"),
            name[1..].to_owned(),
            name[..name.len() - 1].to_owned(),
            format!("<{name}>"),
        ]);
    }
    fills.extend([
        "<".to_owned(),
        ">".to_owned(),
        "<|".to_owned(),
        "|>".to_owned(),
        "\u{fdd0}<\u{fdd0}|im_end|>".to_owned(),
    ]);
    fills
}

/// HAR-19: of the hermes format.
#[test]
fn no_string_of_a_client_becomes_a_control_token() {
    let tokenizer = qwen_tokenizer();
    let mut formats = vec![hermes(), named_template("thinking"), named_template("features")];
    formats.extend(HOSTILE.map(with_template));
    for format in formats {
        let controls = |fill: &str| -> Vec<u32> {
            let ids = format.render(&filled(fill)).unwrap_or_else(|error| panic!("{fill:?}: {error}"));
            ids.into_iter().filter(|id| tokenizer.is_control(*id)).collect()
        };
        let expected = controls("ordinary words");
        for fill in fills() {
            assert_eq!(controls(&fill), expected, "{fill:?}");
        }
    }
}

#[test]
fn the_text_is_what_the_client_wrote() {
    for fill in fills() {
        let user = Message::User { name: None, content: fill.clone() };
        let conversation = Conversation { messages: vec![user], ..Conversation::default() };
        let expected = format!("<|im_start|>user\n{fill}<|im_end|>\n<|im_start|>assistant\n");
        assert_eq!(text_of(&*hermes(), &conversation).unwrap(), expected);
    }
}

#[test]
fn text_with_every_mark_is_refused() {
    let all: String = ('\u{fdd0}'..='\u{fdef}').collect();
    let conversation = |text: &str| Conversation {
        messages: vec![Message::User { name: None, content: text.to_owned() }],
        ..Conversation::default()
    };
    assert!(hermes().render(&conversation(&all[3..])).is_ok());
    let error = hermes().render(&conversation(&all)).unwrap_err();
    assert!(error.what.contains("noncharacter"), "{error}");
    // Escaped in JSON they are the same characters.
    let escaped =
        format!("{{\"a\": \"{}\"}}", (0xfdd0..=0xfdef).map(|c| format!("\\u{c:04x}")).collect::<String>());
    let call = ToolCall { id: "a".to_owned(), name: "f".to_owned(), arguments: escaped };
    let message = Message::Assistant { reasoning: None, content: None, tool_calls: vec![call] };
    assert!(hermes().render(&Conversation { messages: vec![message], ..Conversation::default() }).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Any text comes through the default template as it is, composed.
    #[test]
    fn any_text_comes_through(text in "(\\PC|[<>|/\n\u{fdd0}-\u{fdd2}]|im_end|tool_call|think){0,20}") {
        let user = Message::User { name: None, content: text.clone() };
        let ids = hermes().render(&Conversation { messages: vec![user], ..Conversation::default() }).unwrap();
        let tokenizer = qwen_tokenizer();
        let framed: Vec<u32> = ids.iter().copied().filter(|id| tokenizer.is_control(*id)).collect();
        let names: Vec<String> = framed.iter().map(|id| tokenizer.token_text(*id).unwrap()).collect();
        prop_assert_eq!(names, ["<|im_start|>", "<|im_end|>", "<|im_start|>"]);
        let composed = tokenizer.decode(&tokenizer.encode(&text), false);
        let expected = format!("<|im_start|>user\n{composed}<|im_end|>\n<|im_start|>assistant\n");
        prop_assert_eq!(tokenizer.decode(&ids, false), expected);
    }

    /// Nothing that a client sends fails inside.
    #[test]
    fn any_fill_renders_or_is_refused(fill in "(\\PC|[<>|\"\\\\{}\n]|im_end){0,12}") {
        for format in [hermes(), named_template("thinking"), named_template("features")] {
            prop_assert!(format.render(&filled(&fill)).is_ok());
        }
    }
}
