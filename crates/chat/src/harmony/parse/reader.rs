//! The words of a header, one by one.

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

    /// Nothing but the end or JSON follows the word, which may thus be a content type.
    fn is_followed_by_json(self) -> bool {
        self.after.is_none_or(|after| {
            let after = after.trim_start();
            after.is_empty()
                || begins_json(after)
                || after.split_whitespace().next().is_some_and(|word| {
                    words::is_content_type(word)
                        && begins_json(after.strip_prefix(word).unwrap_or_default())
                })
        })
    }
}

pub(super) struct Reader<'n> {
    header: Header,
    slot: Slot,
    notes: &'n mut Notes,
    extra: Vec<String>,
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
            extra: Vec::new(),
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
        match item {
            Item::Channel => {
                self.channels += 1;
                self.marked = true;
                self.slot = Slot::Channel;
            }
            Item::Constrain => {
                self.constrained = true;
                self.slot = Slot::Type;
            }
            Item::Start => {
                self.notes.add(note::REPEATED_PREFIX);
                let header = std::mem::take(&mut self.header);
                self.header.unknown = header.unknown;
                self.before = Some((header.channel, header.function));
                self.slot = Slot::Role;
                (self.channels, self.types) = (0, 0);
                (self.marked, self.constrained, self.namespaced, self.unnamed) = (false, false, false, false);
            }
            Item::Text(text, ends) => {
                for (at, word) in split(text) {
                    let taken = self.word(Word { text: word, after: None, ends, base: at });
                    if taken < word.len() {
                        self.extra.push(word[taken..].to_owned());
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
        if lower == "to" && !word.is_open() {
            self.slot = Slot::Recipient;
            return 2;
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

    fn to(&mut self, word: Word<'_>) -> usize {
        if word.text.len() == 3 {
            self.slot = Slot::Recipient;
            return 3;
        }
        self.recipient(word, 3)
    }

    /// A recipient from the `skip`ped bytes to the word's end or to the JSON glued to it.
    fn recipient(&mut self, word: Word<'_>, skip: usize) -> usize {
        let end = word.text[skip..].find(['{', '[']).map_or(word.text.len(), |at| skip + at);
        self.name(&word.text[skip..end]);
        self.slot = Slot::Free;
        end
    }

    fn name(&mut self, name: &str) {
        let mut clean = name;
        while let Some(rest) = clean.strip_prefix("to=") {
            clean = rest;
        }
        clean = clean.trim_matches(['=', ':', '?', '!', ',', ';', '(', ')', '*', '`', '"', '\'']);
        let bare = clean.to_ascii_lowercase();
        if words::is_role(&bare) || bare == "all" {
            self.notes.add(note::RECIPIENT_IS_ROLE);
            self.header.to_user |= bare == "user" || bare == "all";
            return;
        }
        if let Some(channel) = Channel::exact(&bare) {
            self.notes.add(note::RECIPIENT_IS_ROLE);
            self.header.channel.get_or_insert(channel);
            return;
        }
        let mut namespaces = 0;
        while clean.to_ascii_lowercase().starts_with(words::NAMESPACE) {
            clean = &clean[words::NAMESPACE.len()..];
            namespaces += 1;
        }
        clean = clean.trim_matches('.');
        if clean.is_empty() {
            self.unnamed = true;
            return;
        }
        let plain = words::without_glued_type(clean);
        if namespaces > 1 || plain != clean || !name.ends_with(clean) {
            self.notes.add(note::NAME_CLEANED);
        }
        if self.header.function.as_deref().is_some_and(|function| function != plain) {
            self.notes.add(note::SEVERAL_RECIPIENTS);
        }
        self.namespaced = namespaces > 0;
        self.header.function = Some(plain.to_owned());
    }

    fn role(&mut self, word: Word<'_>, lower: &str) -> usize {
        self.slot = Slot::Free;
        if let Some(role) = words::role_prefix(lower) {
            let n = role.len();
            let rest = &lower[n..];
            let taken = if rest.is_empty() || rest.starts_with(':') { word.text.len() } else { 0 };
            let taken = if taken > 0 { taken } else { self.glued_to(word, n) };
            if taken > 0 {
                self.author(role != "assistant");
                return taken;
            }
        }
        if let Some(channel) = Channel::exact(lower) {
            self.unmarked(channel);
            return word.text.len();
        }
        if words::is_nearly_assistant(lower) {
            self.notes.add(note::MISSPELT_ROLE);
            return word.text.len();
        }
        let is_tool = lower.contains('.') && !lower.ends_with('.');
        if word.is_open() && !is_tool {
            self.slot = Slot::Role;
            return 0;
        }
        self.author(true);
        if !is_tool {
            self.unknown(word.text);
        }
        word.text.len()
    }

    fn author(&mut self, other: bool) {
        if other {
            self.notes.add(note::OTHER_ROLE);
        }
        self.header.other_role = other;
    }

    /// Bytes of a word that begins with `n` bytes of role, if what follows them is header, or text that is glued on.
    fn glued_to(&mut self, word: Word<'_>, n: usize) -> usize {
        let rest = word.skip(n);
        let taken = self.glued(rest);
        if taken > 0 {
            self.header.glued = true;
            self.notes.add(note::GLUED_ROLE);
            return n + taken;
        }
        if word.is_open() && word.text_may_begin_at(n) { n } else { 0 }
    }

    /// Bytes of a word without the space in front of it that are certainly header.
    fn glued(&mut self, word: Word<'_>) -> usize {
        let lower = word.text.to_ascii_lowercase();
        if lower.starts_with("to=") {
            return self.to(word);
        }
        if words::is_content_type(&lower) && word.is_followed_by_json() {
            self.typed(&lower);
            return word.text.len();
        }
        if let Some(n) = words::content_type_prefix(&lower)
            && begins_json(&lower[n..])
        {
            self.typed(&lower[..n]);
            return n;
        }
        let Some((channel, n)) = Channel::prefix(&lower) else { return 0 };
        if n == lower.len() {
            self.unmarked(channel);
            return n;
        }
        let rest = word.skip(n);
        let taken = self.glued(rest);
        if taken == 0 && !(word.is_open() && word.text_may_begin_at(n)) {
            return 0;
        }
        if self.header.channel.is_none() {
            self.unmarked(channel);
        }
        n + taken
    }

    fn channel(&mut self, word: Word<'_>, lower: &str) -> usize {
        if words::is_role(lower) {
            return word.text.len();
        }
        if let Some((channel, n)) = Channel::prefix(lower) {
            self.set(channel, word.text[..n] == lower[..n]);
            self.slot = Slot::Free;
            return self.behind_channel(word, n);
        }
        self.slot = Slot::Free;
        if let Some(channel) = Channel::guess(word.text) {
            self.notes.add(note::MISSPELT_CHANNEL);
            self.set(channel, false);
            return word.text.len();
        }
        if words::is_content_type(lower) && word.is_followed_by_json() {
            self.typed(lower);
            return word.text.len();
        }
        if lower.starts_with(words::NAMESPACE) {
            return self.free(word, lower);
        }
        if word.is_open() {
            self.slot = Slot::Channel;
            return 0;
        }
        self.notes.add(note::UNKNOWN_CHANNEL);
        self.unknown(word.text);
        word.text.len()
    }

    /// What follows `n` bytes of channel name within the same word.
    fn behind_channel(&mut self, word: Word<'_>, n: usize) -> usize {
        let rest = word.skip(n);
        if rest.text.is_empty() {
            return n;
        }
        let taken = self.glued(rest);
        if taken > 0 {
            self.notes.add(note::GLUED_WORDS);
            return n + taken;
        }
        let junk = junk(rest.text);
        if junk > 0 || !word.is_open() {
            self.notes.add(note::MISSPELT_CHANNEL);
            self.header.exact = false;
        }
        if !word.is_open() {
            return word.text.len();
        }
        if junk > 0 || word.text_may_begin_at(n) {
            return n + junk;
        }
        self.notes.add(note::MISSPELT_CHANNEL);
        self.header.exact = false;
        if word.after.is_some_and(|after| after.trim().is_empty()) {
            self.unknown(word.text);
            return word.text.len();
        }
        0
    }

    fn content_type(&mut self, word: Word<'_>, lower: &str) -> usize {
        if words::is_content_type(lower) {
            self.slot = Slot::Free;
            self.typed(lower);
            return word.text.len();
        }
        if let Some(n) = words::content_type_prefix(lower) {
            let typed = lower[..n].to_owned();
            self.slot = Slot::Free;
            let taken = self.glued(word.skip(n));
            if taken > 0 || (word.is_open() && word.text_may_begin_at(n)) {
                self.typed(&typed);
                return n + taken;
            }
        }
        if word.is_open() {
            self.slot = Slot::Type;
            return 0;
        }
        self.slot = Slot::Free;
        self.typed(lower);
        self.unknown(word.text);
        word.text.len()
    }

    fn free(&mut self, word: Word<'_>, lower: &str) -> usize {
        if lower.len() > words::NAMESPACE.len() && lower.starts_with(words::NAMESPACE) {
            self.notes.add(note::RECIPIENT_WITHOUT_TO);
            return self.recipient(word, 0);
        }
        if words::is_content_type(lower) {
            if !word.is_followed_by_json() {
                return 0;
            }
            self.typed(lower);
            return word.text.len();
        }
        if let Some(n) = words::content_type_prefix(lower)
            && begins_json(&lower[n..])
        {
            self.typed(&lower[..n]);
            return n;
        }
        if words::is_role(lower) {
            return if word.is_open() { 0 } else { word.text.len() };
        }
        if let Some(role) = words::role_prefix(lower) {
            let taken = self.glued(word.skip(role.len()));
            if taken > 0 {
                self.header.glued = true;
                self.notes.add(note::GLUED_ROLE);
                return role.len() + taken;
            }
        }
        match Channel::prefix(lower) {
            Some((channel, n)) if n == lower.len() => {
                if word.is_open() && self.header.channel.is_some() {
                    return 0;
                }
                self.unmarked(channel);
                n
            }
            Some((channel, n)) => {
                let taken = self.glued(word.skip(n));
                if taken == 0 {
                    return 0;
                }
                self.unmarked(channel);
                n + taken
            }
            None => 0,
        }
    }

    fn set(&mut self, channel: Channel, exact: bool) {
        self.header.channel = Some(channel);
        self.header.exact = exact;
        if !exact {
            self.notes.add(note::MISSPELT_CHANNEL);
        }
    }

    /// A channel's name without its token: it counts until a marked one comes.
    fn unmarked(&mut self, channel: Channel) {
        if self.header.channel.is_some() {
            self.channels += 1;
        }
        if !self.marked {
            self.header.channel = Some(channel);
            self.header.exact = true;
        }
    }

    fn typed(&mut self, lower: &str) {
        self.types += 1;
        self.header.code = lower == "code";
    }

    fn unknown(&mut self, word: &str) {
        if !self.header.unknown.is_empty() {
            self.header.unknown.push(' ');
        }
        self.header.unknown.push_str(word);
    }

    pub(super) fn end(mut self) -> Header {
        if !self.marked && self.before.is_none() {
            self.name_without_channel();
        }
        self.inherit();
        let lone = self.extra.len() == 1 && self.types == 0 && self.extra.iter().all(|word| is_slot_word(word));
        let extra = self.extra.join(" ");
        if lone {
            self.unknown(&extra);
        } else if !extra.is_empty() {
            self.notes.add(note::HEADER_TEXT);
            self.header.extra = extra;
        }
        self.judge();
        if !self.header.rest.is_empty() {
            let rest = self.header.rest.trim_start();
            self.header.rest.drain(..self.header.rest.len() - rest.len());
        }
        self.header
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
                self.notes.add(if header.rest.is_empty() { note::EMPTY_CHANNEL } else { note::UNKNOWN_CHANNEL });
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

/// Length of punctuation and repeated channel names at the start of a word's rest: `?commentary?`. All of the rest if
/// that is punctuation alone.
fn junk(rest: &str) -> usize {
    let is_mark = |c: char| c.is_ascii_punctuation() && !matches!(c, '{' | '[' | '"' | '_' | '*' | '#' | '`' | '(' | '<');
    let marks = |text: &str| text.len() - text.trim_start_matches(is_mark).len();
    let mut taken = 0;
    loop {
        let tail = &rest[taken..];
        let skipped = marks(tail);
        if skipped == tail.len() {
            return rest.len();
        }
        let Some((_, n)) = Channel::prefix(&tail[skipped..].to_ascii_lowercase()) else { return taken };
        taken += skipped + n;
    }
}

/// A word that means nothing but stands alone where a content type belongs: an identifier or punctuation.
fn is_slot_word(word: &str) -> bool {
    let is_identifier = word.starts_with(|c: char| c.is_ascii_alphabetic())
        && word.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '/' | '+'));
    is_identifier || !word.contains(char::is_alphabetic)
}
