//! HER-05: where an answer of the hermes format begins is told by the end of its prompt, whatever the request demands.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests should stop where they fail")]

mod common;

use common::{Setup, join, merged, request, whole};
use ctxserve_chat::PromptFiles;
use serde_json::{Value, json};

/// Templates of models that never think, of those that may, and of those that always do.
const INSTRUCT: Option<&str> = None;
const HYBRID: Option<&str> = Some(include_str!("../../chat/tests/data/templates/thinking.jinja"));
const ALWAYS: Option<&str> = Some(
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n<think>\n",
);

/// What the model writes in front of its answer, given how its prompt ends, and what of that is reasoning.
type Head = (&'static str, Option<&'static str>);

const NOTHING: Head = ("", None);
const GOES_ON: Head = ("Hm {\"a\" <tool.\n</think>\n\n", Some("Hm {\"a\" <tool."));
const OPENS: Head = ("<think>\nHm {\"a\" <tool.\n</think>\n\n", Some("Hm {\"a\" <tool."));
const OPENS_EMPTY: Head = ("<think>\n\n</think>\n\n", None);

const CALL: &str = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"q\": \"x\"}}\n</tool_call>";
const JSON: &str = "{\"ok\": true}";
const TEXT: &str = "It is there.";

/// Templates, what the request says of thinking, and what the model then does.
fn beginnings() -> Vec<(&'static str, Option<&'static str>, Value, Head)> {
    let on = json!({"chat_template_kwargs": {"enable_thinking": true}});
    let off = json!({"chat_template_kwargs": {"enable_thinking": false}});
    vec![
        ("instruct", INSTRUCT, json!({}), NOTHING),
        ("instruct, on", INSTRUCT, on.clone(), NOTHING),
        ("instruct, off", INSTRUCT, off.clone(), NOTHING),
        ("instruct that thinks", INSTRUCT, json!({}), OPENS),
        ("hybrid", HYBRID, json!({}), OPENS),
        ("hybrid that does not think", HYBRID, json!({}), NOTHING),
        ("hybrid that thinks nothing", HYBRID, json!({}), OPENS_EMPTY),
        ("hybrid, on", HYBRID, on.clone(), GOES_ON),
        ("hybrid, off", HYBRID, off.clone(), NOTHING),
        ("hybrid, effort high", HYBRID, json!({"reasoning_effort": "high"}), GOES_ON),
        ("hybrid, effort none", HYBRID, json!({"reasoning": {"effort": "none"}}), NOTHING),
        ("2507", ALWAYS, json!({}), GOES_ON),
        ("2507, on", ALWAYS, on, GOES_ON),
        ("2507, off", ALWAYS, off, GOES_ON),
    ]
}

/// Demands, and the answers that meet them.
fn demands() -> Vec<(&'static str, Value, &'static [&'static str])> {
    let tool = |strict: bool| {
        let schema = json!({"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"], "additionalProperties": false});
        json!([{"type": "function", "function": {"name": "f", "parameters": schema, "strict": strict}}])
    };
    let schema = json!({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": false});
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "a", "strict": true, "schema": schema}});
    let named = json!({"type": "function", "function": {"name": "f"}});
    vec![
        ("nothing", json!({}), &[TEXT]),
        ("tools", json!({"tools": tool(false)}), &[TEXT, CALL]),
        ("strict tools", json!({"tools": tool(true)}), &[TEXT, CALL]),
        ("no calls", json!({"tools": tool(false), "tool_choice": "none"}), &[TEXT]),
        ("required", json!({"tools": tool(false), "tool_choice": "required"}), &[CALL]),
        ("named", json!({"tools": tool(false), "tool_choice": named}), &[CALL]),
        ("schema", json!({"response_format": format}), &[JSON]),
        ("tools and schema", json!({"tools": tool(true), "response_format": format}), &[JSON, CALL]),
        (
            "required and schema",
            json!({"tools": tool(false), "tool_choice": "required", "response_format": format}),
            &[CALL],
        ),
    ]
}

/// HER-05, HAR-14: every kind of template with every demand, whole and streamed.
#[tokio::test]
async fn her_05_every_beginning_with_every_demand() {
    let mut tried = 0;
    for (kind, template, thinking, (head, reasoning)) in beginnings() {
        for (demand, fields, answers) in demands() {
            for answer in answers {
                let mut setup = Setup::hermes(&[&format!("{head}{answer}<|im_end|>")]);
                setup.files =
                    PromptFiles { chat_template: template.map(str::to_owned), ..PromptFiles::default() };
                let server = setup.start();
                let body = request(merged(thinking.clone(), fields.clone()));
                let at = format!("{kind}, {demand}, {answer}");
                let response = server.chat(&body).await;
                assert_eq!(response.status, 200, "{at}: {}", response.text);
                let one = whole(&response.json()["choices"][0]);
                assert_eq!(one.reasoning.as_deref(), reasoning, "{at}");
                if *answer == CALL {
                    assert_eq!(one.calls, [("f".to_owned(), "{\"q\": \"x\"}".to_owned())], "{at}");
                    assert_eq!(
                        (one.content.as_deref(), one.finish_reason.as_deref()),
                        (None, Some("tool_calls")),
                        "{at}"
                    );
                } else {
                    assert_eq!(one.calls, [], "{at}");
                    assert_eq!(
                        (one.content.as_deref(), one.finish_reason.as_deref()),
                        (Some(*answer), Some("stop")),
                        "{at}"
                    );
                }
                let mut streamed =
                    join(&server.chat(&merged(body, json!({"stream": true}))).await.frames(), 0);
                streamed.call_ids = one.call_ids.clone();
                assert_eq!(streamed, one, "{at}");
                tried += 1;
            }
        }
    }
    assert_eq!(tried, 14 * 12);
}

/// HER-05: an answer that is cut within the thinking is reasoning, if there was any, and never content.
#[tokio::test]
async fn her_05_cut_thinking_is_reasoning() {
    for (template, line) in [(HYBRID, "<think>\nHm, let me see"), (ALWAYS, "Hm, let me see")] {
        let mut setup = Setup::hermes(&[line]);
        setup.files = PromptFiles { chat_template: template.map(str::to_owned), ..PromptFiles::default() };
        let server = setup.start();
        for (_, fields, _) in demands() {
            let tokens = server.tokenizer.encode_with_control(line).len();
            let body = request(merged(fields, json!({"max_tokens": tokens})));
            let one = whole(&server.chat(&body).await.json()["choices"][0]);
            let found = (one.reasoning.as_deref(), one.content.as_deref(), one.finish_reason.as_deref());
            assert_eq!(found, (Some("Hm, let me see"), None, Some("length")));
        }
    }
}
