//! Names of everything the parser can forgive.

pub(super) use crate::recovery::Notes;

crate::recovery::recoveries! {
    NO_CALL = "no_call", "what followed a call's tag was no call and stayed text";
    UNDECLARED_FUNCTION = "undeclared_function", "a call of a function that is not on offer stayed text";
    CALL_CUT = "call_cut", "the answer was cut before a call's arguments: its head was dropped";
    UNCLOSED_CALL = "unclosed_call", "a call without its closing tag";
    MISSING_BRACE = "missing_brace", "the closing tag came before the call's last brace";
    EXTRA_BRACE = "extra_brace", "braces too many behind a call";
    TEXT_IN_CALL = "text_in_call", "text between a call and its closing tag";
    UNKNOWN_MEMBER = "unknown_member", "a member of a call that has no meaning became reasoning";
    ARGUMENTS_REPAIRED = "arguments_repaired", "bad escapes or raw control characters in a call's JSON";
    ARGUMENTS_CLOSED = "arguments_closed", "brackets that a call's arguments lacked were added";
    ARGUMENTS_IN_STRING = "arguments_in_string", "a call's arguments were JSON within a string";
    INVALID_ARGUMENTS = "invalid_arguments", "a call's arguments are not JSON and were passed on verbatim";
    EMPTY_ARGUMENTS = "empty_arguments", "a call without arguments was given {}";
    CALL_WHILE_THINKING = "call_while_thinking", "a call was made within the thinking, and nothing after it";
    REPEATED_THINK = "repeated_think", "the thinking was opened twice";
    TEXT_AFTER_END = "text_after_end", "text behind the token that ends the turn";
    UNKNOWN_CONTROL = "unknown_control", "a control token that has no place in an answer, or an id outside the vocabulary";
    END_OF_TEXT = "end_of_text", "the end-of-text token ended the turn";
}
