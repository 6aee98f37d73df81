//! The words of a header, one by one.

mod slots;

use super::header::{Header, Item, begins_json};
use super::recovery::{self as note, Notes};
use super::words::{self, Channel};

/// What the next word is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    /// Role or author: after a start token.
    Role,
    /// Channel: after its token.
    Channel,
    /// Content type: after constrain.
    Type,
    /// Recipient: after a lone `to=`.
    Recipient,
    /// Any.
    Free,
}

/// A word, or what is left of it.
#[derive(Clone, Copy)]
struct Word<'a> {
    text: &'a str,
    /// Text behind the word; `None` if all of the header is known to be header.
    after: Option<&'a str>,
    /// Offsets within `text` at which tokens end, plus `base`.
    ends: &'a [usize],
    base: usize,
}

impl<'a> Word<'a> {
    fn skip(self, n: usize) -> Self {
        Word { text: &self.text[n..], base: self.base + n, ..self }
    }

    fn is_open(self) -> bool {
        self.after.is_some()
    }

    /// Whether a token ends `n` bytes into the word.
    fn splits_at(self, n: usize) -> bool {
        self.ends.binary_search(&(self.base + n)).is_ok()
    }

    /// Text could go on here: not within a run of lower-case letters, unless two tokens meet.
    fn text_may_begin_at(self, n: usize) -> bool {
        self.splits_at(n) || !self.text[n..].starts_with(char::is_lowercase)
    }

    /// A word of text, and no misspelling, is glued to the first `n` bytes.
    fn is_text_behind(self, n: usize) -> bool {
        let rest = &self.text[n..];
        rest.starts_with(char::is_uppercase)
            || (rest.len() > 3 && rest.starts_with(char::is_alphabetic) && self.splits_at(n))
    }

    /// Nothing but the end or JSON follows the word, which may thus be a content type.
    fn is_followed_by_json(self) -> bool {
        self.after.is_none_or(|after| {
            let after = after.trim_start();
            after.is_empty()
                || begins_json(after)
                || after.split_whitespace().next().is_some_and(|word| {
                    words::is_content_type(word) && begins_json(after.strip_prefix(word).unwrap_or_default())
                })
        })
    }
}

pub(super) struct Reader<'n> {
    header: Header,
    slot: Slot,
    notes: &'n mut Notes,
    explicit: bool,
    /// Words without a meaning at their place.
    stray: Vec<String>,
    /// One of them stood where a channel, an author or a content type belongs.
    misplaced: bool,
    /// The last word was a stray one: words go on until a recipient or a control token comes.
    in_text: bool,
    channels: usize,
    marked: bool,
    types: usize,
    constrained: bool,
    namespaced: bool,
    /// A recipient was named without its function: `to=functions.`
    unnamed: bool,
    /// Channel and function in front of a repeated start token.
    before: Option<(Option<Channel>, Option<String>)>,
}

impl<'n> Reader<'n> {
    pub(super) fn new(explicit: bool, notes: &'n mut Notes) -> Self {
        Self {
            header: Header::default(),
            slot: if explicit { Slot::Role } else { Slot::Free },
            notes,
            explicit,
            stray: Vec::new(),
            misplaced: false,
            in_text: false,
            channels: 0,
            marked: false,
            types: 0,
            constrained: false,
            namespaced: false,
            unnamed: false,
            before: None,
        }
    }

    pub(super) fn item(&mut self, item: &Item) {
        self.in_text &= matches!(item, Item::Text(..));
        match item {
            Item::Channel => {
                self.channels += 1;
                self.marked = true;
                self.slot = Slot::Channel;
            }
            // Between `to=` and the name it is part of a garbled name.
            Item::Constrain if self.slot == Slot::Recipient => self.notes.add(note::NAME_CLEANED),
            Item::Constrain => {
                self.constrained = true;
                self.slot = Slot::Type;
            }
            Item::Start => {
                self.notes.add(note::REPEATED_PREFIX);
                self.inherit();
                let header = std::mem::take(&mut self.header);
                self.before = Some((header.channel, header.function));
                self.slot = Slot::Role;
                (self.channels, self.types) = (0, 0);
                (self.marked, self.constrained, self.namespaced, self.unnamed) = (false, false, false, false);
            }
            Item::Text(text, ends) => {
                for (at, word) in split(text) {
                    let taken = self.word(Word { text: word, after: None, ends, base: at });
                    if taken < word.len() {
                        self.stray(&word[taken..]);
                    }
                }
            }
        }
    }

    /// Text behind the last control token.
    pub(super) fn tail(&mut self, text: &str, ends: &[usize]) {
        for (at, word) in split(text) {
            let end = at + word.len();
            let taken = self.word(Word { text: word, after: Some(&text[end..]), ends, base: at });
            if taken < word.len() {
                self.header.rest = text[at + taken..].to_owned();
                self.header.fragment = end == text.len() && self.may_grow(&word[taken..]);
                return;
            }
        }
    }

    fn may_grow(&self, word: &str) -> bool {
        let word = word.to_ascii_lowercase();
        let free = "to=".starts_with(&word)
            || words::NAMESPACE.starts_with(&word)
            || words::begins_content_type(&word)
            || (self.header.channel.is_none() && (words::begins_channel(&word) || words::begins_role(&word)));
        match self.slot {
            Slot::Role => words::begins_role(&word),
            Slot::Channel => words::begins_channel(&word),
            Slot::Type | Slot::Recipient => words::begins_content_type(&word),
            Slot::Free => free,
        }
    }

    /// Takes a word and says how many of its bytes belong to the header.
    fn word(&mut self, word: Word<'_>) -> usize {
        let lower = word.text.to_ascii_lowercase();
        if lower.starts_with("to=") {
            return self.to(word);
        }
        if self.unnamed && !words::is_content_type(&lower) && Channel::exact(&lower).is_none() {
            self.notes.add(note::NAME_CLEANED);
            self.unnamed = false;
            return self.recipient(word, 0);
        }
        match self.slot {
            Slot::Recipient => self.recipient(word, 0),
            Slot::Type => self.content_type(word, &lower),
            Slot::Channel => self.channel(word, &lower),
            Slot::Role => self.role(word, &lower),
            Slot::Free => self.free(word, &lower),
        }
    }

    fn set(&mut self, channel: Channel, exact: bool) {
        self.header.channel = Some(channel);
        self.header.exact = exact;
        if !exact {
            self.notes.add(note::MISSPELT_CHANNEL);
        }
    }

    /// A channel's name without its token: it counts until a marked one comes, or right behind one.
    fn unmarked(&mut self, channel: Channel) {
        self.channels += 1;
        if !self.marked || self.stray.is_empty() {
            self.header.channel = Some(channel);
            self.header.exact = true;
        }
    }

    /// A word that has no meaning at its place, save for a recipient glued to its end.
    fn stray(&mut self, word: &str) {
        match word.find("to=functions.") {
            Some(at) => {
                self.notes.add(note::GLUED_WORDS);
                if at > 0 {
                    self.stray.push(word[..at].to_owned());
                }
                self.name(&word[at..]);
            }
            None => {
                self.in_text = true;
                self.stray.push(word.to_owned());
            }
        }
    }

    /// An unknown word in a slot.
    fn misplaced(&mut self, word: &str) {
        self.misplaced = true;
        self.stray.push(word.to_owned());
    }

    fn typed(&mut self, lower: &str) {
        self.types += 1;
        self.header.code = lower == "code";
    }

    pub(super) fn end(mut self) -> Header {
        if self.before.is_none() {
            self.name_without_channel();
        }
        self.inherit();
        self.strays();
        self.judge();
        if !self.header.rest.is_empty() {
            let rest = self.header.rest.trim_start();
            self.header.rest.drain(..self.header.rest.len() - rest.len());
        }
        self.header
    }

    /// One unknown word in a slot was meant for it; other words, and several, are text.
    fn strays(&mut self) {
        match self.stray.as_slice() {
            [] => {}
            [word] if self.misplaced || !word.contains(char::is_alphabetic) => {
                self.notes.add(note::HEADER_WORD);
                self.header.unknown.clone_from(word);
            }
            words => {
                self.notes.add(note::HEADER_TEXT);
                self.header.extra = words.join(" ");
            }
        }
    }

    /// `to=functions.searchcommentary`: the channel token is missing between name and channel.
    fn name_without_channel(&mut self) {
        let (None, Some(name)) = (self.header.channel, self.header.function.as_deref()) else { return };
        for (channel, word) in [(Channel::Commentary, "commentary"), (Channel::Analysis, "analysis")] {
            if let Some(stem) = name.strip_suffix(word)
                && stem.ends_with(|c: char| c.is_ascii_alphanumeric())
            {
                self.notes.add(note::GLUED_WORDS);
                self.header.function = Some(stem.to_owned());
                self.unmarked(channel);
                return;
            }
        }
    }

    /// What a header begun anew left out, it takes from its first attempt.
    fn inherit(&mut self) {
        let Some((channel, function)) = self.before.take() else { return };
        if self.header.function.is_none() && (self.header.channel.is_none() || channel.is_none()) {
            self.header.function = function;
        }
        if self.header.channel.is_none() {
            self.header.channel = channel;
        }
    }

    /// Notes what was not as it should be.
    fn judge(&mut self) {
        let header = &self.header;
        if self.unnamed || self.slot == Slot::Recipient {
            self.notes.add(note::EMPTY_RECIPIENT);
        }
        if self.channels > 1 {
            self.notes.add(note::REPEATED_CHANNEL);
        }
        match header.channel {
            Some(_) if !self.marked => self.notes.add(note::UNMARKED_CHANNEL),
            None if self.marked && self.slot == Slot::Channel => {
                self.notes.add(if header.rest.is_empty() {
                    note::EMPTY_CHANNEL
                } else {
                    note::UNKNOWN_CHANNEL
                });
            }
            None => self.notes.add(note::MISSING_CHANNEL),
            Some(_) => {}
        }
        if self.types > 1 {
            self.notes.add(note::CONTENT_TYPE_REPEATED);
        }
        if self.types > 0 && header.function.is_none() {
            self.notes.add(if self.constrained { note::CONSTRAIN_ALONE } else { note::CONTENT_TYPE_ALONE });
        }
        if header.function.is_some() && self.namespaced {
            match header.channel {
                Some(Channel::Analysis) => self.notes.add(note::CALL_ON_ANALYSIS),
                Some(Channel::Final) => self.notes.add(note::CALL_ON_FINAL),
                Some(Channel::Commentary) | None => {}
            }
        }
    }
}

/// Words with their offsets.
fn split(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.split_whitespace().map(move |word| (word.as_ptr() as usize - text.as_ptr() as usize, word))
}
