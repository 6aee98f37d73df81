//! HAR-07 over the API: histories that repeat the server's own turns are rendered by the ids that were generated.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests should stop where they fail")]

mod common;

use axum::body::Body;
use axum::http::Request;
use common::{Answer, Server, Setup, join, merged, whole};
use ctxserve_chat::{PromptFiles, Tokenizer};
use serde_json::{Value, json};

const HARMONY: [&str; 2] = [
    "<|channel|>analysis<|message|>I must look.<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"q\":\"caf\u{e9}\", \"n\":1}<|call|>",
    "<|channel|>analysis<|message|>Now I know.<|end|><|start|>assistant<|channel|>final<|message|>It is there.<|return|>",
];
const HERMES: [&str; 2] = [
    "<think>\nI must look.\n</think>\n\n<tool_call>\n{\"name\":\"f\", \"arguments\": {\"q\":\"caf\u{e9}\", \"n\":1}}\n</tool_call><|im_end|>",
    "<think>\nNow I know.\n</think>\n\nIt is there.<|im_end|>",
];

/// Ids of text as no tokenizer would cut it: every character for itself.
fn odd(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    let (mut ids, mut rest) = (Vec::new(), text);
    while let Some((at, len, control)) = tokenizer.find_control(rest) {
        rest[..at].chars().for_each(|c| tokenizer.encode_into(c.encode_utf8(&mut [0; 4]), &mut ids));
        ids.push(control);
        rest = &rest[at + len..];
    }
    ids
}

fn setup(format: &str) -> Setup {
    let (mut setup, script) = match format {
        "harmony" => (Setup::ids(Vec::new()), HARMONY),
        _ => (Setup::hermes(&[]), HERMES),
    };
    let template = include_str!("../../chat/tests/data/templates/thinking.jinja").to_owned();
    setup.files = PromptFiles { chat_template: Some(template), ..PromptFiles::default() };
    setup.lines = script.iter().map(|line| odd(&setup.tokenizer, line)).collect();
    setup
}

fn body(messages: &Value) -> Value {
    let tool = json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}});
    json!({"messages": messages, "tools": [tool], "return_token_ids": true})
}

fn ids(value: &Value) -> Vec<u64> {
    value.as_array().unwrap_or_else(|| panic!("{value}")).iter().map(|id| id.as_u64().unwrap()).collect()
}

async fn ask(server: &Server, key: Option<&str>, body: &Value) -> Answer {
    let mut request = Request::post("/v1/chat/completions").header("content-type", "application/json");
    if let Some(key) = key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    server.send(request.body(Body::from(body.to_string())).unwrap()).await
}

/// A whole answer: prompt, answer, and the message that a client keeps of it.
async fn first(server: &Server, key: Option<&str>, messages: &Value) -> (Vec<u64>, Vec<u64>, Value) {
    let answer = ask(server, key, &body(messages)).await.json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
    (ids(&answer["prompt_token_ids"]), ids(&choice["token_ids"]), choice["message"].clone())
}

async fn prompt(server: &Server, key: Option<&str>, messages: &Value) -> Vec<u64> {
    ids(&ask(server, key, &body(messages)).await.json()["prompt_token_ids"])
}

fn history(message: &Value) -> Value {
    let id = message["tool_calls"][0]["id"].clone();
    json!([
        {"role": "user", "content": "Where?"}, message, {"role": "tool", "tool_call_id": id, "content": "there"},
    ])
}

fn asked() -> Value {
    json!([{"role": "user", "content": "Where?"}])
}

/// What a client does to a message.
type Edit = fn(&mut Value);

/// What a server that never answered before makes of the history.
async fn canonical(format: &str, messages: &Value) -> Vec<u64> {
    prompt(&setup(format).start(), None, messages).await
}

async fn metric(server: &Server, form: &str) -> u64 {
    let text = server.metrics().await;
    let line = text
        .lines()
        .find(|line| {
            line.starts_with("ctxserve:history_turns_total") && line.contains(&format!("\"{form}\""))
        })
        .unwrap_or_else(|| panic!("{text}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

/// HAR-07, HAR-15: the prompt of each step of a tool loop is the one before and its answer, and then what is new; also if the
/// client keeps nothing but the calls, or keeps arguments as objects.
#[tokio::test]
async fn har_07_a_loop_goes_on_token_for_token() {
    for format in ["harmony", "hermes"] {
        let edits: [(&str, Edit); 4] = [
            ("as it is", |_| {}),
            ("without reasoning", |message| {
                let fields = message.as_object_mut().unwrap();
                fields.remove("reasoning");
                fields.remove("reasoning_content");
            }),
            ("content instead of null", |message| message["content"] = json!("")),
            ("arguments written anew", |message| {
                let function = &mut message["tool_calls"][0]["function"];
                let value: Value = serde_json::from_str(function["arguments"].as_str().unwrap()).unwrap();
                function["arguments"] = value;
            }),
        ];
        for (what, edit) in edits {
            let server = setup(format).start();
            let (prompt_ids, answer_ids, mut message) = first(&server, None, &asked()).await;
            edit(&mut message);
            let next = prompt(&server, None, &history(&message)).await;
            let before = [prompt_ids, answer_ids].concat();
            assert!(next.starts_with(&before), "{format}, {what}:\n{next:?}\n{before:?}");
            assert_eq!((metric(&server, "replayed").await, metric(&server, "canonical").await), (1, 0));
            let counted = server.post("/tokenize", &body(&history(&message))).await.json();
            assert_eq!(ids(&counted["tokens"]), next, "{format}, {what}");
        }
    }
}

/// HAR-07: streamed answers are kept as whole ones are, under the ids of calls that the stream told.
#[tokio::test]
async fn har_07_streamed_turns_are_kept() {
    for format in ["harmony", "hermes"] {
        let server = setup(format).start();
        let streamed = merged(body(&asked()), json!({"stream": true, "include_reasoning": false}));
        let frames = ask(&server, None, &streamed).await.frames();
        let joined = join(&frames, 0);
        assert_eq!(joined.reasoning, None);
        let (name, arguments) = &joined.calls[0];
        let call = json!({"id": joined.call_ids[0], "type": "function", "function": {"name": name, "arguments": arguments}});
        let message = json!({"role": "assistant", "tool_calls": [call]});
        let next = prompt(&server, None, &history(&message)).await;
        let mut before = ids(&frames[0]["prompt_token_ids"]);
        before.extend(ids(&json!(joined.token_ids)));
        assert!(next.starts_with(&before), "{format}");
    }
}

/// HAR-07: what was changed is rendered as it was sent.
#[tokio::test]
async fn har_07_changed_turns_take_the_canonical_form() {
    for format in ["harmony", "hermes"] {
        let edits: [Edit; 5] = [
            |message| message["tool_calls"][0]["function"]["arguments"] = json!("{\"q\": \"tea\", \"n\": 1}"),
            |message| message["tool_calls"][0]["function"]["name"] = json!("g"),
            |message| message["content"] = json!("Aha."),
            |message| message["reasoning_content"] = json!("Something else."),
            |message| {
                let calls = message["tool_calls"].as_array_mut().unwrap();
                let mut second = calls[0].clone();
                second["id"] = json!("another");
                calls.push(second);
            },
        ];
        for edit in edits {
            let server = setup(format).start();
            let (.., mut message) = first(&server, None, &asked()).await;
            edit(&mut message);
            let history = history(&message);
            assert_eq!(prompt(&server, None, &history).await, canonical(format, &history).await, "{message}");
            assert_eq!((metric(&server, "replayed").await, metric(&server, "canonical").await), (0, 1));
        }
    }
}

/// HAR-07: a turn is repeated for the key that it was made for and for no other, whose prompt says what that client sent.
#[tokio::test]
async fn har_07_turns_of_one_key_are_unknown_to_another() {
    for format in ["harmony", "hermes"] {
        let mut setup = setup(format);
        setup.server.api_keys = ctxserve_server::ApiKeys::new(["one", "two"]);
        setup.server.metrics_without_key = true;
        let server = setup.start();
        let (prompt_ids, answer_ids, mut message) = first(&server, Some("one"), &asked()).await;
        let fields = message.as_object_mut().unwrap();
        fields.remove("reasoning");
        fields.remove("reasoning_content");
        let history = history(&message);
        let theirs = prompt(&server, Some("two"), &history).await;
        assert_eq!(theirs, canonical(format, &history).await);
        let mine = prompt(&server, Some("one"), &history).await;
        assert!(mine.starts_with(&[prompt_ids, answer_ids].concat()));
    }
}

/// HAR-07: malformed turns, cut ones, and those of a server without memory for them take the canonical form.
#[tokio::test]
async fn har_07_only_well_formed_turns_are_kept() {
    let calls = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"q\": 1}";
    type Change = fn(&mut Setup);
    let cases: [(String, Change, Value); 5] = [
        // A doubled channel, a stray end, JSON with something behind it.
        (format!("<|channel|>analysis{calls}<|call|>"), |_| {}, json!({})),
        (format!("<|end|><|start|>assistant{calls}<|call|>"), |_| {}, json!({})),
        (format!("{calls} ]<|call|>"), |_| {}, json!({})),
        // Ended by a string of the client's, behind a whole call that no token ended.
        (
            "<|channel|>commentary<|message|>Well. Stop here<|end|>".to_owned(),
            |_| {},
            json!({"stop": "Stop"}),
        ),
        (format!("{calls}<|call|>"), |setup| setup.server.limits.max_turn_bytes = 0, json!({})),
    ];
    for (line, change, extra) in cases {
        let mut setup = setup("harmony");
        setup.lines[0] = odd(&setup.tokenizer, &line);
        change(&mut setup);
        let server = setup.start();
        let answer = ask(&server, None, &merged(body(&asked()), extra)).await.json();
        let message = answer["choices"][0]["message"].clone();
        let mut history = history(&message);
        if message["tool_calls"].is_null() {
            history[2] = json!({"role": "user", "content": "And?"});
        }
        let next = prompt(&server, None, &history).await;
        assert_eq!(next, canonical("harmony", &history).await, "{line}");
        assert_eq!(metric(&server, "replayed").await, 0, "{line}");
    }
}

/// HAR-07, HAR-15: behind an answer the analysis goes as ever, the answer's ids stay, known by its words alone.
#[tokio::test]
async fn har_07_answers_are_known_by_their_words() {
    for format in ["harmony", "hermes"] {
        let server = setup(format).start();
        let (.., message) = first(&server, None, &asked()).await;
        let mut messages = history(&message);
        let answer = ask(&server, None, &body(&messages)).await.json();
        let choice = whole(&answer["choices"][0]);
        assert_eq!(choice.content.as_deref(), Some("It is there."));
        let said = json!({"role": "assistant", "content": choice.content});
        messages.as_array_mut().unwrap().extend([said, json!({"role": "user", "content": "Sure?"})]);
        let next = prompt(&server, None, &messages).await;
        let answer_ids = ids(&json!(choice.token_ids));
        let tail = &answer_ids[answer_ids.len() - "It is there.".len() - 1..answer_ids.len() - 1];
        let has = |ids: &[u64]| ids.windows(tail.len()).any(|window| window == tail);
        let plain = canonical(format, &messages).await;
        assert!(has(&next) && !has(&plain), "{format}");
        let text = |ids: Vec<u64>| {
            let ids: Vec<u32> = ids.iter().map(|id| u32::try_from(*id).unwrap()).collect();
            server.tokenizer.decode(&ids, false)
        };
        let (next, plain) = (text(next), text(plain));
        assert!(!next.contains("Now I know") && !plain.contains("Now I know"), "{next}");
        assert_eq!(metric(&server, "replayed").await, 3);
    }
}
