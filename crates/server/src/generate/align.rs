//! Log-probabilities released together with the text of their tokens.

use std::collections::VecDeque;

use ctxserve_core::TokenLogprobs;

/// Queues the entries of content tokens by where their text begins, in bytes of the choice's content.
#[derive(Debug, Default)]
pub(crate) struct Alignment {
    /// Content bytes that the parser has produced.
    produced: usize,
    /// Content bytes that stop matching has let through.
    released: usize,
    waiting: VecDeque<(usize, TokenLogprobs)>,
}

impl Alignment {
    /// A token whose text is content, before its text is counted.
    pub(crate) fn token(&mut self, logprobs: Option<Box<TokenLogprobs>>) {
        if let Some(logprobs) = logprobs {
            self.waiting.push_back((self.produced, *logprobs));
        }
    }

    /// The parser produced content.
    pub(crate) fn produced(&mut self, bytes: usize) {
        self.produced += bytes;
    }

    /// Content was let through: the entries whose text has begun to show.
    pub(crate) fn released(&mut self, bytes: usize) -> Vec<TokenLogprobs> {
        self.released += bytes;
        let shown = self.waiting.iter().take_while(|(start, _)| *start < self.released).count();
        self.waiting.drain(..shown).map(|(_, entry)| entry).collect()
    }

    /// The content ended by itself: every entry that is left belongs to it (its bytes were cut characters).
    pub(crate) fn finish(&mut self) -> Vec<TokenLogprobs> {
        self.waiting.drain(..).map(|(_, entry)| entry).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ctxserve_core::TokenLogprob;

    fn entry(id: u32) -> Option<Box<TokenLogprobs>> {
        let sampled = TokenLogprob { id, logprob: -1.0 };
        Some(Box::new(TokenLogprobs { sampled, top: Vec::new() }))
    }

    fn ids(entries: &[TokenLogprobs]) -> Vec<u32> {
        entries.iter().map(|e| e.sampled.id).collect()
    }

    #[test]
    fn tokens_of_one_character_come_with_it() {
        let mut align = Alignment::default();
        align.token(entry(1));
        assert!(align.released(0).is_empty());
        align.token(entry(2));
        align.produced(4);
        assert_eq!(ids(&align.released(4)), [1, 2]);
    }

    #[test]
    fn held_back_text_holds_its_entries_back_and_a_cut_drops_them() {
        let mut align = Alignment::default();
        for (id, bytes) in [(1, 3), (2, 2), (3, 2)] {
            align.token(entry(id));
            align.produced(bytes);
        }
        assert_eq!(ids(&align.released(4)), [1, 2]);
        // The stop string began at byte 5: token 3 is never shown.
        assert!(align.released(1).is_empty());
    }

    #[test]
    fn the_end_releases_what_is_left() {
        let mut align = Alignment::default();
        align.token(entry(1));
        assert_eq!(ids(&align.finish()), [1]);
    }
}
