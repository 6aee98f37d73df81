//! Stop strings over streamed text.

/// One stop string as a Knuth-Morris-Pratt automaton: linear in the text whatever the strings are.
#[derive(Clone, Debug)]
struct Pattern {
    text: Vec<u8>,
    /// For each prefix length, the longest proper prefix of it that is also its suffix.
    fallback: Vec<usize>,
    /// How many bytes of `text` the text so far ends with.
    matched: usize,
}

impl Pattern {
    fn new(text: &str) -> Self {
        let text = text.as_bytes().to_vec();
        let mut fallback = vec![0; text.len() + 1];
        let mut length = 0;
        for end in 1..text.len() {
            while length > 0 && text[end] != text[length] {
                length = fallback[length];
            }
            if text[end] == text[length] {
                length += 1;
            }
            fallback[end + 1] = length;
        }
        Self { text, fallback, matched: 0 }
    }

    /// Takes one byte; whether the whole string has just been seen.
    fn step(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.text.get(self.matched) != Some(&byte) {
            self.matched = self.fallback[self.matched];
        }
        if self.text.get(self.matched) == Some(&byte) {
            self.matched += 1;
        }
        self.matched == self.text.len()
    }
}

/// Text that may be shown, and the stop string that ended it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Released {
    pub(crate) text: String,
    /// Index of the stop string that matched. Nothing must be pushed after.
    pub(crate) matched: Option<usize>,
}

/// Holds back what may be the beginning of a stop string and cuts the text at the first match: the one that
/// ends first, and of several that end together the longest. The outcome does not depend on how the text is cut
/// into pushes.
#[derive(Clone, Debug)]
pub(crate) struct StopMatcher {
    patterns: Vec<Pattern>,
    /// Keep the matched string in the text.
    include: bool,
    /// Not yet shown: a suffix of the text that is a prefix of some stop string.
    held: String,
}

impl StopMatcher {
    /// None of `strings` is empty.
    pub(crate) fn new(strings: &[String], include: bool) -> Self {
        Self { patterns: strings.iter().map(|s| Pattern::new(s)).collect(), include, held: String::new() }
    }

    /// Takes more text.
    pub(crate) fn push(&mut self, text: &str) -> Released {
        if self.patterns.is_empty() {
            return Released { text: text.to_owned(), matched: None };
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (at, byte) in text.bytes().enumerate() {
            let mut best: Option<(usize, usize)> = None;
            for (index, pattern) in self.patterns.iter_mut().enumerate() {
                if pattern.step(byte) && best.is_none_or(|(_, length)| pattern.text.len() > length) {
                    best = Some((index, pattern.text.len()));
                }
            }
            if let Some((index, length)) = best {
                let end = before + at + 1;
                self.held.truncate(if self.include { end } else { end - length });
                return Released { text: std::mem::take(&mut self.held), matched: Some(index) };
            }
        }
        let hold = self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - hold);
        Released { text: std::mem::replace(&mut self.held, rest), matched: None }
    }

    /// No more text comes: what was held back was no stop string.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn strings(list: &[&str]) -> Vec<String> {
        list.iter().map(|&s| s.to_owned()).collect()
    }

    /// Everything that a matcher shows of `chunks`, and what matched.
    fn run(stops: &[String], include: bool, chunks: &[&str]) -> (String, Option<usize>) {
        let mut matcher = StopMatcher::new(stops, include);
        let mut shown = String::new();
        for chunk in chunks {
            let released = matcher.push(chunk);
            shown.push_str(&released.text);
            if released.matched.is_some() {
                return (shown, released.matched);
            }
        }
        shown.push_str(&matcher.finish());
        (shown, None)
    }

    /// The definition, on the whole text.
    fn definition(stops: &[String], include: bool, text: &str) -> (String, Option<usize>) {
        let found = stops.iter().enumerate().filter_map(|(index, stop)| {
            let start = text.find(stop.as_str())?;
            Some((start + stop.len(), start, index))
        });
        match found.min() {
            Some((end, start, index)) => (text[..if include { end } else { start }].to_owned(), Some(index)),
            None => (text.to_owned(), None),
        }
    }

    /// Stop strings, chunks, what is shown, what matched.
    type Case = (&'static [&'static str], &'static [&'static str], &'static str, Option<usize>);

    #[test]
    fn table() {
        let cases: &[Case] = &[
            (&["STOP"], &["abcSTOPdef"], "abc", Some(0)),
            (&["STOP"], &["ab", "cS", "T", "OPd"], "abc", Some(0)),
            (&["STOP"], &["abcST", "x", "STO"], "abcSTxSTO", None),
            (&["aab"], &["aa", "ab"], "a", Some(0)),
            (&["abcd", "bc"], &["xab", "cd"], "xa", Some(1)),
            (&["c", "bc"], &["abc"], "a", Some(1)),
            (&["é"], &["caf", "é!"], "caf", Some(0)),
            (&["日本"], &["日", "日本語"], "日", Some(0)),
            (&[], &["a", "b"], "ab", None),
        ];
        for (stops, chunks, shown, matched) in cases {
            assert_eq!(
                run(&strings(stops), false, chunks),
                ((*shown).to_owned(), *matched),
                "{stops:?} {chunks:?}"
            );
        }
    }

    #[test]
    fn the_matched_string_can_be_kept() {
        assert_eq!(run(&strings(&["\n\n"]), true, &["a\n", "\nb"]), ("a\n\n".to_owned(), Some(0)));
    }

    /// OAI-12: no part of one shows.
    #[test]
    fn nothing_of_a_possible_stop_string_is_shown_early() {
        let mut matcher = StopMatcher::new(&strings(&["</answer>"]), false);
        assert_eq!(matcher.push("yes</ans").text, "yes");
        assert_eq!(matcher.push("wer").text, "");
        assert_eq!(matcher.push(" no").text, "</answer no");
    }

    proptest! {
        /// OAI-12: across tokens.
        #[test]
        fn any_chunking_meets_the_definition(
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            text in "[abcé]{0,40}",
            cuts in prop::collection::vec(0usize..40, 0..6),
            include: bool,
        ) {
            let mut bounds: Vec<usize> = cuts.into_iter().filter(|&c| text.is_char_boundary(c)).collect();
            bounds.extend([0, text.len()]);
            bounds.sort_unstable();
            let chunks: Vec<&str> = bounds.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            prop_assert_eq!(run(&stops, include, &chunks), definition(&stops, include, &text));
        }
    }
}
