//! What stands between the start of a message and its text.

use super::reader::Reader;
use super::recovery::Notes;
use super::words::{self, Channel};
use crate::work;

/// A header longer than this is text whose message token is missing.
const MAX_BYTES: usize = 512;

/// What a control token adds to [`MAX_BYTES`]' count, so that headers of control tokens alone are bounded too.
const CONTROL_BYTES: usize = 4;

/// What a header is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Item {
    /// Text, with the offsets at which its tokens end.
    Text(String, Vec<usize>),
    /// `<|channel|>`
    Channel,
    /// `<|constrain|>`
    Constrain,
    /// `<|start|>` once more.
    Start,
}

/// A header as it arrives.
#[derive(Clone, Debug, Default)]
pub(super) struct Items {
    items: Vec<Item>,
    bytes: usize,
}

impl Items {
    pub(super) fn push_text(&mut self, text: &str) {
        self.bytes += text.len();
        if let Some(Item::Text(all, ends)) = self.items.last_mut() {
            all.push_str(text);
            ends.push(all.len());
        } else {
            self.items.push(Item::Text(text.to_owned(), vec![text.len()]));
        }
    }

    pub(super) fn push_control(&mut self, item: Item) {
        self.bytes += CONTROL_BYTES;
        self.items.push(item);
    }

    pub(super) fn is_full(&self) -> bool {
        self.bytes > MAX_BYTES
    }

    /// Neither a control token nor a word.
    pub(super) fn is_blank(&self) -> bool {
        self.is_bare() && self.text().trim().is_empty()
    }

    /// No control token.
    pub(super) fn is_bare(&self) -> bool {
        self.items.iter().all(|item| matches!(item, Item::Text(..)))
    }

    /// All text, verbatim.
    pub(super) fn text(&self) -> String {
        let texts =
            self.items.iter().map(|item| if let Item::Text(text, _) = item { text.as_str() } else { "" });
        texts.collect()
    }

    /// Whether there is a channel token.
    pub(super) fn is_marked(&self) -> bool {
        self.items.contains(&Item::Channel)
    }
}

/// A header as understood.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) channel: Option<Channel>,
    /// The channel's name was spelt exactly.
    pub(super) exact: bool,
    /// Clean name of the function that the message is for.
    pub(super) function: Option<String>,
    /// Addressed to the user or to all.
    pub(super) to_user: bool,
    /// The author is not the assistant.
    pub(super) other_role: bool,
    /// The content type is `code`: the body need not be JSON.
    pub(super) code: bool,
    /// The role and the channel were one word.
    pub(super) glued: bool,
    /// Words that have no meaning in the header.
    pub(super) extra: String,
    /// Text that follows a header without message token.
    pub(super) rest: String,
    /// The rest is one word that can still grow into a header word.
    pub(super) fragment: bool,
    /// The one such word, if it can have been meant as a channel, an author or a content type.
    pub(super) unknown: String,
}

impl Header {
    /// Whether the rest begins as JSON does.
    pub(super) fn rest_is_json(&self) -> bool {
        begins_json(&self.rest)
    }
}

pub(super) fn begins_json(text: &str) -> bool {
    text.trim_start().starts_with(['{', '['])
}

/// Reads a header that the message token ended: every word has its slot.
pub(super) fn read_closed(items: &Items, explicit: bool, notes: &mut Notes) -> Header {
    work::count(items.bytes);
    let mut reader = Reader::new(explicit, notes);
    for item in &items.items {
        reader.item(item);
    }
    reader.end()
}

/// Reads a header that no message token ended: from the first word that cannot belong to it on, it is text.
pub(super) fn read_open(items: &Items, explicit: bool, notes: &mut Notes) -> Header {
    work::count(items.bytes);
    let mut reader = Reader::new(explicit, notes);
    let (controlled, tail) = match items.items.split_last() {
        Some((Item::Text(text, ends), before)) => (before, Some((text, ends))),
        _ => (items.items.as_slice(), None),
    };
    for item in controlled {
        reader.item(item);
    }
    if let Some((text, ends)) = tail {
        reader.tail(text, ends);
    }
    reader.end()
}

/// Whether plain text, with no control token yet, can still become a header. As soon as it cannot, it is an answer
/// without header, and streams.
pub(super) fn may_be_header(text: &str) -> bool {
    work::count(text.len());
    let is_partial = !text.ends_with(char::is_whitespace);
    let mut words = text.split_whitespace().peekable();
    let (mut is_first, mut awaits_name) = (true, false);
    while let Some(word) = words.next() {
        let grows = is_partial && words.peek().is_none();
        let word = word.to_ascii_lowercase();
        if word.contains(['{', '[']) || !(awaits_name || may_be_word(&word, is_first, grows)) {
            return false;
        }
        awaits_name = word == "to=";
        is_first = false;
    }
    true
}

/// Whether a lower-case word is one of a header's, or if it still `grows` can become one.
fn may_be_word(word: &str, is_first: bool, grows: bool) -> bool {
    let mut rest = word;
    while let Some(role) = words::role_prefix(rest) {
        rest = &rest[role.len()..];
    }
    let channel = Channel::prefix(rest);
    if let Some((_, n)) = channel {
        rest = &rest[n..];
    }
    let is_word = rest.is_empty()
        || rest.starts_with("to=")
        || rest.starts_with(words::NAMESPACE)
        || (!is_first && words::is_content_type(rest));
    let may_grow = "to=".starts_with(rest)
        || (channel.is_none() && (words::begins_role(rest) || words::begins_channel(rest)))
        || words::NAMESPACE.starts_with(rest)
        || (!is_first && words::begins_content_type(rest));
    is_word || (grows && may_grow)
}
