//! `render` and `parse`: what goes into the model and what comes out of it, as JSON.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use ctxserve_chat::{ChatFormat, Collector, ParserOptions, Tokenizer, end_of};
use ctxserve_core::TokenId;
use ctxserve_server::{PromptDate, ServerConfig, conversation_from_json};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use crate::cli::ToolArgs;
use crate::lines::sequences;
use crate::model::{DEFAULT_FORMAT, open_format, tokenizer_of};
use crate::profile;

/// Prints the prompt of a chat request.
///
/// # Errors
/// A request that the API would refuse, or input that cannot be read.
pub fn render(args: &ToolArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let (tokenizer, format) = open(args)?;
    let mut request = Vec::new();
    input(args)?.read_to_end(&mut request).context("reading the request")?;
    let config = ServerConfig { prompt_date: prompt_date(&request), ..ServerConfig::default() };
    let conversation = conversation_from_json(&config, &*format, &request).map_err(|error| {
        let place = error.param.map(|param| format!(" ({param})")).unwrap_or_default();
        anyhow::anyhow!("the request is refused{place}: {}", error.message)
    })?;
    let ids = format.render(&conversation)?;
    let text = tokenizer.decode(&ids, false);
    writeln!(out, "{}", json!({"token_ids": ids, "text": text}))?;
    Ok(())
}

/// `current_date` of the request: a fixed date, or null for none. The API has no such field and takes today.
fn prompt_date(request: &[u8]) -> PromptDate {
    #[derive(Deserialize)]
    struct Dated {
        #[serde(default, deserialize_with = "present")]
        current_date: Option<Option<String>>,
    }
    fn present<'de, D: Deserializer<'de>>(source: D) -> Result<Option<Option<String>>, D::Error> {
        Option::deserialize(source).map(Some)
    }
    // A body that does not read is refused elsewhere, with a better message.
    match serde_json::from_slice::<Dated>(request).ok().and_then(|dated| dated.current_date) {
        None => PromptDate::Today,
        Some(None) => PromptDate::Omitted,
        Some(Some(date)) => PromptDate::Fixed(date),
    }
}

/// Prints one message per line of input. False when some line was no token sequence.
///
/// # Errors
/// Input that cannot be read or output that cannot be written.
pub fn parse(args: &ToolArgs, out: &mut impl Write) -> anyhow::Result<bool> {
    let (tokenizer, format) = open(args)?;
    let mut all_read = true;
    for line in sequences(input(args)?, &tokenizer) {
        let (number, sequence) = line.context("reading token sequences")?;
        let answer = match sequence {
            Ok(ids) => message(&*format, &ids, number),
            Err(what) => {
                all_read = false;
                json!({"error": what, "line": number})
            }
        };
        writeln!(out, "{answer}")?;
    }
    Ok(all_read)
}

/// The message that a sequence of ids is.
fn message(format: &dyn ChatFormat, ids: &[TokenId], line: usize) -> Value {
    let mut parser = format.parser(ParserOptions::default());
    let mut deltas = Vec::new();
    for &id in ids {
        parser.push(id, &mut deltas);
    }
    let outcome = parser.finish(end_of(ids, format.stop_ids()), &mut deltas);
    let mut collector = Collector::default();
    deltas.iter().for_each(|delta| collector.add(delta));
    let message = collector.into_message();
    let calls: Vec<Value> = message
        .calls
        .iter()
        .enumerate()
        .map(|(index, call)| {
            json!({"name": call.name, "arguments": call.arguments, "id": format!("call_{line}_{index}")})
        })
        .collect();
    json!({
        "content": message.content,
        "reasoning": message.reasoning,
        "tool_calls": calls,
        "finish_reason": outcome.finish.as_str(),
        "recovery": outcome.recoveries,
    })
}

fn open(args: &ToolArgs) -> anyhow::Result<(Arc<Tokenizer>, Arc<dyn ChatFormat>)> {
    let (tokenizer, dir) = tokenizer_of(args.model.as_deref())?;
    let profile = args.model.as_deref().map(profile::find).transpose()?.flatten();
    let of_profile = profile.as_ref().and_then(|(_, values)| values.text("chat-format"));
    let name = args.format.as_deref().or(of_profile).unwrap_or(DEFAULT_FORMAT);
    let format = open_format(name, &tokenizer, dir.as_deref(), args.template.as_deref())?;
    Ok((tokenizer, format))
}

fn input(args: &ToolArgs) -> anyhow::Result<Box<dyn BufRead>> {
    Ok(match &args.input {
        Some(path) => Box::new(BufReader::new(open_file(path)?)),
        None => Box::new(BufReader::new(io::stdin())),
    })
}

fn open_file(path: &Path) -> anyhow::Result<File> {
    File::open(path).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(lines: &str) -> (bool, Vec<Value>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lines.jsonl");
        std::fs::write(&path, lines).unwrap();
        let args = ToolArgs { model: None, format: None, template: None, input: Some(path) };
        let mut out = Vec::new();
        let all_read = parse(&args, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        (all_read, text.lines().map(|line| serde_json::from_str(line).unwrap()).collect())
    }

    const FINAL: &str = r#"{"segments":[{"control":"<|channel|>"},{"text":"final"},{"control":"<|message|>"},{"text":"Hi"},{"control":"<|return|>"}]}"#;
    const CALL: &str = r#"{"segments":[{"control":"<|channel|>"},{"text":"analysis"},{"control":"<|message|>"},{"text":"Hm"},{"control":"<|end|>"},{"control":"<|start|>"},{"text":"assistant to=functions.f"},{"control":"<|channel|>"},{"text":"commentary "},{"control":"<|constrain|>"},{"text":"json"},{"control":"<|message|>"},{"text":"{\"a\":1}"},{"control":"<|call|>"}]}"#;

    #[test]
    fn messages_come_out_one_a_line() {
        let (all_read, found) = run(&format!("{FINAL}\n{CALL}\n"));
        assert!(all_read);
        assert_eq!(
            found[0],
            json!({"content": "Hi", "reasoning": null, "tool_calls": [], "finish_reason": "stop", "recovery": []})
        );
        assert_eq!(found[1]["reasoning"], "Hm");
        assert_eq!(found[1]["finish_reason"], "tool_calls");
        let call = &found[1]["tool_calls"][0];
        assert_eq!((call["name"].as_str(), call["arguments"].as_str()), (Some("f"), Some("{\"a\":1}")));
        assert!(call["id"].as_str().is_some_and(|id| id.starts_with("call_")));
    }

    #[test]
    fn a_date_is_fixed_left_out_or_today_s() {
        assert_eq!(prompt_date(b"{}"), PromptDate::Today);
        assert_eq!(prompt_date(b"{\"current_date\": null}"), PromptDate::Omitted);
        assert_eq!(
            prompt_date(b"{\"current_date\": \"2026-05-12\"}"),
            PromptDate::Fixed("2026-05-12".to_owned())
        );
    }

    #[test]
    fn a_sequence_without_a_stop_token_was_cut() {
        let cut = FINAL.replace(r#",{"control":"<|return|>"}"#, "");
        assert_eq!(run(&cut).1[0]["finish_reason"], "length");
    }

    #[test]
    fn bad_lines_are_reported_in_place() {
        let (all_read, found) = run(&format!("{{\n{FINAL}\n"));
        assert!(!all_read);
        assert_eq!(found[0]["line"], 1);
        assert!(found[0]["error"].is_string());
        assert_eq!(found[1]["content"], "Hi");
    }
}
