//! What answers of `/v1/messages` carry for their way back: signatures, and arguments that are no JSON object.

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

/// The key under which arguments that are no JSON object stand in `input`, as Anthropic's documentation proposes.
const INVALID_JSON: &str = "INVALID_JSON";
/// What every signature begins with. Thinking that was left out of an answer follows it, behind a colon.
const SIGNATURE: &str = "ctxserve-1";

/// A JSON object for clients that read nothing else: the arguments as the model wrote them if they are one, `{}` for
/// none at all, and else one whose only member holds their text.
pub(crate) fn input(arguments: String) -> String {
    if arguments.trim_ascii().is_empty() {
        "{}".to_owned()
    } else if serde_json::from_str::<Map<String, Value>>(&arguments).is_ok() {
        arguments
    } else {
        Value::from(Map::from_iter([(INVALID_JSON.to_owned(), Value::String(arguments))])).to_string()
    }
}

/// The arguments behind an `input` that a client sends back: what [`input`] was given.
pub(crate) fn arguments(input: &RawValue) -> String {
    let wrapped = serde_json::from_str::<Map<String, Value>>(input.get()).ok().filter(|map| map.len() == 1);
    match wrapped.and_then(|mut map| map.remove(INVALID_JSON)) {
        Some(Value::String(text)) => text,
        _ => input.get().to_owned(),
    }
}

/// A signature. It is no secret and proves nothing: thinking that comes back is read by the model alone.
pub(crate) fn sign(omitted: &str) -> String {
    if omitted.is_empty() {
        return SIGNATURE.to_owned();
    }
    format!("{SIGNATURE}:{}", STANDARD_NO_PAD.encode(omitted))
}

/// The thinking that a signature of [`sign`] carries; `None` for any other.
pub(crate) fn omitted(signature: &str) -> Option<String> {
    let carried = signature.strip_prefix(SIGNATURE)?.strip_prefix(':')?;
    String::from_utf8(STANDARD_NO_PAD.decode(carried).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn back(text: &str) -> String {
        let input = RawValue::from_string(input(text.to_owned())).unwrap();
        assert!(input.get().trim_ascii().starts_with('{'), "{input}");
        arguments(&input)
    }

    #[test]
    fn objects_stay_as_they_are_and_anything_else_comes_back_as_it_was() {
        let objects = ["{}", r#"{"a" :1.0,  "b":[1e2]}"#, r#"{"a":1,"a":2}"#, "{\"\u{e9}\":\"\\u00e9\"}"];
        for text in objects {
            assert_eq!(input(text.to_owned()), text);
            assert_eq!(back(text), text);
        }
        let others =
            ["[]", "null", "query: a", r#"{"a":"#, r#"{"a":1} ]"#, r#""{}""#, r#"{"a":"\ud800"}"#, "\u{0}{"];
        for text in others {
            assert_ne!(input(text.to_owned()), text);
            assert_eq!(back(text), text);
        }
        assert_eq!(back(""), "{}");
    }

    #[test]
    fn signatures_carry_what_was_left_out() {
        assert_eq!(omitted(&sign("Hm \u{1f914}")).as_deref(), Some("Hm \u{1f914}"));
        for other in ["", "ctxserve-1", "ctxserve-1:", "ctxserve-1:*", "EqQBCkYIBBgCKkDh"] {
            assert_eq!(omitted(other).as_deref().unwrap_or_default(), "", "{other}");
        }
        assert!(!sign("").is_empty());
    }
}
