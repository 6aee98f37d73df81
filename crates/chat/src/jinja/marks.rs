//! Telling clients' text from the template's, through any template.
//!
//! A template makes one string of both, and only its own part may become control tokens. So characters are put into
//! clients' strings beforehand that stand nowhere else, and are taken out again when the result is cut into control
//! tokens and text. They stand where they break every control token's spelling that has a character of the client's:
//!
//! - behind a character that a spelling begins with: none begins in a client's string;
//! - before a character that a spelling ends with: none ends there;
//! - within a string that is itself the inside of a spelling: none that the template begins and ends goes through it.
//!
//! The marks are one of Unicode's noncharacters, one that this conversation and its template do not use.

use ctxserve_core::TokenId;

use crate::Tokenizer;

/// U+FDD0 to U+FDEF, which text for interchange does not have.
const FIRST_MARK: u32 = 0xfdd0;
const MARKS: u32 = 32;

/// Whether the character may be a mark.
pub(super) fn is_mark(c: char) -> bool {
    (FIRST_MARK..FIRST_MARK + MARKS).contains(&u32::from(c))
}

/// Which marks strings have already, a bit each.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen(u32);

impl Seen {
    /// Looks through one more string.
    pub(crate) fn add(&mut self, text: &str) {
        // All of them begin with the bytes EF B7.
        if text.as_bytes().windows(2).any(|pair| pair == [0xef, 0xb7]) {
            for c in text.chars().filter(|c| is_mark(*c)) {
                self.0 |= 1 << (u32::from(c) - FIRST_MARK);
            }
        }
    }

    fn free(self) -> Option<char> {
        char::from_u32(FIRST_MARK + self.0.trailing_ones()).filter(|c| is_mark(*c))
    }
}

/// Where marks belong, for one tokenizer's control tokens.
#[derive(Clone, Debug)]
pub(crate) struct Marks {
    first: Vec<char>,
    last: Vec<char>,
    /// Spellings without their first and last character.
    insides: Vec<String>,
    /// Of those, the bytes of the longest.
    longest: usize,
}

impl Marks {
    pub(crate) fn new(tokenizer: &Tokenizer) -> Self {
        let (mut first, mut last, mut insides) = (Vec::new(), Vec::new(), Vec::new());
        for (name, _) in tokenizer.control_tokens() {
            let mut chars = name.chars();
            first.extend(chars.next());
            last.extend(chars.next_back());
            insides.push(chars.as_str().to_owned());
        }
        for list in [&mut first, &mut last] {
            list.sort_unstable();
            list.dedup();
        }
        let longest = insides.iter().map(String::len).max().unwrap_or(0);
        Self { first, last, insides, longest }
    }

    /// Marks of a kind that was not seen; `None` if all were.
    pub(crate) fn choose(&self, seen: Seen) -> Option<Marking<'_>> {
        Some(Marking { marks: self, mark: seen.free()? })
    }
}

/// Marks of one kind.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Marking<'a> {
    marks: &'a Marks,
    mark: char,
}

impl Marking<'_> {
    /// A client's string, marked.
    pub(crate) fn text(&self, text: &str) -> String {
        let marks = self.marks;
        let is_inside = !text.is_empty()
            && text.len() <= marks.longest
            && marks.insides.iter().any(|inside| inside.contains(text));
        let mut out = String::with_capacity(text.len());
        for (at, c) in text.chars().enumerate() {
            if marks.last.contains(&c) || (is_inside && at == 0 && text.len() == c.len_utf8()) {
                out.push(self.mark);
            }
            out.push(c);
            if marks.first.contains(&c) || (is_inside && at == 0) {
                out.push(self.mark);
            }
        }
        out
    }

    /// A key of a client's object, marked. Templates look values up by key, so a key that is the inside of a spelling
    /// stays as it is.
    pub(crate) fn key(&self, key: &str) -> String {
        let mut out = String::with_capacity(key.len());
        for c in key.chars() {
            if self.marks.last.contains(&c) {
                out.push(self.mark);
            }
            out.push(c);
            if self.marks.first.contains(&c) {
                out.push(self.mark);
            }
        }
        out
    }

    /// Text without its marks.
    pub(crate) fn clean(&self, text: &str) -> String {
        text.replace(self.mark, "")
    }

    /// Ids of rendered text: control tokens where the template wrote them, text elsewhere.
    pub(crate) fn ids(&self, rendered: &str, tokenizer: &Tokenizer) -> Vec<TokenId> {
        let (mut ids, mut rest) = (Vec::new(), rendered);
        while let Some((at, len, id)) = tokenizer.find_control(rest) {
            tokenizer.encode_into(&self.clean(&rest[..at]), &mut ids);
            // A spelling of one character cannot be broken by marks: never a token.
            if len > rest[at..].chars().next().map_or(0, char::len_utf8) {
                ids.push(id);
            } else {
                tokenizer.encode_into(&rest[at..at + len], &mut ids);
            }
            rest = &rest[at + len..];
        }
        tokenizer.encode_into(&self.clean(rest), &mut ids);
        ids
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::qwen_tokenizer;
    use proptest::prelude::*;

    #[test]
    fn a_mark_is_one_that_is_not_in_use() {
        let marks = Marks::new(&qwen_tokenizer());
        let mut seen = Seen::default();
        seen.add("a\u{fdd0}b \u{fdd1}\u{fdd3}\u{fdcf}\u{fdf0}");
        assert_eq!(marks.choose(seen).unwrap().mark, '\u{fdd2}');
        seen.add(&('\u{fdd0}'..='\u{fdee}').collect::<String>());
        assert_eq!(marks.choose(seen).unwrap().mark, '\u{fdef}');
        seen.add("\u{fdef}");
        assert!(marks.choose(seen).is_none());
    }

    #[test]
    fn ordinary_text_is_left_alone() {
        let marks = Marks::new(&qwen_tokenizer());
        let marking = marks.choose(Seen::default()).unwrap();
        for text in ["", "Hello, world!\n\n", "{\"a\": [1, 2]}", "日本 🦀", "the end of text"] {
            assert_eq!(marking.text(text), text);
        }
        assert_eq!(marking.key("im_end"), "im_end");
    }

    /// Strings that have most chances to be part of a control token's spelling.
    fn piece() -> impl Strategy<Value = String> {
        let names: Vec<String> = qwen_tokenizer().control_tokens().map(|(name, _)| name.to_owned()).collect();
        (prop::sample::select(names), any::<(prop::sample::Index, prop::sample::Index)>(), any::<bool>())
            .prop_map(|(name, (from, to), cut)| {
                let (from, to) = (from.index(name.len() + 1), to.index(name.len() + 1));
                if cut { name[from.min(to)..from.max(to)].to_owned() } else { name }
            })
    }

    proptest! {
        /// However template and client alternate, no character of the client's is in a control token, and all of the
        /// text is there.
        #[test]
        fn no_control_token_has_a_client_s_character(
            pieces in prop::collection::vec((piece(), any::<bool>()), 1..9),
        ) {
            let tokenizer = qwen_tokenizer();
            let marks = Marks::new(&tokenizer);
            let marking = marks.choose(Seen::default()).unwrap();
            let rendered: String = pieces
                .iter()
                .map(|(text, client)| if *client { marking.text(text) } else { text.clone() })
                .collect();
            let ids = marking.ids(&rendered, &tokenizer);
            let whole: String = pieces.iter().map(|(text, _)| text.as_str()).collect();
            prop_assert_eq!(tokenizer.decode(&ids, false), whole);
            // Characters that control tokens may take up: the template's.
            let owners: Vec<bool> =
                pieces.iter().flat_map(|(text, client)| std::iter::repeat_n(*client, text.len())).collect();
            let mut at = 0;
            for id in ids {
                let len = tokenizer.token_bytes(id).unwrap().len();
                let mine = owners[at..at + len].iter().all(|client| !client);
                prop_assert!(mine || !tokenizer.is_control(id), "{:?} in {:?}", tokenizer.token_text(id), pieces);
                at += len;
            }
        }
    }
}
