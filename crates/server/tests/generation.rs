//! Whole answers: stopping, counting, log-probabilities, choices, completions.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

mod common;

use common::{CONTEXT, Setup, merged, request, whole};
use serde_json::{Value, json};

fn answer(text: &str) -> String {
    format!(
        "<|channel|>analysis<|message|>STOP thinking<|end|><|start|>assistant<|channel|>final<|message|>{text}<|return|>"
    )
}

/// OAI-12.
#[tokio::test]
async fn stop_strings_see_visible_text_only() {
    let server = Setup::new(&[&answer("one STOP two")]).start();
    let one = server.chat(&request(json!({"stop": "STOP"}))).await.json();
    let choice = whole(&one["choices"][0]);
    assert_eq!(choice.content.as_deref(), Some("one "));
    assert_eq!(choice.reasoning.as_deref(), Some("STOP thinking"));
    assert_eq!(choice.finish_reason.as_deref(), Some("stop"));
    assert_eq!(choice.stop_reason, "STOP");
    let kept = json!({"stop": ["STOP"], "include_stop_str_in_output": true});
    let one = server.chat(&request(kept)).await.json();
    assert_eq!(whole(&one["choices"][0]).content.as_deref(), Some("one STOP"));
    // The match cancels: fewer tokens than the script has.
    let all = server.chat(&request(json!({}))).await.json();
    let count = |value: &Value| value["usage"]["completion_tokens"].as_u64().unwrap();
    assert!(count(&one) < count(&all));
}

/// OAI-12: nor in arguments.
#[tokio::test]
async fn stop_strings_do_not_cut_arguments() {
    let script = "<|channel|>commentary to=functions.f<|message|>{\"a\":\"STOP\"}<|call|>";
    let server = Setup::new(&[script]).start();
    let one = server.chat(&request(json!({"stop": "STOP"}))).await.json();
    let choice = whole(&one["choices"][0]);
    assert_eq!(choice.calls[0].1, "{\"a\":\"STOP\"}");
    assert_eq!(choice.finish_reason.as_deref(), Some("tool_calls"));
}

#[tokio::test]
async fn stop_token_ids_end_the_answer_without_their_text() {
    let server = Setup::new(&[&answer("abc!def")]).start();
    let bang = server.tokenizer.encode("abc!def");
    let id = *bang.iter().find(|&&id| server.tokenizer.token_bytes(id).unwrap().contains(&b'!')).unwrap();
    let text = server.tokenizer.token_text(id).unwrap();
    let before = "abc!def".split(&text).next().unwrap();
    let one = server.chat(&request(json!({"stop_token_ids": [id]}))).await.json();
    let choice = whole(&one["choices"][0]);
    assert_eq!(choice.content.as_deref(), (!before.is_empty()).then_some(before));
    assert_eq!(choice.stop_reason, id);
    assert_eq!(choice.finish_reason.as_deref(), Some("stop"));
    let kept = json!({"stop_token_ids": [id], "include_stop_str_in_output": true});
    let one = server.chat(&request(kept)).await.json();
    assert_eq!(whole(&one["choices"][0]).content.unwrap(), format!("{before}{text}"));
}

/// OAI-06.
#[tokio::test]
async fn usage_counts_prompt_once_and_reasoning_apart() {
    let server = Setup::new(&[&answer("hello")]).start();
    let script = server.tokenizer.encode_with_control(&answer("hello")).len();
    let reasoning = server.tokenizer.encode("STOP thinking").len();
    let one = server.chat(&request(json!({}))).await.json()["usage"].clone();
    assert_eq!(one["completion_tokens"], script);
    assert_eq!(one["prompt_tokens_details"]["cached_tokens"], 0);
    assert_eq!(one["completion_tokens_details"]["reasoning_tokens"], reasoning);
    let three = server.chat(&request(json!({"n": 3}))).await.json()["usage"].clone();
    assert_eq!(three["prompt_tokens"], one["prompt_tokens"]);
    assert_eq!(three["completion_tokens"], script * 3);
    assert_eq!(three["total_tokens"], script * 3 + one["prompt_tokens"].as_u64().unwrap() as usize);
}

/// OAI-09.
#[tokio::test]
async fn an_oversized_max_tokens_is_cut_to_the_context() {
    let long = answer(&"x ".repeat(CONTEXT));
    let server = Setup::new(&[&long]).start();
    for limit in [json!({}), json!({"max_tokens": u64::MAX}), json!({"max_completion_tokens": CONTEXT})] {
        let one = server.chat(&request(limit)).await.json();
        assert_eq!(one["choices"][0]["finish_reason"], "length");
        assert_eq!(one["usage"]["total_tokens"], CONTEXT);
    }
    let one = server.chat(&request(json!({"max_tokens": 3}))).await.json();
    assert_eq!(one["usage"]["completion_tokens"], 3);
    // Nothing visible was said: null, not an empty string.
    assert_eq!(one["choices"][0]["message"]["content"], Value::Null);
}

fn bytes_of(entries: &[Value]) -> Vec<u8> {
    let bytes = entries.iter().flat_map(|entry| entry["bytes"].as_array().unwrap());
    bytes.map(|byte| u8::try_from(byte.as_u64().unwrap()).unwrap()).collect()
}

/// OAI-17.
#[tokio::test]
async fn chat_logprobs_align_with_content() {
    let text = "Grüße 日本 🦀!";
    let server = Setup::new(&[&answer(text)]).start();
    let one = server.chat(&request(json!({"logprobs": true}))).await.json();
    let entries = whole(&one["choices"][0]).logprobs;
    assert_eq!(String::from_utf8(bytes_of(&entries)).unwrap(), text);
    assert!(entries.iter().all(|entry| entry["top_logprobs"] == json!([])));
    let one = server.chat(&request(json!({"logprobs": true, "top_logprobs": 1}))).await.json();
    let entries = whole(&one["choices"][0]).logprobs;
    assert!(entries.iter().all(|entry| entry["top_logprobs"][0]["bytes"] == entry["bytes"]));
    let one = server.chat(&request(json!({}))).await.json();
    assert_eq!(one["choices"][0]["logprobs"], Value::Null);
    // A cut by a stop string cuts the entries with it.
    let one = server.chat(&request(json!({"logprobs": true, "stop": "日"}))).await.json();
    let shown = whole(&one["choices"][0]);
    assert_eq!(String::from_utf8(bytes_of(&shown.logprobs)).unwrap(), "Grüße ");
}

#[tokio::test]
async fn completions_are_raw_text() {
    let script = answer("hello");
    let server = Setup::new(&[&script]).start();
    let body = json!({"prompt": "x", "max_tokens": 100});
    let one = server.complete(&body).await.json();
    assert_eq!(one["object"], "text_completion");
    let choice = &one["choices"][0];
    assert_eq!(choice["text"], server.tokenizer.decode(&server.tokenizer.encode_with_control(&script), true));
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["stop_reason"], Value::Null);
    let shown = server.complete(&merged(body.clone(), json!({"skip_special_tokens": false}))).await.json();
    assert_eq!(shown["choices"][0]["text"], script.strip_suffix("<|return|>").unwrap());
    let short = server.complete(&json!({"prompt": "x"})).await.json();
    assert_eq!(short["usage"]["completion_tokens"], 16, "OpenAI's default");
    assert_eq!(short["choices"][0]["finish_reason"], "length");
    let streamed = server.complete(&merged(body, json!({"stream": true}))).await.frames();
    let text: String = streamed.iter().map(|f| f["choices"][0]["text"].as_str().unwrap()).collect();
    assert_eq!(text, choice["text"].as_str().unwrap());
    assert_eq!(streamed.last().unwrap()["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn the_context_1_harness_reads_its_ids_back() {
    let script = "<|channel|>analysis<|message|>go<|end|><|start|>assistant to=functions.search_corpus<|channel|>commentary <|constrain|>json<|message|>{\"query\":\"q\"}<|call|>";
    let server = Setup::new(&[script]).start();
    let stop: Vec<u32> =
        ["<|return|>", "<|call|>"].iter().map(|text| server.tokenizer.special_id(text).unwrap()).collect();
    let prompt = server.tokenizer.encode_with_control("<|start|>user<|message|>hi<|end|>");
    let body = json!({"prompt": prompt, "stop_token_ids": stop, "return_token_ids": true, "max_tokens": 4096,
        "temperature": 1.0, "top_p": 0.9, "stream": false});
    let one = server.complete(&body).await.json();
    assert_eq!(one["choices"][0]["token_ids"], json!(server.tokenizer.encode_with_control(script)));
    assert_eq!(one["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn prompts_times_n_keep_their_order() {
    let server = Setup::new(&["a<|return|>", "b<|return|>", "c<|return|>", "d<|return|>"]).start();
    let body = json!({"prompt": ["p", "qq"], "n": 2, "echo": true});
    let one = server.complete(&body).await.json();
    let texts: Vec<_> = one["choices"].as_array().unwrap().iter().map(|c| c["text"].clone()).collect();
    assert_eq!(json!(texts), json!(["pa", "pb", "qqc", "qqd"]));
    let prompts = server.tokenizer.encode("p").len() + server.tokenizer.encode("qq").len();
    assert_eq!(one["usage"]["prompt_tokens"], prompts);
    let frames = server.complete(&merged(body, json!({"stream": true}))).await.frames();
    for (index, text) in texts.iter().enumerate() {
        let joined: String = frames
            .iter()
            .filter(|frame| frame["choices"][0]["index"] == index)
            .map(|frame| frame["choices"][0]["text"].as_str().unwrap())
            .collect();
        assert_eq!(json!(joined), *text);
    }
}

#[tokio::test]
async fn legacy_logprobs_add_up_to_the_text() {
    let script = "día<|end|> 🦀 ok<|return|>";
    let server = Setup::new(&[script]).start();
    let one = server.complete(&json!({"prompt": "x", "logprobs": 1, "max_tokens": 100})).await.json();
    let choice = &one["choices"][0];
    let lists = &choice["logprobs"];
    let count = lists["tokens"].as_array().unwrap().len();
    for list in ["token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(lists[list].as_array().unwrap().len(), count);
    }
    assert_eq!(lists["text_offset"][0], 0);
    let offsets: Vec<u64> =
        lists["text_offset"].as_array().unwrap().iter().map(|o| o.as_u64().unwrap()).collect();
    assert!(offsets.is_sorted());
    assert_eq!(count, server.tokenizer.encode_with_control(script).len(), "one entry a token");
    assert_eq!(choice["text"], "día 🦀 ok");
    assert_eq!(offsets[count - 1], 8, "the stop token stands after the text");
    let sampled = lists["tokens"][0].as_str().unwrap();
    assert!(lists["top_logprobs"][0].as_object().unwrap().contains_key(sampled));
}

/// HAR-09.
#[tokio::test]
async fn one_call_when_parallel_calls_are_off() {
    let script = "<|channel|>commentary to=functions.a<|message|>{}<|end|><|start|>assistant<|channel|>commentary to=functions.b<|message|>{}<|call|>";
    let server = Setup::new(&[script]).start();
    let both = server.chat(&request(json!({}))).await.json();
    assert_eq!(whole(&both["choices"][0]).calls.len(), 2);
    let one = server.chat(&request(json!({"parallel_tool_calls": false}))).await.json();
    let choice = whole(&one["choices"][0]);
    assert_eq!(choice.calls, [("a".to_owned(), "{}".to_owned())]);
    assert_eq!(choice.finish_reason.as_deref(), Some("tool_calls"));
}

#[tokio::test]
async fn tool_choice_none_turns_calls_into_text() {
    let script = "<|channel|>commentary to=functions.a<|message|>{\"x\":1}<|call|>";
    let server = Setup::new(&[script]).start();
    let one = server.chat(&request(json!({"tool_choice": "none"}))).await.json();
    let choice = whole(&one["choices"][0]);
    assert!(choice.calls.is_empty());
    assert!(choice.content.unwrap().contains("{\"x\":1}"));
    assert_eq!(choice.finish_reason.as_deref(), Some("stop"));
}

/// HAR-08: with no ids of the checkpoint's, and with others.
#[tokio::test]
async fn answers_end_at_the_format_s_tokens_whatever_the_checkpoint_says() {
    let call = "<|channel|>commentary to=functions.f<|message|>{}<|call|>";
    let ids = |text| common::tokenizer().encode_with_control(text);
    for eos in [Vec::new(), ids("z")] {
        for (script, end) in [("<|channel|>final<|message|>a<|return|>", "stop"), (call, "tool_calls")] {
            let mut setup =
                Setup::new(&[&format!("{script}<|start|>assistant<|channel|>final<|message|>more")]);
            setup.server.eos.clone_from(&eos);
            let one = setup.start().chat(&request(json!({}))).await.json();
            assert_eq!(one["choices"][0]["finish_reason"], end);
            assert_eq!(one["usage"]["completion_tokens"], ids(script).len());
        }
    }
}

#[tokio::test]
async fn ignore_eos_goes_on_to_the_limit() {
    let server = Setup::new(&["<|channel|>final<|message|>a<|return|>bcdefgh"]).start();
    let one = server.chat(&request(json!({"ignore_eos": true, "max_tokens": 6}))).await.json();
    assert_eq!(one["usage"]["completion_tokens"], 6);
    assert_eq!(one["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn parts_and_plain_text_are_one_prompt() {
    let server = Setup::new(&["<|return|>"]).start();
    let ids = |content: Value| {
        let body = json!({"messages": [{"role": "user", "content": content}]});
        let server = &server;
        async move { server.post("/tokenize", &body).await.json()["tokens"].clone() }
    };
    let text = ids(json!("ab")).await;
    assert_eq!(ids(json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])).await, text);
}
