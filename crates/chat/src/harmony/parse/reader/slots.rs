//! What a word is, by the slot it stands in. Each method says how many of the word's bytes belong to the header.

use super::super::header::begins_json;
use super::super::recovery as note;
use super::super::words::{self, Channel};
use super::{Reader, Slot, Word};

impl Reader<'_> {
    pub(super) fn to(&mut self, word: Word<'_>) -> usize {
        if word.text.len() == 3 {
            self.slot = Slot::Recipient;
            return 3;
        }
        self.recipient(word, 3)
    }

    /// A recipient from the `skip`ped bytes to the word's end or to the JSON glued to it.
    pub(super) fn recipient(&mut self, word: Word<'_>, skip: usize) -> usize {
        let end = word.text[skip..].find(['{', '[']).map_or(word.text.len(), |at| skip + at);
        self.name(&word.text[skip..end]);
        self.slot = Slot::Free;
        self.in_text = false;
        end
    }

    pub(super) fn name(&mut self, name: &str) {
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

    pub(super) fn role(&mut self, word: Word<'_>, lower: &str) -> usize {
        self.slot = Slot::Free;
        if let Some(role) = words::role_prefix(lower) {
            let mut n = role.len();
            while let Some(again) = words::role_prefix(&lower[n..]) {
                n += again.len();
            }
            let rest = &lower[n..];
            let taken = if rest.is_empty() || rest.starts_with(':') { word.text.len() } else { 0 };
            let taken = if taken > 0 { taken } else { self.glued_to(word, lower, n) };
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
            self.misplaced(word.text);
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
    fn glued_to(&mut self, word: Word<'_>, lower: &str, n: usize) -> usize {
        let rest = word.skip(n);
        let taken = self.glued(rest, &lower[n..]);
        if taken > 0 {
            self.header.glued = true;
            self.notes.add(note::GLUED_ROLE);
            return n + taken;
        }
        if word.is_open() && word.text_may_begin_at(n) { n } else { 0 }
    }

    /// Bytes of a word without the space in front of it that are certainly header.
    fn glued(&mut self, word: Word<'_>, lower: &str) -> usize {
        if lower.starts_with("to=") {
            return self.to(word);
        }
        if words::is_content_type(lower) && word.is_followed_by_json() {
            self.typed(lower);
            return word.text.len();
        }
        if let Some(n) = words::content_type_prefix(lower)
            && begins_json(&lower[n..])
        {
            self.typed(&lower[..n]);
            return n;
        }
        let Some((channel, n)) = Channel::prefix(lower) else { return 0 };
        if n == lower.len() {
            self.unmarked(channel);
            return n;
        }
        let rest = word.skip(n);
        let taken = self.glued(rest, &lower[n..]);
        if taken == 0 && !(word.is_open() && word.text_may_begin_at(n)) {
            return 0;
        }
        if self.header.channel.is_none() {
            self.unmarked(channel);
        }
        n + taken
    }

    pub(super) fn channel(&mut self, word: Word<'_>, lower: &str) -> usize {
        if let Some(role) = words::role_prefix(lower) {
            let n = role.len();
            let taken = self.glued(word.skip(n), &lower[n..]);
            if taken > 0 {
                self.slot = Slot::Free;
                self.notes.add(note::GLUED_ROLE);
            }
            if taken > 0 || n == lower.len() {
                return n + taken;
            }
        }
        if let Some((channel, n)) = Channel::prefix(lower) {
            self.set(channel, word.text[..n] == lower[..n]);
            self.slot = Slot::Free;
            return self.behind_channel(word, lower, n);
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
        self.misplaced(word.text);
        word.text.len()
    }

    /// What follows `n` bytes of channel name within the same word.
    fn behind_channel(&mut self, word: Word<'_>, lower: &str, n: usize) -> usize {
        let rest = word.skip(n);
        if rest.text.is_empty() {
            return n;
        }
        let marks = rest.text.len() - rest.text.trim_start_matches(is_mark).len();
        let behind = rest.skip(marks);
        let taken = match self.glued(rest, &lower[n..]) {
            0 if lower[n + marks..].starts_with("to=") => marks + self.to(behind),
            taken => taken,
        };
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
            return if word.is_text_behind(n) { n } else { word.text.len() };
        }
        if junk > 0 || word.text_may_begin_at(n) {
            return n + junk;
        }
        self.notes.add(note::MISSPELT_CHANNEL);
        self.header.exact = false;
        if word.after.is_some_and(|after| after.trim().is_empty()) {
            self.misplaced(word.text);
            return word.text.len();
        }
        0
    }

    pub(super) fn content_type(&mut self, word: Word<'_>, lower: &str) -> usize {
        if words::is_content_type(lower) {
            self.slot = Slot::Free;
            self.typed(lower);
            return word.text.len();
        }
        if let Some(n) = words::content_type_prefix(lower) {
            let typed = lower[..n].to_owned();
            self.slot = Slot::Free;
            let taken = self.glued(word.skip(n), &lower[n..]);
            if taken > 0 || begins_json(&lower[n..]) || (word.is_open() && word.text_may_begin_at(n)) {
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
        self.misplaced(word.text);
        word.text.len()
    }

    pub(super) fn free(&mut self, word: Word<'_>, lower: &str) -> usize {
        let named = lower.trim_start_matches('=');
        let is_plain = word.is_open() && !self.marked && !self.explicit;
        if named.len() > words::NAMESPACE.len() && named.starts_with(words::NAMESPACE) && !is_plain {
            self.notes.add(note::RECIPIENT_WITHOUT_TO);
            return self.recipient(word, 0);
        }
        if self.in_text {
            return 0;
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
            let taken = self.glued(word.skip(role.len()), &lower[role.len()..]);
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
                let taken = self.glued(word.skip(n), &lower[n..]);
                if taken == 0 {
                    return 0;
                }
                self.unmarked(channel);
                n + taken
            }
            None => 0,
        }
    }
}

/// Length of punctuation and repeated channel names at the start of a word's rest: `?commentary?`. All of the rest if
/// that is punctuation alone.
fn junk(rest: &str) -> usize {
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

/// Punctuation that begins no text.
fn is_mark(c: char) -> bool {
    c.is_ascii_punctuation() && !matches!(c, '{' | '[' | '"' | '_' | '*' | '#' | '`' | '(' | '<')
}
