//! The text of an answer, character by character.

use std::sync::Arc;

use crate::{End, Place, work};

use super::aside::Aside;
use super::call::{Call, Piece, Step};
use super::recovery::{self as note, Notes};
use super::sink::{Kind, Sink};
use super::tags::Tag;

#[derive(Debug)]
pub(super) enum State {
    /// Nothing but white space yet; the thinking may begin.
    Start,
    /// In the thinking. Line breaks at its ends are markup.
    Reasoning { any: bool },
    /// In the thinking, behind what may be a call.
    Aside(Box<Aside>),
    /// Plain text.
    Text,
    /// Behind a call's tag.
    Call(Box<OpenCall>),
    /// Behind a call's last brace, with the braces and white space there.
    AfterCall(String),
}

#[derive(Debug)]
pub(super) struct OpenCall {
    call: Call,
    /// White space before the tag, the tag, and all since: what is shown if this is no call. Empty once it is one.
    held: String,
    /// Length of the white space and of the tag in `held`.
    head: usize,
    index: Option<usize>,
}

/// Reads an answer's text. Total, and its work is linear in the text.
#[derive(Debug)]
pub(super) struct Machine {
    /// Whether calls are looked for, and which functions there are.
    live: bool,
    declared: Option<Arc<[String]>>,
    /// What plain text is. Within an aside, reasoning.
    kind: Kind,
    pub(super) state: State,
    /// What may become a tag.
    pub(super) tag: String,
    /// Line breaks or white space that may turn out to be markup.
    space: String,
    /// Nothing was shown since the last call or the thinking.
    blank: bool,
    /// Of `space`, the line breaks in front are the thinking's markup.
    behind_thinking: bool,
    /// The last call lacks its closing tag so far.
    pub(super) unclosed: bool,
    /// The thinking's end was seen; only within an aside.
    pub(super) thought: bool,
    pub(super) calls: usize,
    pub(super) whole: usize,
    content: bool,
    /// A call's head was cut off at the end.
    pub(super) beheaded: bool,
    pub(super) notes: Notes,
}

impl Machine {
    /// At the start of an answer; `thinking`: within the thinking that the prompt began.
    pub(super) fn new(live: bool, declared: Option<Arc<[String]>>, thinking: bool) -> Self {
        Self {
            live: live && declared.as_ref().is_none_or(|declared| !declared.is_empty()),
            declared,
            kind: Kind::Content,
            state: if thinking { State::Reasoning { any: false } } else { State::Start },
            tag: String::new(),
            space: String::new(),
            blank: true,
            behind_thinking: false,
            unclosed: false,
            thought: false,
            calls: 0,
            whole: 0,
            content: false,
            beheaded: false,
            notes: Notes::default(),
        }
    }

    /// Behind `calls` calls.
    fn aside(declared: Option<Arc<[String]>>, calls: usize) -> Self {
        Self { kind: Kind::Reasoning, state: State::Text, calls, ..Self::new(true, declared, false) }
    }

    /// Where text belongs that comes next.
    pub(super) fn place(&self) -> Place {
        match &self.state {
            State::Reasoning { .. } | State::Aside(_) => Place::Reasoning,
            State::Start | State::Text => Place::Content,
            State::Call(open) if open.call.is_in_arguments() => Place::Arguments,
            State::Call(_) | State::AfterCall(_) => Place::Markup,
        }
    }

    pub(super) fn has_whole_calls(&self) -> bool {
        self.whole > 0
    }

    /// Takes text; whether it ended a tag.
    pub(super) fn push(&mut self, text: &str, sink: &mut Sink<'_>) -> bool {
        let mut tagged = false;
        for c in text.chars() {
            tagged |= self.character(c, sink);
        }
        tagged
    }

    pub(super) fn character(&mut self, c: char, sink: &mut Sink<'_>) -> bool {
        work::count(1);
        if let State::Aside(_) = self.state {
            self.aside_character(c, sink);
            return false;
        }
        if self.tag.is_empty() && c != '<' {
            self.plain(c, sink);
            return false;
        }
        self.tag.push(c);
        let mut fits =
            Tag::ALL.into_iter().filter(|tag| tag.text().starts_with(&self.tag) && self.watches(*tag));
        match fits.next() {
            Some(tag) if tag.text() == self.tag => {
                self.tag.clear();
                self.tagged(tag, sink);
                true
            }
            Some(_) => false,
            None => {
                // A tag has one `<`, its first character: only the last one here can begin another.
                self.tag.pop();
                for c in std::mem::take(&mut self.tag).chars() {
                    self.plain(c, sink);
                }
                if c == '<' && Tag::ALL.into_iter().any(|tag| self.watches(tag)) {
                    self.tag.push(c);
                } else {
                    self.plain(c, sink);
                }
                false
            }
        }
    }

    fn watches(&self, tag: Tag) -> bool {
        let inner = self.kind == Kind::Reasoning;
        match (&self.state, tag) {
            (State::Start, Tag::Think) => true,
            (State::Start, Tag::Call) => self.live,
            (State::Start, _) => false,
            (State::Reasoning { any }, Tag::Think) => !any,
            (State::Reasoning { .. }, Tag::ThinkEnd) => true,
            (State::Reasoning { .. }, Tag::Call) => self.live,
            (State::Reasoning { .. }, Tag::CallEnd) | (State::Aside(_), _) => false,
            (State::Text, Tag::Call) => self.live,
            (State::Text, Tag::CallEnd) => self.unclosed,
            (State::Call(open), Tag::Call | Tag::CallEnd) => open.call.watches_tags(),
            (State::Call(open), Tag::ThinkEnd) => inner && open.call.watches_tags(),
            (State::AfterCall(_), Tag::Call | Tag::CallEnd) => true,
            (State::Text | State::AfterCall(_), Tag::ThinkEnd) => inner,
            (State::Text | State::Call(_) | State::AfterCall(_), Tag::Think) => false,
        }
    }

    pub(super) fn plain(&mut self, c: char, sink: &mut Sink<'_>) {
        match &mut self.state {
            State::Start if c.is_whitespace() => self.space.push(c),
            State::Start => {
                self.state = State::Text;
                self.plain(c, sink);
            }
            State::Reasoning { .. } if c == '\n' => self.space.push(c),
            State::Reasoning { any } => {
                let space = std::mem::take(&mut self.space);
                if std::mem::replace(any, true) {
                    sink.text(Kind::Reasoning, &space);
                }
                sink.text(Kind::Reasoning, c.encode_utf8(&mut [0; 4]));
            }
            State::Text => self.text(c, sink),
            State::Call(_) => self.in_call(c, sink),
            State::AfterCall(tail) if c.is_whitespace() || c == '}' => tail.push(c),
            State::AfterCall(tail) => {
                let tail = std::mem::take(tail);
                self.state = State::Text;
                self.notes.add(note::TEXT_IN_CALL);
                for c in tail.chars().chain([c]) {
                    self.text(c, sink);
                }
            }
            // Asides read for themselves.
            State::Aside(_) => {}
        }
    }

    /// White space beside calls and the one line break before a call are markup: they wait for what follows.
    fn text(&mut self, c: char, sink: &mut Sink<'_>) {
        if self.blank && c.is_whitespace() {
            self.space.push(c);
            return;
        }
        self.release_space(sink);
        if c == '\n' {
            self.space.push(c);
        } else {
            self.show(c.encode_utf8(&mut [0; 4]), sink);
        }
        self.blank = false;
    }

    fn release_space(&mut self, sink: &mut Sink<'_>) {
        let space = std::mem::take(&mut self.space);
        let behind_thinking = std::mem::take(&mut self.behind_thinking);
        self.show(if behind_thinking { space.trim_start_matches('\n') } else { &space }, sink);
    }

    fn show(&mut self, text: &str, sink: &mut Sink<'_>) {
        self.content |= self.kind == Kind::Content && !text.is_empty();
        sink.text(self.kind, text);
    }

    fn tagged(&mut self, tag: Tag, sink: &mut Sink<'_>) {
        match std::mem::replace(&mut self.state, State::Text) {
            State::Start if tag == Tag::Think => {
                self.space.clear();
                self.state = State::Reasoning { any: false };
            }
            State::Reasoning { any } => match tag {
                Tag::ThinkEnd => self.end_thinking(),
                Tag::Call => {
                    let mut aside = Aside {
                        raw: std::mem::take(&mut self.space),
                        inner: Self::aside(self.declared.clone(), self.calls),
                        deltas: Vec::new(),
                        closed: None,
                    };
                    if !any {
                        aside.raw.clear();
                    }
                    for c in tag.text().chars() {
                        aside.push(c);
                    }
                    self.state = State::Aside(Box::new(aside));
                }
                _ => {
                    self.notes.add(note::REPEATED_THINK);
                    self.state = State::Reasoning { any };
                }
            },
            State::Call(open) => {
                self.end_call(*open, sink);
                self.tagged(tag, sink);
            }
            State::AfterCall(tail) => {
                if tail.contains('}') {
                    self.notes.add(note::EXTRA_BRACE);
                }
                self.tagged(tag, sink);
            }
            State::Start | State::Text | State::Aside(_) => match tag {
                Tag::Call => self.open_call(),
                Tag::CallEnd if self.unclosed => {
                    self.unclosed = false;
                    self.space.clear();
                    self.blank = true;
                }
                Tag::ThinkEnd if self.kind == Kind::Reasoning => {
                    if self.unclosed {
                        self.notes.add(note::UNCLOSED_CALL);
                    }
                    self.thought = true;
                }
                // The end of what was no call.
                _ => tag.text().chars().for_each(|c| self.text(c, sink)),
            },
        }
    }

    pub(super) fn end_thinking(&mut self) {
        self.space.clear();
        self.blank = true;
        self.behind_thinking = true;
        self.state = State::Text;
    }

    fn open_call(&mut self) {
        if std::mem::replace(&mut self.unclosed, false) {
            self.notes.add(note::UNCLOSED_CALL);
        }
        let space = std::mem::take(&mut self.space);
        let behind_thinking = std::mem::take(&mut self.behind_thinking);
        let mut held = if behind_thinking { space.trim_start_matches('\n').to_owned() } else { space };
        held.push_str(Tag::Call.text());
        let call = Call::new(self.declared.clone());
        let head = held.len();
        self.state = State::Call(Box::new(OpenCall { call, held, head, index: None }));
    }

    fn in_call(&mut self, c: char, sink: &mut Sink<'_>) {
        let State::Call(mut open) = std::mem::replace(&mut self.state, State::Text) else { return };
        let mut pieces = Vec::new();
        let step = open.call.push(c, &mut pieces);
        if open.index.is_none() {
            open.held.push(c);
        }
        self.pieces(&mut open, pieces, sink);
        match step {
            Step::More => self.state = State::Call(open),
            Step::Closed => {
                self.whole_call(*open, sink);
                self.state = State::AfterCall(String::new());
            }
            Step::Over => {
                self.whole_call(*open, sink);
                self.text(c, sink);
            }
            Step::NoCall => self.no_call(*open, sink),
        }
    }

    fn pieces(&mut self, open: &mut OpenCall, pieces: Vec<Piece>, sink: &mut Sink<'_>) {
        for piece in pieces {
            match piece {
                Piece::Name(name) => {
                    open.held.clear();
                    open.index = Some(self.calls);
                    sink.start(self.calls, name);
                    self.calls += 1;
                }
                Piece::Arguments(text) => sink.arguments(open.index.unwrap_or_default(), &text),
                Piece::Around(text) => sink.text(Kind::Reasoning, &text),
            }
        }
    }

    /// The call ends before its last brace.
    fn end_call(&mut self, mut open: OpenCall, sink: &mut Sink<'_>) {
        let mut pieces = Vec::new();
        let is_call = open.call.end(&mut pieces);
        self.pieces(&mut open, pieces, sink);
        if is_call {
            self.whole_call(open, sink);
        } else {
            self.no_call(open, sink);
        }
    }

    fn whole_call(&mut self, mut open: OpenCall, sink: &mut Sink<'_>) {
        self.notes.append(open.call.take_notes());
        if let Some(index) = open.index {
            sink.end(index);
        }
        self.whole += 1;
        self.unclosed = true;
        self.blank = true;
        self.state = State::Text;
    }

    /// The tag and what came behind it stay text.
    fn no_call(&mut self, open: OpenCall, sink: &mut Sink<'_>) {
        if open.call.is_undeclared() {
            self.notes.add(note::UNDECLARED_FUNCTION);
        }
        self.notes.add(note::NO_CALL);
        self.state = State::Text;
        let (head, rest) = open.held.split_at(open.head);
        self.blank = false;
        self.show(head, sink);
        for c in rest.chars() {
            self.text(c, sink);
        }
    }

    /// Ends the turn: what was held back is shown, or turns out to be markup.
    pub(super) fn end(&mut self, end: End, sink: &mut Sink<'_>) {
        let partial = std::mem::take(&mut self.tag);
        // The beginning of a tag behind a call is one; elsewhere it is text.
        if !matches!(self.state, State::AfterCall(_)) {
            partial.chars().for_each(|c| self.plain(c, sink));
        }
        match std::mem::replace(&mut self.state, State::Text) {
            State::Start => self.release_space(sink),
            State::Reasoning { any } => {
                self.space.clear();
                self.state = State::Reasoning { any };
                return;
            }
            State::Aside(aside) => {
                self.end_aside(*aside, end, sink);
                return;
            }
            State::Text if self.blank => self.space.clear(),
            State::Text => self.release_space(sink),
            State::Call(open) if end == End::Stop => {
                self.end_call(*open, sink);
                self.release_space(sink);
            }
            State::Call(open) => self.cut_call(*open, sink),
            State::AfterCall(tail) => {
                if tail.contains('}') {
                    self.notes.add(note::EXTRA_BRACE);
                }
            }
        }
        if self.unclosed {
            self.notes.add(note::UNCLOSED_CALL);
        }
    }

    fn cut_call(&mut self, mut open: OpenCall, sink: &mut Sink<'_>) {
        let mut pieces = Vec::new();
        open.call.cut(&mut pieces);
        self.pieces(&mut open, pieces, sink);
        self.notes.append(open.call.take_notes());
        self.beheaded = true;
        if open.index.is_none() {
            self.notes.add(note::CALL_CUT);
            if !open.call.is_head() {
                let rest = open.held.get(open.head..).unwrap_or_default().to_owned();
                self.show(&rest, sink);
            }
        }
    }

    /// After the end: whether the answer was complete although no token ended it, that is, after a whole call.
    pub(super) fn is_whole(&self) -> bool {
        self.whole > 0 && self.blank && !self.unclosed && !self.beheaded
    }

    /// Whether the answer has neither content nor calls, and is not all thinking.
    pub(super) fn is_empty(&self) -> bool {
        !self.content && self.calls == 0 && !matches!(self.state, State::Reasoning { .. } | State::Aside(_))
    }
}
