//! Prompts of the hermes format: against transformers, and what no template may let through.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests, too")]

mod injection;
#[path = "../support/request.rs"]
mod request;
mod rules;

use std::sync::Arc;

use ctxserve_chat::testing::qwen_tokenizer;
use ctxserve_chat::{ChatFormat, Conversation, PromptFiles, RenderError, formats};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

/// A conversation, and what transformers makes of it.
#[derive(Deserialize)]
struct Golden {
    name: String,
    template: String,
    request: Box<RawValue>,
    text: String,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Tools<'a> {
    #[serde(borrow)]
    tools: Option<Vec<&'a RawValue>>,
}

fn goldens() -> Vec<Golden> {
    let lines = include_str!("../data/hermes_prompts.jsonl").lines();
    lines.map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn with_template(source: &str) -> Arc<dyn ChatFormat> {
    let files = PromptFiles { chat_template: Some(source.to_owned()), ..PromptFiles::default() };
    formats::open("hermes", qwen_tokenizer(), &files).unwrap()
}

fn hermes() -> Arc<dyn ChatFormat> {
    formats::open("hermes", qwen_tokenizer(), &PromptFiles::default()).unwrap()
}

fn text_of(format: &dyn ChatFormat, conversation: &Conversation) -> Result<String, RenderError> {
    Ok(qwen_tokenizer().decode(&format.render(conversation)?, false))
}

fn named_template(name: &str) -> Arc<dyn ChatFormat> {
    let files = PromptFiles {
        chat_template: match name {
            "default" => None,
            "thinking" => Some(include_str!("../data/templates/thinking.jinja").to_owned()),
            "features" => Some(include_str!("../data/templates/features.jinja").to_owned()),
            other => panic!("{other}"),
        },
        tokenizer_config: Some(
            json!({ "bos_token": "<|endoftext|>", "eos_token": { "content": "<|im_end|>" } }),
        ),
    };
    formats::open("hermes", qwen_tokenizer(), &files).unwrap()
}

#[test]
fn prompts_equal_transformers() {
    let goldens = goldens();
    assert!(goldens.len() >= 40);
    let mut failures = Vec::new();
    for golden in &goldens {
        let format = named_template(&golden.template);
        let request: Value = serde_json::from_str(golden.request.get()).unwrap();
        let tools: Tools<'_> = serde_json::from_str(golden.request.get()).unwrap();
        let tools: Vec<String> =
            tools.tools.into_iter().flatten().map(|tool| tool.get().to_owned()).collect();
        let conversation = request::conversation(&request, &tools);
        let is_closed = request["add_generation_prompt"] == false;
        let ids = if is_closed { format.render_history(&conversation) } else { format.render(&conversation) };
        let ids = ids.unwrap_or_else(|error| panic!("{}: {error}", golden.name));
        if ids != golden.ids {
            let text = qwen_tokenizer().decode(&ids, false);
            failures.push(format!("{}\n     got {text:?}\n    want {:?}", golden.name, golden.text));
        }
    }
    assert!(failures.is_empty(), "{} prompts differ:\n{}", failures.len(), failures.join("\n"));
}
