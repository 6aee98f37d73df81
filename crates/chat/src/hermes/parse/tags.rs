//! The tags of an answer.

pub(crate) const CALL: &str = "<tool_call>";
pub(crate) const THINK: &str = "<think>";
pub(crate) const THINK_END: &str = "</think>";

/// A tag. Models write them as single tokens or spelt out; both are the same text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tag {
    Call,
    CallEnd,
    Think,
    ThinkEnd,
}

impl Tag {
    pub(super) const ALL: [Self; 4] = [Self::Call, Self::CallEnd, Self::Think, Self::ThinkEnd];

    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Call => CALL,
            Self::CallEnd => "</tool_call>",
            Self::Think => THINK,
            Self::ThinkEnd => THINK_END,
        }
    }
}
