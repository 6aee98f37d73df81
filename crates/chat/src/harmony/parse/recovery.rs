//! Names of everything the parser can forgive.

pub(super) use crate::recovery::Notes;

crate::recovery::recoveries! {
    CONTENT_TYPE_REPEATED = "content_type_repeated", "several words stood where one content type belongs";
    EMPTY_CHANNEL = "empty_channel", "nothing followed the channel token";
    STRAY_STOP = "stray_stop", "a message was ended where none was open";
    CONTENT_TYPE_ALONE = "content_type_alone", "a content type stood where a recipient belongs";
    CONSTRAIN_ALONE = "constrain_alone", "a constrained content type without a recipient";
    MISSING_END = "missing_end", "a header began inside a message";
    MISSING_START = "missing_start", "a header began without the start token";
    MISSING_HEADER = "missing_header", "text without any header";
    MISSING_CHANNEL = "missing_channel", "a header without a channel";
    CALL_ON_ANALYSIS = "call_on_analysis", "a function was called on the analysis channel";
    CALL_ON_FINAL = "call_on_final", "a function was called on the final channel";
    REPEATED_CHANNEL = "repeated_channel", "several channels in one header: the last counts";
    GLUED_ROLE = "glued_role", "no space after the role";
    REPEATED_PREFIX = "repeated_prefix", "a start token inside a header";
    HEADER_CUT = "header_cut", "the answer was cut inside a header";
    TEXT_AFTER_ARGUMENTS = "text_after_arguments", "text after a call's JSON became reasoning";
    TEXT_BEFORE_ARGUMENTS = "text_before_arguments", "text before a call's JSON became reasoning";
    ARGUMENTS_REPAIRED = "arguments_repaired", "bad escapes or raw control characters in a call's JSON";
    INVALID_ARGUMENTS = "invalid_arguments", "a call's arguments are not JSON and were passed on verbatim";
    EMPTY_ARGUMENTS = "empty_arguments", "a call without arguments was given {}";
    NAME_CLEANED = "name_cleaned", "a function name was freed of markup";
    GLUED_WORDS = "glued_words", "no space between header words";
    UNMARKED_CHANNEL = "unmarked_channel", "a channel's name without the channel token";
    MISSPELT_CHANNEL = "misspelt_channel", "nearly a channel's name";
    UNKNOWN_CHANNEL = "unknown_channel", "no channel's name: treated as missing";
    MISSING_MESSAGE = "missing_message", "a header ran into its text without the message token";
    HEADER_TEXT = "header_text", "words of a header that have no meaning there became reasoning";
    HEADER_WORD = "header_word", "one word that has no meaning in a header was left out";
    RECIPIENT_IS_ROLE = "recipient_is_role", "addressed to a role or channel: not a call";
    RECIPIENT_WITHOUT_TO = "recipient_without_to", "a function's name without to=";
    EMPTY_RECIPIENT = "empty_recipient", "to= without a name: not a call";
    SEVERAL_RECIPIENTS = "several_recipients", "several recipients in one header: the last function counts";
    OTHER_ROLE = "other_role", "the model wrote a message of another author";
    MISSPELT_ROLE = "misspelt_role", "nearly the assistant's role";
    UNCLOSED_CALL = "unclosed_call", "a call was ended by another token than the call token";
    ABANDONED_CALL = "abandoned_call", "a call's header was begun anew before any arguments";
    STRAY_CONTROL = "stray_control", "a control token without meaning at its place";
    UNKNOWN_CONTROL = "unknown_control", "a control token that the format does not know, or an id outside the vocabulary";
    END_OF_TEXT = "end_of_text", "the end-of-text token ended a message";
    EMPTY_ANSWER = "empty_answer", "nothing but a malformed header: its words were returned";
}
