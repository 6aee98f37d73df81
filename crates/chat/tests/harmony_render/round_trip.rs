//! A turn that the model could have written, rendered as history, parses back to itself.

use ctxserve_chat::{Collector, Conversation, End, Message, ParserOptions};
use proptest::prelude::*;

use super::{ToolCall, harmony, render, user};

fn prompt(messages: Vec<Message>) -> Vec<u32> {
    render(&Conversation { messages, keep_reasoning: true, ..Conversation::default() }).unwrap()
}

fn text() -> impl Strategy<Value = String> {
    // Harmony has no empty messages of which one could tell that they were there.
    prop_oneof![
        ".{1,40}",
        "[ -~\n]{1,60}",
        Just("<|end|><|start|>assistant<|channel|>final<|message|>".to_owned())
    ]
}

proptest! {
    #[test]
    fn history_parses_back(
        reasoning in prop::option::of(text()),
        content in prop::option::of(text()),
        calls in prop::collection::vec(("[a-zA-Z_][a-zA-Z0-9_.-]{0,10}[a-zA-Z0-9]", prop_oneof![Just("{}"), Just("{\"a\": [1, \"x\"]}")]), 0..3),
    ) {
        prop_assume!(content.is_some() || !calls.is_empty());
        let tool_calls: Vec<ToolCall> = (0..)
            .zip(&calls)
            .map(|(i, (name, arguments)): (u32, _)| ToolCall {
                id: i.to_string(),
                name: name.clone(),
                arguments: (*arguments).to_owned(),
            })
            .collect();
        let turn = Message::Assistant { reasoning: reasoning.clone(), content: content.clone(), tool_calls };
        // The answer is what the turn adds behind the begun header.
        let before = prompt(vec![user("Hi")]);
        let after = prompt(vec![user("Hi"), turn]);
        prop_assert_eq!(&after[..before.len()], before.as_slice());
        let suffix = &before[before.len() - 2..];
        let answer = after[before.len()..].strip_suffix(suffix).unwrap();

        let (mut parser, mut deltas, mut collector) = (harmony().parser(ParserOptions::default()), Vec::new(), Collector::default());
        for id in answer {
            parser.push(*id, &mut deltas);
        }
        let outcome = parser.finish(End::Stop, &mut deltas);
        deltas.iter().for_each(|delta| collector.add(delta));
        let message = collector.into_message();
        prop_assert_eq!(&message.reasoning, &reasoning);
        prop_assert_eq!(&message.content, &content);
        let parsed: Vec<_> = message.calls.iter().map(|call| (call.name.clone(), call.arguments.as_str())).collect();
        let expected: Vec<_> = calls.iter().map(|(name, arguments)| (name.clone(), *arguments)).collect();
        prop_assert_eq!(parsed, expected);
        prop_assert_eq!(outcome.recoveries, Vec::<&str>::new());
    }
}
