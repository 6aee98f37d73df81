//! Running the parser over whole answers.

use std::sync::Arc;

use ctxserve_chat::{ChatFormat, Collector, Delta, End, ParsedMessage, ParserOptions, Tokenizer, formats};
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

pub(crate) fn format(tokenizer: &Arc<Tokenizer>) -> Arc<dyn ChatFormat> {
    formats::open("harmony", Arc::clone(tokenizer)).unwrap()
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
