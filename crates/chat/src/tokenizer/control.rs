//! Finding control tokens in text that the server itself wrote.

use std::collections::HashMap;

use ctxserve_core::TokenId;

/// Names of control tokens by their first byte, longest first.
#[derive(Debug, Default)]
pub(super) struct ControlNames(HashMap<u8, Vec<(Box<str>, TokenId)>>);

impl ControlNames {
    pub(super) fn new<'a>(names: impl Iterator<Item = (&'a str, TokenId)>) -> Self {
        let mut by_first: HashMap<u8, Vec<(Box<str>, TokenId)>> = HashMap::new();
        for (name, id) in names {
            if let Some(first) = name.bytes().next() {
                by_first.entry(first).or_default().push((name.into(), id));
            }
        }
        for names in by_first.values_mut() {
            names.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
        }
        Self(by_first)
    }

    /// The first name in the text, the longest where several begin: where, how long, whose.
    pub(super) fn find(&self, text: &str) -> Option<(usize, usize, TokenId)> {
        if self.0.is_empty() {
            return None;
        }
        text.bytes().enumerate().find_map(|(at, byte)| {
            // A name begins with a whole character, so a match begins at one.
            let found = self.0.get(&byte)?.iter().find(|(name, _)| {
                text.as_bytes().get(at..).is_some_and(|rest| rest.starts_with(name.as_bytes()))
            })?;
            Some((at, found.0.len(), found.1))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_and_longest_is_found() {
        let names = ControlNames::new([("<a>", 1), ("<a>b", 2), ("é", 3), ("", 4)].into_iter());
        assert_eq!(names.find("x<a>"), Some((1, 3, 1)));
        assert_eq!(names.find("<<a>b<a>"), Some((1, 4, 2)));
        assert_eq!(names.find("ée"), Some((0, 2, 3)));
        assert_eq!(names.find("<a è"), None);
        assert_eq!(ControlNames::default().find("<a>"), None);
    }
}
