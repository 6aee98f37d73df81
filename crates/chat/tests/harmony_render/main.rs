//! Rendered prompts, id for id against openai-harmony on gpt-oss's vocabulary.
#![recursion_limit = "256"]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests, too")]

mod oracle;
mod round_trip;
mod rules;
mod schemas;

use std::sync::Arc;

use ctxserve_chat::testing::o200k_tokenizer;
use ctxserve_chat::{
    ChatFormat, Conversation, FunctionTool, Message, PromptFiles, ReasoningEffort, RenderError, ToolCall,
    formats,
};
use openai_harmony::chat::{Author, Message as Reference, ReasoningEffort as Effort, Role, SystemContent};

fn harmony() -> Arc<dyn ChatFormat> {
    formats::open("harmony", o200k_tokenizer(), &PromptFiles::default()).unwrap()
}

fn render(conversation: &Conversation) -> Result<Vec<u32>, RenderError> {
    harmony().render(conversation)
}

fn user(text: &str) -> Message {
    Message::User { name: None, content: text.to_owned() }
}

fn answer(reasoning: Option<&str>, content: Option<&str>) -> Message {
    Message::Assistant {
        reasoning: reasoning.map(str::to_owned),
        content: content.map(str::to_owned),
        tool_calls: Vec::new(),
    }
}

fn calls(reasoning: Option<&str>, content: Option<&str>, calls: &[(&str, &str, &str)]) -> Message {
    let call = |(id, name, arguments): &(&str, &str, &str)| ToolCall {
        id: (*id).to_owned(),
        name: (*name).to_owned(),
        arguments: (*arguments).to_owned(),
    };
    Message::Assistant {
        reasoning: reasoning.map(str::to_owned),
        content: content.map(str::to_owned),
        tool_calls: calls.iter().map(call).collect(),
    }
}

fn result(id: &str, content: &str) -> Message {
    Message::Tool { call_id: id.to_owned(), content: content.to_owned() }
}

fn tool(name: &str, description: Option<&str>, parameters: Option<serde_json::Value>) -> FunctionTool {
    FunctionTool {
        name: name.to_owned(),
        description: description.map(str::to_owned),
        parameters,
        declaration: None,
    }
}

fn weather() -> FunctionTool {
    let schema = serde_json::json!({
        "type": "object",
        "properties": { "city": { "type": "string", "description": "Where" } },
        "required": ["city"],
    });
    tool("get_weather", Some("Tells the weather."), Some(schema))
}

/// The reference's own defaults for the system message.
fn system() -> Reference {
    oracle::system(SystemContent::new())
}

#[track_caller]
fn agree(conversation: &Conversation, reference: &[Reference]) {
    let ids = render(conversation).unwrap();
    let expected = oracle::render(reference, conversation.keep_reasoning);
    if ids != expected {
        // Text first: where it differs, it says more than ids.
        pretty_eq(&o200k_tokenizer().decode(&ids, false), &oracle::decode(&expected));
        panic!("same text, other ids:\n ours     {ids:?}\n expected {expected:?}");
    }
}

#[track_caller]
fn pretty_eq(ours: &str, expected: &str) {
    assert_eq!(ours, expected, "\n--- ours\n{ours}\n--- expected\n{expected}\n---");
}

#[test]
fn the_smallest_conversation() {
    agree(
        &Conversation { messages: vec![user("Hi")], ..Conversation::default() },
        &[system(), oracle::user("Hi")],
    );
}

#[test]
fn published_ids() {
    let ids = render(&Conversation { messages: vec![user("Hi")], ..Conversation::default() }).unwrap();
    assert_eq!(ids[..3], [200_006, 17_360, 200_008], "<|start|>system<|message|>");
    assert_eq!(ids[ids.len() - 2..], [200_006, 173_781], "<|start|>assistant");
}

#[test]
fn date_and_effort() {
    for (ours, theirs) in [
        (None, Effort::Medium),
        (Some(ReasoningEffort::None), Effort::Low),
        (Some(ReasoningEffort::Minimal), Effort::Low),
        (Some(ReasoningEffort::Low), Effort::Low),
        (Some(ReasoningEffort::Medium), Effort::Medium),
        (Some(ReasoningEffort::High), Effort::High),
        (Some(ReasoningEffort::XHigh), Effort::High),
        (Some(ReasoningEffort::Max), Effort::High),
    ] {
        agree(
            &Conversation {
                messages: vec![user("Hi")],
                reasoning_effort: ours,
                current_date: Some("2026-05-12".to_owned()),
                ..Conversation::default()
            },
            &[
                oracle::system(
                    SystemContent::new()
                        .with_reasoning_effort(theirs)
                        .with_conversation_start_date("2026-05-12"),
                ),
                oracle::user("Hi"),
            ],
        );
    }
}

#[test]
fn instructions_with_and_without_tools() {
    for message in [Message::System("Be brief.".to_owned()), Message::Developer("Be brief.".to_owned())] {
        for tools in [vec![], vec![weather()]] {
            let described = tools.iter().map(schemas::described).collect();
            agree(
                &Conversation {
                    messages: vec![message.clone(), user("Hi")],
                    tools,
                    ..Conversation::default()
                },
                &[system(), oracle::developer(Some("Be brief."), described), oracle::user("Hi")],
            );
        }
    }
}

#[test]
fn tools_without_instructions() {
    agree(
        &Conversation { messages: vec![user("Hi")], tools: vec![weather()], ..Conversation::default() },
        &[system(), oracle::developer(None, vec![schemas::described(&weather())]), oracle::user("Hi")],
    );
}

/// HAR-16.
#[test]
fn later_instructions_keep_their_place() {
    agree(
        &Conversation {
            messages: vec![
                Message::System("One.".to_owned()),
                Message::Developer("Two.".to_owned()),
                user("Hi"),
                answer(None, Some("Hello.")),
                Message::System("Three.".to_owned()),
                user("And now?"),
            ],
            tools: vec![weather()],
            ..Conversation::default()
        },
        &[
            system(),
            oracle::developer(Some("One."), vec![schemas::described(&weather())]),
            oracle::developer(Some("Two."), vec![]),
            oracle::user("Hi"),
            oracle::assistant("final", "Hello."),
            oracle::developer(Some("Three."), vec![]),
            oracle::user("And now?"),
        ],
    );
}

#[test]
fn a_named_user() {
    let named = Author { role: Role::User, name: Some("ada".to_owned()) };
    agree(
        &Conversation {
            messages: vec![Message::User { name: Some("ada".to_owned()), content: "Hi".to_owned() }],
            ..Conversation::default()
        },
        &[system(), Reference::from_author_and_content(named, "Hi")],
    );
}

/// HAR-15: reasoning of the turn under way is there.
#[test]
fn a_tool_loop_keeps_reasoning() {
    agree(
        &Conversation {
            messages: vec![
                user("Weather in Paris and Rome?"),
                calls(
                    Some("Two calls."),
                    Some("Let me look."),
                    &[
                        ("a", "get_weather", r#"{"city": "Paris"}"#),
                        ("b", "get_weather", r#"{"city":"Rome"}"#),
                    ],
                ),
                result("b", "rain"),
                result("a", r#"{"sky": "clear"}"#),
            ],
            tools: vec![weather()],
            ..Conversation::default()
        },
        &[
            system(),
            oracle::developer(None, vec![schemas::described(&weather())]),
            oracle::user("Weather in Paris and Rome?"),
            oracle::assistant("analysis", "Two calls."),
            oracle::assistant("commentary", "Let me look."),
            oracle::call("get_weather", r#"{"city": "Paris"}"#),
            oracle::call("get_weather", r#"{"city":"Rome"}"#),
            oracle::result("get_weather", "rain"),
            oracle::result("get_weather", r#"{"sky": "clear"}"#),
        ],
    );
}

/// HAR-15: several answers: reasoning goes only in front of the first, and only while the last turn is an answer.
#[test]
fn reasoning_is_dropped_exactly_as_the_reference_does() {
    let turns = vec![
        user("1"),
        calls(Some("think 1a"), None, &[("a", "f", "{}")]),
        result("a", "x"),
        answer(Some("think 1b"), Some("one")),
        user("2"),
        answer(Some("think 2"), Some("two")),
        user("3"),
        calls(Some("think 3"), None, &[("a", "g", "{}")]),
        result("a", "y"),
        answer(Some("only thoughts"), None),
    ];
    let reference = [
        oracle::user("1"),
        oracle::assistant("analysis", "think 1a"),
        oracle::call("f", "{}"),
        oracle::result("f", "x"),
        oracle::assistant("analysis", "think 1b"),
        oracle::assistant("final", "one"),
        oracle::user("2"),
        oracle::assistant("analysis", "think 2"),
        oracle::assistant("final", "two"),
        oracle::user("3"),
        oracle::assistant("analysis", "think 3"),
        oracle::call("g", "{}"),
        oracle::result("g", "y"),
        oracle::assistant("analysis", "only thoughts"),
    ];
    // Where each of our turns ends in the reference's messages.
    for (ours, theirs) in
        [(1, 1), (2, 3), (3, 4), (4, 6), (5, 7), (6, 9), (7, 10), (8, 12), (9, 13), (10, 14)]
    {
        for keep_reasoning in [false, true] {
            let conversation =
                Conversation { messages: turns[..ours].to_vec(), keep_reasoning, ..Conversation::default() };
            let mut expected = vec![system()];
            expected.extend_from_slice(&reference[..theirs]);
            agree(&conversation, &expected);
        }
    }
    let text = |turns: &[Message]| {
        let conversation = Conversation { messages: turns.to_vec(), ..Conversation::default() };
        o200k_tokenizer().decode(&render(&conversation).unwrap(), false)
    };
    assert!(!text(&turns[..7]).contains("think 1"), "the last turn is an answer");
    assert!(text(&turns[..9]).contains("think 1"), "the last turn is a call");
}
