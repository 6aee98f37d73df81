//! Where the text of a message goes.

use crate::{Delta, Place};

use super::arguments::{Arguments, Pieces};
use super::header::Header;
use super::recovery::{self as note, Notes};
use super::words::Channel;

/// How a message ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Close {
    /// `<|end|>`
    End,
    /// `<|return|>`, or `<|endoftext|>`, which stands for it.
    Return,
    /// `<|call|>`
    Call,
    /// Another header began.
    Header,
    /// A stop string, or a stop token of the client's.
    Stop,
    /// By length.
    Cut,
}

impl Close {
    /// The turn ended with the message, and the model meant it to.
    pub(super) fn ends_turn(self) -> bool {
        matches!(self, Self::Return | Self::Call | Self::Stop)
    }
}

/// A call's text.
#[derive(Clone, Debug)]
pub(super) struct Call {
    name: String,
    /// Set once the call is announced, which waits for its first text.
    index: Option<usize>,
    arguments: Arguments,
}

/// The text of an open message.
#[derive(Clone, Debug)]
pub(super) enum Body {
    Reasoning,
    Content,
    /// No channel: how the message ends decides. Its text so far.
    Undecided(String),
    Call(Box<Call>),
}

impl Body {
    /// Where a complete header sends its message's text.
    pub(super) fn of(header: &Header, calls: bool) -> Self {
        if let Some(name) = &header.function {
            if !calls {
                return Self::Content;
            }
            return Self::Call(Box::new(Call {
                name: name.clone(),
                index: None,
                arguments: Arguments::new(header.code),
            }));
        }
        match header.channel {
            Some(Channel::Analysis) => Self::Reasoning,
            Some(Channel::Final) => Self::Content,
            // What the model wrote in another's name is not its answer.
            Some(Channel::Commentary) if header.other_role => Self::Reasoning,
            Some(Channel::Commentary) => Self::Content,
            None if header.to_user => Self::Content,
            None => Self::Undecided(String::new()),
        }
    }

    /// Where the next token's text belongs.
    pub(super) fn place(&self) -> Place {
        match self {
            Self::Reasoning | Self::Undecided(_) => Place::Reasoning,
            Self::Content => Place::Content,
            Self::Call(call) if call.arguments.is_complete() => Place::Reasoning,
            Self::Call(_) => Place::Arguments,
        }
    }

    /// A call whose arguments have not begun.
    pub(super) fn is_blank_call(&self) -> bool {
        matches!(self, Self::Call(call) if call.arguments.is_blank())
    }
}

/// Everything said so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Said {
    /// Calls announced, and how many of them are whole.
    calls: usize,
    whole_calls: usize,
    pub(super) anything: bool,
    pub(super) content: bool,
    pub(super) notes: Notes,
}

impl Said {
    pub(super) fn has_calls(&self) -> bool {
        self.whole_calls > 0
    }

    pub(super) fn reasoning(&mut self, text: String, out: &mut Vec<Delta>) {
        if !text.is_empty() {
            self.anything = true;
            out.push(Delta::Reasoning(text));
        }
    }

    pub(super) fn content(&mut self, text: String, out: &mut Vec<Delta>) {
        if !text.is_empty() {
            self.anything = true;
            self.content = true;
            out.push(Delta::Content(text));
        }
    }

    /// Takes text of an open message.
    pub(super) fn text(&mut self, body: &mut Body, text: &str, out: &mut Vec<Delta>) {
        match body {
            Body::Reasoning => self.reasoning(text.to_owned(), out),
            Body::Content => self.content(text.to_owned(), out),
            Body::Undecided(held) => held.push_str(text),
            Body::Call(call) => {
                let mut pieces = Pieces::default();
                call.arguments.push(text, &mut pieces);
                if !call.arguments.is_blank() {
                    self.announce(call, out);
                }
                self.pieces(call, pieces, out);
            }
        }
    }

    /// Ends an open message.
    pub(super) fn close(&mut self, body: Body, close: Close, out: &mut Vec<Delta>) {
        match body {
            Body::Reasoning | Body::Content => {}
            Body::Undecided(text) if matches!(close, Close::Return | Close::Stop) => self.content(text, out),
            Body::Undecided(text) => self.reasoning(text, out),
            Body::Call(call) => self.close_call(*call, close, out),
        }
    }

    fn close_call(&mut self, mut call: Call, close: Close, out: &mut Vec<Delta>) {
        if close == Close::Header && call.arguments.is_blank() {
            self.notes.add(note::ABANDONED_CALL);
            return;
        }
        self.announce(&mut call, out);
        let is_whole = match close {
            Close::Cut => false,
            Close::Stop => call.arguments.is_complete(),
            Close::End | Close::Return | Close::Call | Close::Header => true,
        };
        let mut pieces = Pieces::default();
        if is_whole {
            call.arguments.finish(&mut pieces);
        } else {
            call.arguments.cut(&mut pieces);
        }
        self.pieces(&call, pieces, out);
        self.note_faults(&call.arguments);
        if is_whole {
            if close != Close::Call {
                self.notes.add(note::UNCLOSED_CALL);
            }
            self.whole_calls += 1;
            if let Some(index) = call.index {
                out.push(Delta::CallEnd { index });
            }
        }
    }

    fn announce(&mut self, call: &mut Call, out: &mut Vec<Delta>) {
        if call.index.is_none() {
            call.index = Some(self.calls);
            out.push(Delta::CallStart { index: self.calls, name: call.name.clone() });
            self.calls += 1;
            self.anything = true;
        }
    }

    fn pieces(&mut self, call: &Call, pieces: Pieces, out: &mut Vec<Delta>) {
        if let Some(index) = call.index
            && !pieces.arguments.is_empty()
        {
            out.push(Delta::CallArguments { index, text: pieces.arguments });
        }
        self.reasoning(pieces.around, out);
    }

    fn note_faults(&mut self, arguments: &Arguments) {
        let faults = arguments.faults();
        let names = [
            (faults.before, note::TEXT_BEFORE_ARGUMENTS),
            (faults.after, note::TEXT_AFTER_ARGUMENTS),
            (faults.repaired, note::ARGUMENTS_REPAIRED),
            (faults.invalid, note::INVALID_ARGUMENTS),
            (faults.empty, note::EMPTY_ARGUMENTS),
        ];
        for (_, name) in names.iter().filter(|(has, _)| *has) {
            self.notes.add(name);
        }
    }
}
