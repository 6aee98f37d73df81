//! `prompt` of completions: text, token ids, or a list of either.

use std::fmt;

use ctxserve_core::TokenId;
use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};

/// The prompts of one request, in order. Never mixed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Prompt {
    /// Texts; `"a"` is a list of one.
    Texts(Vec<String>),
    /// Id lists; `[1, 2]` is a list of one.
    Ids(Vec<Vec<TokenId>>),
}

/// One element of the outer list.
enum Item {
    Text(String),
    Id(TokenId),
    Ids(Vec<TokenId>),
}

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ItemVisitor;
        impl<'de> Visitor<'de> for ItemVisitor {
            type Value = Item;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id or a list of token ids")
            }

            fn visit_u64<E: de::Error>(self, id: u64) -> Result<Item, E> {
                let unexpected = de::Unexpected::Unsigned(id);
                TokenId::try_from(id).map(Item::Id).map_err(|_| E::invalid_value(unexpected, &self))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Item, E> {
                Ok(Item::Text(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Item, A::Error> {
                let mut ids = Vec::new();
                while let Some(id) = list.next_element()? {
                    ids.push(id);
                }
                Ok(Item::Ids(ids))
            }
        }
        deserializer.deserialize_any(ItemVisitor)
    }
}

/// Shape of the list so far: its first element decides.
enum Gathered {
    Nothing,
    Texts(Vec<String>),
    Flat(Vec<TokenId>),
    Lists(Vec<Vec<TokenId>>),
}

impl Gathered {
    /// Whether the element fits what came before.
    fn add(&mut self, item: Item) -> bool {
        match (&mut *self, item) {
            (Self::Nothing, Item::Text(text)) => *self = Self::Texts(vec![text]),
            (Self::Nothing, Item::Id(id)) => *self = Self::Flat(vec![id]),
            (Self::Nothing, Item::Ids(ids)) => *self = Self::Lists(vec![ids]),
            (Self::Texts(texts), Item::Text(text)) => texts.push(text),
            (Self::Flat(ids), Item::Id(id)) => ids.push(id),
            (Self::Lists(lists), Item::Ids(ids)) => lists.push(ids),
            _ => return false,
        }
        true
    }
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PromptVisitor;
        impl<'de> Visitor<'de> for PromptVisitor {
            type Value = Prompt;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a list of strings, a list of token ids or a list of such lists")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Prompt, E> {
                Ok(Prompt::Texts(vec![text.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Prompt, A::Error> {
                let mut gathered = Gathered::Nothing;
                while let Some(item) = list.next_element()? {
                    if !gathered.add(item) {
                        return Err(de::Error::custom("a prompt list must not mix strings, ids and lists"));
                    }
                }
                match gathered {
                    Gathered::Nothing => Err(de::Error::custom("an empty prompt list")),
                    Gathered::Texts(texts) => Ok(Prompt::Texts(texts)),
                    Gathered::Flat(ids) => Ok(Prompt::Ids(vec![ids])),
                    Gathered::Lists(lists) => Ok(Prompt::Ids(lists)),
                }
            }
        }
        deserializer.deserialize_any(PromptVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape() {
        let read = |text| serde_json::from_str::<Prompt>(text).unwrap();
        assert_eq!(read("\"a\""), Prompt::Texts(vec!["a".into()]));
        assert_eq!(read(r#"["a","b"]"#), Prompt::Texts(vec!["a".into(), "b".into()]));
        assert_eq!(read("[1,2]"), Prompt::Ids(vec![vec![1, 2]]));
        assert_eq!(read("[[1],[2,3]]"), Prompt::Ids(vec![vec![1], vec![2, 3]]));
        assert_eq!(read("[[]]"), Prompt::Ids(vec![vec![]]));
    }

    #[test]
    fn what_is_refused() {
        for text in ["[]", "[1,\"a\"]", "[[1],2]", "[\"a\",[1]]", "[-1]", "[4294967296]", "[1.5]", "7", "{}"]
        {
            assert!(serde_json::from_str::<Prompt>(text).is_err(), "{text}");
        }
    }
}
