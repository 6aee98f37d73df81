//! Running the parser over whole answers.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::sync::Arc;

use ctxserve_chat::{
    ChatFormat, Collector, Delta, End, ParsedMessage, ParserOptions, PromptFiles, Tokenizer, formats,
};
use serde::Deserialize;

/// A whole answer, as the cases spell it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Answer {
    pub(crate) content: Option<String>,
    pub(crate) reasoning: Option<String>,
    pub(crate) tool_calls: Vec<Call>,
    pub(crate) finish_reason: String,
    pub(crate) recovery: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Call {
    pub(crate) name: String,
    pub(crate) arguments: String,
}

pub(crate) fn format(name: &str, tokenizer: &Arc<Tokenizer>) -> Arc<dyn ChatFormat> {
    formats::open(name, Arc::clone(tokenizer), &PromptFiles::default()).unwrap()
}

/// All deltas, the message they make, and the outcome.
pub(crate) fn parse(
    format: &dyn ChatFormat,
    ids: &[u32],
    end: End,
    options: ParserOptions,
) -> (Vec<Delta>, Answer) {
    let mut parser = format.parser(options);
    let mut deltas = Vec::new();
    for id in ids {
        parser.push(*id, &mut deltas);
    }
    let outcome = parser.finish(end, &mut deltas);
    let mut collector = Collector::default();
    deltas.iter().for_each(|delta| collector.add(delta));
    let ParsedMessage { content, reasoning, calls } = collector.into_message();
    let answer = Answer {
        content,
        reasoning,
        tool_calls: calls
            .into_iter()
            .map(|call| Call { name: call.name, arguments: call.arguments })
            .collect(),
        finish_reason: outcome.finish.as_str().to_owned(),
        recovery: outcome.recoveries.iter().map(|name| (*name).to_owned()).collect(),
    };
    (deltas, answer)
}

/// All that a client could see.
pub(crate) fn visible(answer: &Answer) -> String {
    let calls = answer.tool_calls.iter().map(|call| format!("{}\n{}\n", call.name, call.arguments));
    let calls: String = calls.collect();
    format!(
        "{}\n{}\n{calls}",
        answer.content.as_deref().unwrap_or(""),
        answer.reasoning.as_deref().unwrap_or("")
    )
}

/// The order that clients rely on.
pub(crate) fn check_order(deltas: &[Delta], finish: &str) {
    let mut calls: Vec<bool> = Vec::new();
    for delta in deltas {
        match delta {
            Delta::CallStart { index, name } => {
                assert_eq!(*index, calls.len());
                assert!(!name.is_empty());
                calls.push(false);
            }
            Delta::CallArguments { index, text } => {
                assert_eq!(calls.get(*index), Some(&false), "{deltas:?}");
                assert!(!text.is_empty());
            }
            Delta::CallEnd { index } => {
                assert_eq!(calls.get(*index), Some(&false), "{deltas:?}");
                calls[*index] = true;
            }
            Delta::Reasoning(text) => assert!(!text.is_empty()),
            Delta::Content(_) => {}
        }
    }
    if finish == "tool_calls" {
        assert!(calls.contains(&true));
    }
    // Only the last message can be cut, and then the answer is.
    let unfinished = calls.iter().filter(|done| !**done).count();
    assert!(unfinished == 0 || (unfinished == 1 && finish != "tool_calls") || calls.contains(&true));
}
