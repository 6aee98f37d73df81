//! Finding tags in free text, whatever tokens spell them.

use ctxserve_core::TokenId;

use super::vocabulary::Vocabulary;

/// Looks for tags byte by byte. A tag begins with `<` and has no other, so at most one is open.
#[derive(Clone, Debug, Default)]
pub(crate) struct Watch {
    /// What may become a tag.
    open: Vec<u8>,
}

impl Watch {
    /// Takes a byte; which of the tags it completed.
    pub(crate) fn push(&mut self, byte: u8, tags: &[&str]) -> Option<usize> {
        if byte == b'<' {
            self.open.clear();
        }
        self.open.push(byte);
        let found = tags.iter().position(|tag| tag.as_bytes() == self.open);
        if found.is_some() || !tags.iter().any(|tag| tag.as_bytes().starts_with(&self.open)) {
            self.open.clear();
        }
        found
    }

    /// Whether the text so far may become a tag.
    pub(crate) fn is_open(&self) -> bool {
        !self.open.is_empty()
    }

    /// Ordinary tokens that would complete a tag and go on behind it. What follows a tag is another state's, so these
    /// may not come.
    pub(crate) fn straddling(&self, tags: &[&str], vocabulary: &Vocabulary) -> Vec<TokenId> {
        let mut found = Vec::new();
        if !self.open.is_empty() {
            for tag in tags {
                if let Some(rest) = tag.as_bytes().strip_prefix(self.open.as_slice()) {
                    let whole = vocabulary.spelling(rest).len();
                    found.extend(&vocabulary.beginning_with(rest)[whole..]);
                }
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_found_however_they_are_begun() {
        let tags = ["</think>", "<tool_call>"];
        let mut watch = Watch::default();
        let mut found = Vec::new();
        for byte in b"a <think></thi</think> <<tool_call>x</tool_call>" {
            found.extend(watch.push(*byte, &tags));
        }
        assert_eq!(found, [0, 1]);
    }
}
