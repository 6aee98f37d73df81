//! Message content: a string, or a list of parts.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

/// `content` of a message, in parts of the API that it belongs to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Content<P = Part> {
    /// A plain string.
    Text(String),
    /// Typed parts.
    Parts(Vec<P>),
}

impl Content {
    /// Text and reasoning. Parts are joined without a separator, so that a text and the same text in parts are one prompt.
    ///
    /// # Errors
    /// The index of a part that is neither, and what to say of it.
    pub(crate) fn joined(self) -> Result<(String, Option<String>), (usize, String)> {
        let parts = match self {
            Self::Text(text) => return Ok((text, None)),
            Self::Parts(parts) => parts,
        };
        let (mut joined, mut thoughts) = (String::new(), None);
        for (index, part) in parts.into_iter().enumerate() {
            match part {
                Part::Text(text) => joined.push_str(&text),
                Part::Reasoning(text) => thoughts.get_or_insert_with(String::new).push_str(&text),
                Part::Other(kind) => {
                    let kind: String = kind.chars().take(32).collect();
                    let what = "are not supported; this model reads text only";
                    return Err((index, format!("content parts of type {kind:?} {what}")));
                }
            }
        }
        Ok((joined, thoughts))
    }
}

/// One part. Only text is served; the type of any other is kept for the error message and nothing of it is
/// fetched or decoded.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// Text.
    Text(String),
    /// Reasoning of an earlier turn; without its text if that is encrypted.
    Reasoning(String),
    /// Something else.
    Other(String),
}

#[derive(Deserialize)]
struct RawPart {
    #[serde(rename = "type")]
    kind: Option<String>,
    text: Option<String>,
    refusal: Option<String>,
    thinking: Option<Content>,
    reasoning: Option<String>,
    summary: Option<Value>,
}

/// A piece of reasoning as clients keep it: `thinking` blocks, or OpenRouter's `reasoning_details`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Thought(pub(crate) String);

impl<'de> Deserialize<'de> for Thought {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let raw = RawPart::deserialize(deserializer)?;
        let kind = raw.kind.clone().unwrap_or_default();
        Ok(Self(raw.into_thought(&kind).unwrap_or_default()))
    }
}

impl RawPart {
    /// The text of a part that holds reasoning; empty for an encrypted one.
    fn into_thought(self, kind: &str) -> Option<String> {
        let joined = |content: Content| match content {
            Content::Text(text) => text,
            Content::Parts(parts) => {
                let texts = parts.into_iter().filter_map(|part| match part {
                    Part::Text(text) | Part::Reasoning(text) => Some(text),
                    Part::Other(_) => None,
                });
                texts.collect()
            }
        };
        match kind {
            "thinking" => Some(self.thinking.map(joined).unwrap_or_default()),
            "reasoning" => Some(self.reasoning.or(self.text).unwrap_or_default()),
            "reasoning.text" => Some(self.text.unwrap_or_default()),
            "reasoning.summary" => {
                Some(self.summary.and_then(|text| text.as_str().map(str::to_owned)).unwrap_or_default())
            }
            "redacted_thinking" | "reasoning.encrypted" => Some(String::new()),
            _ => None,
        }
    }

    fn into_part(self) -> Part {
        let kind = self.kind.clone().unwrap_or_default();
        let text = match kind.as_str() {
            "text" | "input_text" | "output_text" => self.text,
            "refusal" => self.refusal.or(self.text),
            kind => match self.into_thought(kind) {
                Some(thought) => return Part::Reasoning(thought),
                None => None,
            },
        };
        text.map_or(Part::Other(kind), Part::Text)
    }
}

impl<'de> Deserialize<'de> for Part {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PartVisitor;
        impl<'de> Visitor<'de> for PartVisitor {
            type Value = Part;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a content part")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Part, E> {
                Ok(Part::Text(text.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Part, A::Error> {
                RawPart::deserialize(MapAccessDeserializer::new(map)).map(RawPart::into_part)
            }
        }
        deserializer.deserialize_any(PartVisitor)
    }
}

impl<'de, P: Deserialize<'de>> Deserialize<'de> for Content<P> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ContentVisitor<P>(PhantomData<P>);
        impl<'de, P: Deserialize<'de>> Visitor<'de> for ContentVisitor<P> {
            type Value = Content<P>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of content parts")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Content<P>, E> {
                Ok(Content::Text(text.to_owned()))
            }

            fn visit_string<E: de::Error>(self, text: String) -> Result<Content<P>, E> {
                Ok(Content::Text(text))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Content<P>, A::Error> {
                let mut parts = Vec::new();
                while let Some(part) = list.next_element()? {
                    parts.push(part);
                }
                Ok(Content::Parts(parts))
            }
        }
        deserializer.deserialize_any(ContentVisitor(PhantomData))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_parts_and_others() {
        let read = |text| serde_json::from_str::<Content>(text).unwrap();
        assert_eq!(read("\"a\""), Content::Text("a".into()));
        let parts = read(r#"[{"type":"text","text":"a","x":1},"b",{"type":"image_url","image_url":{}}]"#);
        let expected = vec![Part::Text("a".into()), Part::Text("b".into()), Part::Other("image_url".into())];
        assert_eq!(parts, Content::Parts(expected));
        let thoughts = r#"[{"type":"thinking","thinking":"a","signature":"x"},{"type":"thinking","thinking":[{"type":"text","text":"b"}]},
            {"type":"reasoning","reasoning":"c"},{"type":"reasoning","text":"d"},{"type":"redacted_thinking","data":"e"}]"#;
        let expected = ["a", "b", "c", "d", ""].map(|text| Part::Reasoning(text.into())).into();
        assert_eq!(read(thoughts), Content::Parts(expected));
        assert_eq!(read("[{}]"), Content::Parts(vec![Part::Other(String::new())]));
    }

    #[test]
    fn details_of_reasoning() {
        let read = |text| serde_json::from_str::<Thought>(text).map(|thought| thought.0);
        for (text, thought) in [
            (r#"{"type":"reasoning.text","text":"a","signature":null,"index":0}"#, "a"),
            (r#"{"type":"reasoning.text","text":null}"#, ""),
            (r#"{"type":"reasoning.summary","summary":"b"}"#, "b"),
            (r#"{"type":"reasoning.encrypted","data":"c"}"#, ""),
            (r#"{"type":"thinking","thinking":"d"}"#, "d"),
            (r#"{"type":"other","text":"e"}"#, ""),
            ("{}", ""),
        ] {
            assert_eq!(read(text).unwrap(), thought, "{text}");
        }
        assert!(read("1").is_err());
    }

    #[test]
    fn other_json_is_refused() {
        for text in ["1", "{}", "true", "[1]", "[null]", r#"[{"type":1}]"#] {
            assert!(serde_json::from_str::<Content>(text).is_err(), "{text}");
        }
    }
}
