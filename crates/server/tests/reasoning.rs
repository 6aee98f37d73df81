//! What requests say of reasoning, what answers say of it, and what history keeps.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests should stop where they fail")]

mod common;

use common::{Server, Setup, join, merged, request, whole};
use ctxserve_chat::PromptFiles;
use ctxserve_server::ReasoningNames;
use serde_json::{Value, json};

const LEVELS: [(&str, &str); 7] = [
    ("none", "low"),
    ("minimal", "low"),
    ("low", "low"),
    ("medium", "medium"),
    ("high", "high"),
    ("xhigh", "high"),
    ("max", "high"),
];

/// Says what it is told, and the history with its reasoning.
const TELLING: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}<|im_end|>\n\
    {% endfor %}{{ reasoning_effort | default('-') }} {{ enable_thinking | default('-') }}\n<|im_start|>assistant\n";

fn server(format: &str) -> Server {
    let mut setup = match format {
        "harmony" => Setup::new(&["<|channel|>final<|message|>Yes.<|return|>"]),
        _ => Setup::hermes(&["Yes.<|im_end|>"]),
    };
    setup.files = PromptFiles { chat_template: Some(TELLING.to_owned()), ..PromptFiles::default() };
    setup.start()
}

/// The prompt of a request, which is answered.
async fn prompt(server: &Server, extra: Value) -> String {
    let answer = server.chat(&merged(request(extra), json!({"return_token_ids": true}))).await.json();
    let ids = answer["prompt_token_ids"].as_array().unwrap_or_else(|| panic!("{answer}"));
    let ids: Vec<u32> = ids.iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect();
    server.tokenizer.decode(&ids, false)
}

/// HAR-21: every level in every spelling means what is documented, in both formats.
#[tokio::test]
async fn har_21_every_level_in_every_spelling() {
    let (harmony, hermes) = (server("harmony"), server("hermes"));
    for (level, named) in LEVELS {
        for extra in [
            json!({"reasoning_effort": level}),
            json!({"reasoning": {"effort": level}}),
            json!({"reasoning": {"effort": level, "exclude": true, "enabled": true, "max_tokens": null, "unknown": 1}}),
            json!({"chat_template_kwargs": {"reasoning_effort": level}}),
            json!({"reasoning_effort": level, "reasoning": {"effort": "max"}, "chat_template_kwargs": {"reasoning_effort": "low"}}),
            json!({"reasoning": {"effort": level}, "chat_template_kwargs": {"reasoning_effort": "low"}}),
        ] {
            let text = prompt(&harmony, extra.clone()).await;
            assert!(text.contains(&format!("\nReasoning: {named}\n")), "{extra}: {text}");
            let text = prompt(&hermes, extra.clone()).await;
            let thinks = if level == "none" { "False" } else { "True" };
            let told = format!("\n{level} {thinks}\n<|im_start|>").to_lowercase();
            assert!(text.to_lowercase().contains(&told), "{extra}: {text}");
        }
    }
    for (extra, harmony_level, told) in [
        (json!({}), "medium", "- -"),
        (json!({"reasoning_effort": null, "reasoning": null}), "medium", "- -"),
        (json!({"reasoning": {}}), "medium", "- -"),
        (json!({"reasoning": {"enabled": false}}), "low", "none false"),
        (json!({"reasoning": {"enabled": true}}), "medium", "medium true"),
        (json!({"chat_template_kwargs": {"enable_thinking": false}}), "low", "none false"),
        (
            json!({"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": false}}),
            "high",
            "high false",
        ),
    ] {
        let text = prompt(&harmony, extra.clone()).await;
        assert!(text.contains(&format!("\nReasoning: {harmony_level}\n")), "{extra}: {text}");
        let text = prompt(&hermes, extra.clone()).await.to_lowercase();
        assert!(text.contains(&format!("\n{told}\n<|im_start|>")), "{extra}: {text}");
    }
}

/// HAR-21: what is no level is refused by the field that says it.
#[tokio::test]
async fn har_21_other_levels_are_refused() {
    for format in ["harmony", "hermes"] {
        let server = server(format);
        for (extra, param) in [
            (json!({"reasoning_effort": "ultra"}), "reasoning_effort"),
            (json!({"reasoning_effort": ""}), "reasoning_effort"),
            (json!({"reasoning_effort": 3}), "reasoning_effort"),
            (json!({"reasoning": {"effort": "ultra"}}), "reasoning.effort"),
            (json!({"reasoning": {"effort": 3}}), "reasoning.effort"),
            (json!({"reasoning": "high"}), "reasoning"),
            (json!({"reasoning": {"max_tokens": 1000}}), "reasoning.max_tokens"),
            (json!({"chat_template_kwargs": {"reasoning_effort": "ultra"}}), "chat_template_kwargs"),
            (json!({"chat_template_kwargs": {"reasoning_effort": 3}}), "chat_template_kwargs"),
        ] {
            for path in ["/v1/chat/completions", "/tokenize"] {
                let answer = server.post(path, &request(extra.clone())).await;
                assert_eq!(
                    (answer.status.as_u16(), &answer.error()["param"]),
                    (400, &json!(param)),
                    "{path} {extra}"
                );
            }
        }
    }
}

/// OAI-06, OAI-13: reasoning goes out by both names or not at all, and is counted either way, whole and streamed.
#[tokio::test]
async fn oai_13_reasoning_is_shown_or_hidden_and_counted() {
    let harmony = "<|channel|>analysis<|message|>Hm, well.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>";
    let hermes = "<think>\nHm, well.\n</think>\n\nYes.<|im_end|>";
    for server in [Setup::new(&[harmony]).start(), Setup::hermes(&[hermes]).start()] {
        let mut counts = Vec::new();
        for (extra, shown) in [
            (json!({}), true),
            (json!({"include_reasoning": true}), true),
            (json!({"reasoning": {"exclude": false}}), true),
            (json!({"include_reasoning": false}), false),
            (json!({"reasoning": {"exclude": true}}), false),
            (json!({"include_reasoning": true, "reasoning": {"exclude": true}}), false),
        ] {
            let answer = server.chat(&request(extra.clone())).await.json();
            let one = whole(&answer["choices"][0]);
            assert_eq!(one.reasoning.as_deref(), shown.then_some("Hm, well."), "{extra}");
            assert_eq!(one.content.as_deref(), Some("Yes."));
            let stream = json!({"stream": true, "stream_options": {"include_usage": true}});
            let frames = server.chat(&merged(request(extra), stream)).await.frames();
            let streamed = join(&frames, 0);
            assert_eq!((&streamed.reasoning, &streamed.content), (&one.reasoning, &one.content));
            for usage in [&answer["usage"], &frames.last().unwrap()["usage"]] {
                let cached = &usage["prompt_tokens_details"]["cached_tokens"];
                assert!(cached.is_u64(), "{usage}");
                counts.push(usage["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap());
            }
        }
        assert!(counts[0] > 0 && counts.iter().all(|count| *count == counts[0]), "{counts:?}");
    }
}

/// OAI-13: an operator may choose one of the names.
#[tokio::test]
async fn oai_13_names_of_reasoning_can_be_set() {
    let answer =
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>";
    for (names, shown, not) in [
        (ReasoningNames::Reasoning, "reasoning", "reasoning_content"),
        (ReasoningNames::ReasoningContent, "reasoning_content", "reasoning"),
    ] {
        let mut setup = Setup::new(&[answer]);
        setup.server.reasoning_names = names;
        let server = setup.start();
        let whole = server.chat(&request(json!({}))).await.json();
        let message = &whole["choices"][0]["message"];
        assert_eq!((&message[shown], &message[not]), (&json!("Hm."), &json!(null)));
        let frames = server.chat(&request(json!({"stream": true}))).await.frames();
        let text = |name: &str| -> String {
            let deltas = frames.iter().filter_map(|frame| frame["choices"][0]["delta"][name].as_str());
            deltas.collect()
        };
        assert_eq!((text(shown).as_str(), text(not).as_str()), ("Hm.", ""));
    }
}

/// OAI-06: the counts are there where they are nothing.
#[tokio::test]
async fn oai_06_counts_are_there_at_zero() {
    for format in ["harmony", "hermes"] {
        let usage = server(format).chat(&request(json!({}))).await.json()["usage"].clone();
        assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0);
        assert_eq!(usage["completion_tokens_details"]["reasoning_tokens"], 0);
    }
}

/// OAI-13, HAR-15: reasoning comes back in a tool loop under any name that clients give it, exactly once.
#[tokio::test]
async fn oai_13_reasoning_is_read_under_every_name() {
    let call = json!([{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]);
    let history = |turn: Value| {
        let turn = merged(json!({"role": "assistant", "content": null, "tool_calls": call}), turn);
        json!({"messages": [{"role": "user", "content": "hi"}, turn, {"role": "tool", "tool_call_id": "a", "content": "r"}]})
    };
    let (harmony, hermes) = (server("harmony"), server("hermes"));
    let thought = "Thought.";
    let mut prompts = Vec::new();
    for turn in [
        json!({"reasoning_content": thought}),
        json!({"reasoning": thought}),
        json!({"reasoning": thought, "reasoning_content": ""}),
        json!({"reasoning": thought, "reasoning_content": thought, "reasoning_details": [{"type": "reasoning.text", "text": thought}]}),
        json!({"reasoning_details": [{"type": "reasoning.text", "text": "Thou", "index": 0}, {"type": "reasoning.text", "text": "ght.", "signature": null}, {"type": "reasoning.encrypted", "data": "x"}]}),
        json!({"thinking_blocks": [{"type": "thinking", "thinking": thought, "signature": "x"}, {"type": "redacted_thinking", "data": "x"}]}),
        json!({"content": [{"type": "thinking", "thinking": thought}]}),
        json!({"content": [{"type": "reasoning", "text": thought}, {"type": "text", "text": ""}]}),
    ] {
        let told =
            [prompt(&harmony, history(turn.clone())).await, prompt(&hermes, history(turn.clone())).await];
        for text in &told {
            assert_eq!(text.matches(thought).count(), 1, "{turn}: {text}");
        }
        prompts.push(told);
    }
    assert!(prompts.iter().all(|told| *told == prompts[0]));
    let bare = prompt(&harmony, history(json!({}))).await;
    assert!(!bare.contains("<|channel|>analysis<|message|>"), "{bare}");
    // Only the model reasons.
    for (role, extra) in [("user", json!({})), ("tool", json!({"tool_call_id": "a"}))] {
        let mut body = history(json!({}));
        let part = json!([{"type": "thinking", "thinking": thought}]);
        body["messages"].as_array_mut().unwrap().push(merged(json!({"role": role, "content": part}), extra));
        let error = harmony.chat(&body).await.error();
        assert_eq!(error["param"], "messages[3].content", "{error}");
    }
}

/// OAI-18: calls of the history with any arguments, and content that is null or not there, are rendered.
#[tokio::test]
async fn oai_18_odd_calls_of_the_history_are_rendered() {
    for format in ["harmony", "hermes"] {
        let server = server(format);
        for arguments in [
            json!("{\"a\": 1}"),
            json!({"a": 1}),
            json!(""),
            json!(null),
            json!("{\"a\": "),
            json!("[1]"),
            json!(7),
            json!([]),
        ] {
            for content in [json!(null), json!(""), json!("Well."), json!([])] {
                let function = json!({"name": "f", "arguments": arguments});
                let turn = json!({"role": "assistant", "content": content, "tool_calls": [{"id": "a", "type": "function", "function": function}]});
                let messages = json!([{"role": "user", "content": "hi"}, turn, {"role": "tool", "tool_call_id": "a", "content": "r"}]);
                prompt(&server, json!({"messages": messages})).await;
            }
        }
    }
}
