//! Reading answers, token by token.
//!
//! The parser is a state machine over token ids. It is total: whatever the model wrote becomes a message. A well-formed
//! answer is a sequence of `header <|message|> text end`; everything else is recovered from, by these rules.
//!
//! - Only control *tokens* structure an answer. The same characters spelt with ordinary tokens are text.
//! - The recipient makes a message a call, on whatever channel. Otherwise `analysis` is reasoning, `final` and
//!   `commentary` are content, and a message without (known) channel is content if `<|return|>` ended it, else
//!   reasoning.
//! - A header without `<|message|>` ends where the first word comes that cannot belong to it; from there on it is
//!   text. An answer that does not begin like a header at all is content, and streams.
//! - Text that is nobody's, such as words in a header or behind a call's JSON, is reasoning. Nothing is lost but
//!   header words, and the markup of a header that was cut.
//!
//! Every recovery has a name, listed in [`RECOVERIES`].

mod arguments;
mod body;
mod header;
mod reader;
mod recovery;
#[cfg(test)]
mod tests;
mod words;

use std::sync::Arc;

use ctxserve_core::TokenId;

use crate::harmony::HarmonyTokens;
use crate::{Delta, End, Finish, Outcome, ParserOptions, Place, StreamParser, Tokenizer, Utf8Stream};

use body::{Body, Close, Said};
use header::{Header, Item, Items};
use recovery::{self as note, Notes};
use words::Channel;

pub use recovery::RECOVERIES;

/// How a header came to be open.
#[derive(Debug)]
enum Origin {
    /// The prompt ended in `<|start|>assistant`.
    Prompt,
    /// A message ended; no start token came.
    Between,
    /// `<|start|>`
    Start,
    /// `<|channel|>` within a message, which goes on if this turns out to be no header.
    Within(Body),
}

#[derive(Debug)]
enum State {
    Header(Origin, Items),
    Body(Body),
}

/// What ends a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    /// The end of its message.
    Close(Close),
    /// It cannot be one, or is too long to be one.
    Text,
}

/// Parses one answer of the model. Tokens are classed by id; text is decoded incrementally, in whole characters.
#[derive(Debug)]
pub struct HarmonyParser {
    tokenizer: Arc<Tokenizer>,
    tokens: HarmonyTokens,
    /// Calls are calls and not content.
    calls: bool,
    state: State,
    utf8: Utf8Stream,
    said: Said,
    /// How the last message ended, if any did.
    last: Option<(Close, WasCall)>,
    /// A final message without text was seen: its content is empty, not absent.
    empty_final: bool,
    /// Words that were dropped as bad header words, for an answer that has nothing else.
    dropped: String,
}

/// Whether a message was a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct WasCall(bool);

impl HarmonyParser {
    /// At the start of an answer to a prompt that ends in `<|start|>assistant`.
    pub fn new(tokenizer: Arc<Tokenizer>, tokens: HarmonyTokens, options: ParserOptions) -> Self {
        Self {
            tokenizer,
            tokens,
            calls: options.calls,
            state: State::Header(Origin::Prompt, Items::default()),
            utf8: Utf8Stream::default(),
            said: Said::default(),
            last: None,
            empty_final: false,
            dropped: String::new(),
        }
    }

    fn text(&mut self, text: &str, out: &mut Vec<Delta>) -> Place {
        match &mut self.state {
            State::Body(body) => {
                let place = body.place();
                self.said.text(body, text, out);
                place
            }
            State::Header(origin, items) => {
                items.push_text(text);
                let may_be_header = match origin {
                    Origin::Prompt | Origin::Between if items.is_bare() => {
                        !self.utf8.is_mid_character() && header::may_be_header(&items.text())
                    }
                    _ => true,
                };
                if may_be_header && !items.is_full() {
                    return Place::Markup;
                }
                self.run_into_text(Why::Text, out);
                match &self.state {
                    State::Body(body) => body.place(),
                    State::Header(..) => Place::Markup,
                }
            }
        }
    }

    /// `<|start|>`: a new header.
    fn start(&mut self, out: &mut Vec<Delta>) {
        if let State::Header(origin, items) = &mut self.state {
            let explicit = matches!(origin, Origin::Start);
            if items.is_blank() && !explicit {
                if matches!(origin, Origin::Prompt) {
                    self.said.notes.add(note::REPEATED_PREFIX);
                }
            } else {
                let read = header::read_open(items, explicit, &mut Notes::default());
                let is_words = items.is_bare() && !explicit && read.function.is_none();
                if read.rest.is_empty() && !is_words && !items.is_full() {
                    items.push_control(Item::Start);
                    return;
                }
                self.run_into_text(Why::Close(Close::Header), out);
            }
        }
        let header = State::Header(Origin::Start, Items::default());
        if let State::Body(body) = std::mem::replace(&mut self.state, header) {
            self.said.notes.add(note::MISSING_END);
            self.end_message(body, Close::Header, out);
        }
    }

    /// `<|channel|>` or `<|constrain|>`.
    fn mark(&mut self, item: Item, out: &mut Vec<Delta>) {
        match &mut self.state {
            State::Header(_, items) => {
                items.push_control(item);
                if items.is_full() {
                    self.run_into_text(Why::Text, out);
                }
            }
            State::Body(_) if item == Item::Constrain => self.said.notes.add(note::STRAY_CONTROL),
            State::Body(body) => {
                let body = std::mem::replace(body, Body::Content);
                let mut items = Items::default();
                items.push_control(item);
                self.state = State::Header(Origin::Within(body), items);
            }
        }
    }

    /// `<|message|>`: the header is whole.
    fn message(&mut self, out: &mut Vec<Delta>) {
        let (origin, items) = match std::mem::replace(&mut self.state, State::Body(Body::Content)) {
            State::Header(origin, items) => (origin, items),
            State::Body(body) => {
                self.said.notes.add(note::STRAY_CONTROL);
                self.state = State::Body(body);
                return;
            }
        };
        let explicit = matches!(origin, Origin::Start);
        match origin {
            Origin::Within(body) => {
                self.said.notes.add(note::MISSING_END);
                self.end_message(body, Close::Header, out);
            }
            Origin::Between => self.said.notes.add(note::MISSING_START),
            Origin::Prompt | Origin::Start => {}
        }
        let mut header = header::read_closed(&items, explicit, &mut self.said.notes);
        self.said.reasoning(std::mem::take(&mut header.extra), out);
        self.drop_words(&header);
        self.empty_final |= header.channel == Some(Channel::Final) && header.function.is_none();
        self.state = State::Body(Body::of(&header, self.calls));
    }

    /// A token that ends a message.
    fn stop(&mut self, close: Close, out: &mut Vec<Delta>) {
        if let State::Header(Origin::Prompt | Origin::Between, items) = &self.state
            && items.is_blank()
        {
            self.said.notes.add(note::STRAY_STOP);
            self.dropped.push_str(&items.text());
            let was_call = self.last.map_or(WasCall(false), |(_, was_call)| was_call);
            self.last = Some((close, was_call));
            self.state = State::Header(Origin::Between, Items::default());
            return;
        }
        if matches!(self.state, State::Header(..)) {
            self.run_into_text(Why::Close(close), out);
        }
        match std::mem::replace(&mut self.state, State::Header(Origin::Between, Items::default())) {
            State::Body(body) => self.end_message(body, close, out),
            State::Header(..) => self.last = Some((close, WasCall(false))),
        }
    }

    fn end_message(&mut self, body: Body, close: Close, out: &mut Vec<Delta>) {
        let was_call = matches!(body, Body::Call(_)) && !(close == Close::Header && body.is_blank_call());
        if close == Close::Return && matches!(&body, Body::Undecided(text) if text.is_empty()) {
            self.empty_final = true;
        }
        self.said.close(body, close, out);
        self.last = Some((close, WasCall(was_call)));
    }

    /// A header that no message token ended. Leaves the message that its text belongs to open, if there is text, and
    /// else an empty header.
    fn run_into_text(&mut self, why: Why, out: &mut Vec<Delta>) {
        let between = State::Header(Origin::Between, Items::default());
        let State::Header(origin, items) = std::mem::replace(&mut self.state, between) else { return };
        let explicit = matches!(origin, Origin::Start);
        let is_bare = items.is_bare() && matches!(origin, Origin::Prompt | Origin::Between);
        let mut notes = Notes::default();
        let mut header = header::read_open(&items, explicit, &mut notes);
        if why == Why::Close(Close::Cut) && self.is_cut_header(is_bare, &items, &header) {
            self.said.notes.add(note::HEADER_CUT);
            self.said.reasoning(std::mem::take(&mut header.extra), out);
            self.drop_words(&header);
            // A message that a stray token interrupted was cut with it.
            if let Origin::Within(body) = origin {
                self.state = State::Body(body);
            }
            return;
        }
        let is_call = header.function.is_some()
            && match why {
                Why::Close(Close::Call) => true,
                Why::Close(close) => header.rest_is_json() || (header.rest.is_empty() && close.ends_turn()),
                Why::Text => header.rest_is_json(),
            };
        if !is_call {
            header.function = None;
        }
        if is_bare && !is_call && !header.glued {
            self.bare(why, &items, out);
            return;
        }
        match origin {
            Origin::Within(mut body) if !is_call && (header.channel.is_none() || !header.exact) => {
                self.said.notes.add(note::STRAY_CONTROL);
                self.said.text(&mut body, &items.text(), out);
                self.state = State::Body(body);
                return;
            }
            Origin::Within(body) => {
                self.said.notes.add(note::MISSING_END);
                self.end_message(body, Close::Header, out);
            }
            Origin::Between => self.said.notes.add(note::MISSING_START),
            Origin::Prompt | Origin::Start => {}
        }
        self.said.notes.append(notes);
        self.said.notes.add(note::MISSING_MESSAGE);
        self.said.reasoning(std::mem::take(&mut header.extra), out);
        self.drop_words(&header);
        if header.rest.is_empty() && !is_call {
            self.empty_final |= header.channel == Some(Channel::Final);
            return;
        }
        let mut body = match header.channel {
            // A garbled channel name says little: how the message ends says more.
            Some(Channel::Commentary) if !is_call && (!header.exact || !has_letters(&header.rest)) => {
                Body::Undecided(String::new())
            }
            None if !is_call && !items.is_marked() => Body::Content,
            _ => Body::of(&header, self.calls),
        };
        self.said.text(&mut body, &header.rest, out);
        self.state = State::Body(body);
    }

    /// Text without any control token where a header should be.
    fn bare(&mut self, why: Why, items: &Items, out: &mut Vec<Delta>) {
        let text = items.text();
        // A space behind them makes all words whole ones.
        let is_header = !text.trim().is_empty() && header::may_be_header(&format!("{text} "));
        if is_header && (self.said.anything || why == Why::Close(Close::Header)) {
            self.said.notes.add(note::MISSING_MESSAGE);
            self.dropped.push_str(&text);
            return;
        }
        self.said.notes.add(note::MISSING_HEADER);
        let mut body = Body::Content;
        self.said.text(&mut body, &text, out);
        self.state = State::Body(body);
    }

    /// Whether a header that was cut is the beginning of a legal one, and no text.
    fn is_cut_header(&self, is_bare: bool, items: &Items, header: &Header) -> bool {
        let is_prefix = header.rest.is_empty() || header.fragment;
        if !is_bare || !is_prefix {
            return is_prefix;
        }
        // A lone word that was the whole answer may have been meant as such; a recipient was not.
        let text = items.text();
        let is_to = text.starts_with(char::is_whitespace) && "to=".starts_with(text.trim());
        self.said.anything || header.function.is_some() || text.contains("to=") || is_to
    }

    fn drop_words(&mut self, header: &Header) {
        if !self.dropped.is_empty() && !header.unknown.is_empty() {
            self.dropped.push(' ');
        }
        self.dropped.push_str(&header.unknown);
    }

    /// Ends a character that the bytes so far left incomplete.
    fn flush(&mut self, out: &mut Vec<Delta>) {
        let mut text = String::new();
        self.utf8.finish(&mut text);
        if !text.is_empty() {
            self.text(&text, out);
        }
    }

    /// Whether the answer, cut here, was yet at an end: behind a token that ends the turn, or a whole call.
    fn was_over(&self) -> bool {
        let is_between =
            matches!(&self.state, State::Header(Origin::Prompt | Origin::Between, items) if items.is_blank());
        is_between
            && self
                .last
                .is_some_and(|(close, was_call)| close.ends_turn() || (close == Close::End && was_call.0))
    }
}

fn has_letters(text: &str) -> bool {
    text.contains(char::is_alphabetic)
}

impl StreamParser for HarmonyParser {
    fn push(&mut self, id: TokenId, out: &mut Vec<Delta>) -> Place {
        let tokens = &self.tokens;
        let is_end =
            id == tokens.end || id == tokens.ret || id == tokens.call || Some(id) == tokens.endoftext;
        let is_header =
            id == tokens.start || id == tokens.channel || id == tokens.constrain || id == tokens.message;
        if !is_end && !is_header {
            let bytes = if self.tokenizer.is_special(id) { None } else { self.tokenizer.token_bytes(id) };
            let Some(bytes) = bytes else {
                self.said.notes.add(note::UNKNOWN_CONTROL);
                return Place::Markup;
            };
            let mut text = String::new();
            self.utf8.push(bytes, &mut text);
            return self.text(&text, out);
        }
        self.flush(out);
        if id == self.tokens.start {
            self.start(out);
        } else if id == self.tokens.channel {
            self.mark(Item::Channel, out);
        } else if id == self.tokens.constrain {
            self.mark(Item::Constrain, out);
        } else if id == self.tokens.message {
            self.message(out);
        } else if id == self.tokens.end {
            self.stop(Close::End, out);
        } else if id == self.tokens.call {
            self.stop(Close::Call, out);
        } else {
            if id != self.tokens.ret {
                self.said.notes.add(note::END_OF_TEXT);
            }
            self.stop(Close::Return, out);
        }
        Place::Markup
    }

    fn finish(&mut self, end: End, out: &mut Vec<Delta>) -> Outcome {
        self.flush(out);
        let was_over = end == End::Stop || self.was_over();
        let close = if end == End::Stop { Close::Stop } else { Close::Cut };
        if let State::Header(origin, items) = &self.state {
            if items.is_blank() {
                self.dropped.push_str(&items.text());
                if end == End::Cut && matches!(origin, Origin::Start) {
                    self.said.notes.add(note::HEADER_CUT);
                }
            } else {
                self.run_into_text(Why::Close(close), out);
            }
        }
        let over = State::Header(Origin::Between, Items::default());
        if let State::Body(body) = std::mem::replace(&mut self.state, over) {
            self.end_message(body, close, out);
        }
        if !self.said.anything && !self.dropped.is_empty() {
            self.said.notes.add(note::EMPTY_ANSWER);
            let words = std::mem::take(&mut self.dropped);
            self.said.content(words, out);
        }
        if self.empty_final && !self.said.content && !self.said.has_calls() {
            out.push(Delta::Content(String::new()));
        }
        let finish = match (was_over, self.said.has_calls()) {
            (false, _) => Finish::Length,
            (true, true) => Finish::ToolCalls,
            (true, false) => Finish::Stop,
        };
        Outcome { finish, recoveries: self.said.notes.take() }
    }
}
