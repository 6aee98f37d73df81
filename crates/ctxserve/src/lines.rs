//! Token sequences in JSON lines: what `parse` reads and `replay:` plays.

use std::io::{self, BufRead};

use ctxserve_chat::{Segment, Tokenizer, segments_to_ids};
use ctxserve_core::TokenId;
use serde::Deserialize;

/// A line; unknown keys are for its author.
#[derive(Debug, Deserialize)]
struct Line {
    segments: Option<Vec<Segment>>,
    token_ids: Option<Vec<TokenId>>,
}

/// Longest line, bytes: some hundred thousand tokens.
const MAX_LINE: usize = 64 << 20;

/// Reads sequences one by one, with their line numbers from 1. Blank lines are skipped. A line that does not read
/// is an item with the reason, and reading goes on.
pub fn sequences<'a, R: BufRead + 'a>(
    mut input: R,
    tokenizer: &'a Tokenizer,
) -> impl Iterator<Item = io::Result<(usize, Result<Vec<TokenId>, String>)>> + 'a {
    let mut number = 0;
    let mut raw = Vec::new();
    std::iter::from_fn(move || {
        loop {
            raw.clear();
            match input.read_until(b'\n', &mut raw) {
                Ok(0) => return None,
                Ok(_) => number += 1,
                Err(error) => return Some(Err(error)),
            }
            if !raw.iter().all(u8::is_ascii_whitespace) {
                return Some(Ok((number, sequence(&raw, tokenizer))));
            }
        }
    })
}

fn sequence(raw: &[u8], tokenizer: &Tokenizer) -> Result<Vec<TokenId>, String> {
    if raw.len() > MAX_LINE {
        return Err(format!("the line has {} bytes, at most {MAX_LINE} are read", raw.len()));
    }
    let line: Line = serde_json::from_slice(raw).map_err(|error| error.to_string())?;
    match (line.segments, line.token_ids) {
        (Some(segments), None) => segments_to_ids(tokenizer, &segments).map_err(|error| error.to_string()),
        (None, Some(ids)) => Ok(ids),
        _ => Err("expected either \"segments\" or \"token_ids\"".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_one_by_one_and_bad_ones_do_not_stop_it() {
        let tokenizer = Tokenizer::from_bytes(ctxserve_chat::demo_tokenizer_json()).unwrap();
        let end = tokenizer.special_id("<|end|>").unwrap();
        let input = concat!(
            "{\"token_ids\": [5, 6]}\n",
            "\n",
            "not json\n",
            "{\"segments\": [{\"control\": \"<|end|>\"}], \"name\": \"for the reader\"}\n",
            "{}\n",
            "{\"token_ids\": [-1]}\n",
            "\u{0}\n",
            "{\"segments\": [{\"text\": \"<|end|>\"}, {\"bytes\": \"e2\"}]}",
        );
        let lines: Vec<_> = sequences(input.as_bytes(), &tokenizer).map(Result::unwrap).collect();
        let numbers: Vec<_> = lines.iter().map(|(number, _)| *number).collect();
        assert_eq!(numbers, [1, 3, 4, 5, 6, 7, 8]);
        assert_eq!(lines[0].1, Ok(vec![5, 6]));
        assert_eq!(lines[2].1, Ok(vec![end]));
        for bad in [1, 3, 4, 5] {
            assert!(lines[bad].1.is_err(), "{:?}", lines[bad]);
        }
        let text = lines[6].1.as_ref().unwrap();
        assert!(!text.is_empty() && !text.contains(&end));
    }
}
