//! The vocabulary of headers.

/// Channels of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Channel {
    Analysis,
    Commentary,
    Final,
}

/// Name and the number of edits within which a word is taken for it.
const CHANNELS: [(Channel, &str, usize); 3] = [
    (Channel::Analysis, "analysis", 2),
    (Channel::Commentary, "commentary", 3),
    (Channel::Final, "final", 1),
];

const ROLES: [&str; 5] = ["assistant", "user", "system", "developer", "tool"];

/// Longest first among those with a common beginning, so that the first match is the longest.
const CONTENT_TYPES: [&str; 20] = [
    "jsonl",
    "json",
    "code",
    "plaintext",
    "plain",
    "text",
    "markdown",
    "xml",
    "html",
    "yaml",
    "toml",
    "csv",
    "python",
    "javascript",
    "typescript",
    "bash",
    "shell",
    "sql",
    "string",
    "object",
];

/// Words that end in "json" by themselves: no content type is glued to them.
const JSON_WORDS: [&str; 11] = [
    "geojson", "topojson", "ndjson", "bson", "tojson", "fromjson", "asjson", "isjson", "ujson", "orjson",
    "rjson",
];

/// The namespace of client functions.
pub(super) const NAMESPACE: &str = "functions.";

impl Channel {
    /// Only the very name.
    pub(super) fn exact(word: &str) -> Option<Self> {
        CHANNELS.iter().find(|(_, name, _)| *name == word).map(|(channel, ..)| *channel)
    }

    /// The channel whose name the lower-case word begins with, and the name's length.
    pub(super) fn prefix(word: &str) -> Option<(Self, usize)> {
        CHANNELS
            .iter()
            .find(|(_, name, _)| word.starts_with(name))
            .map(|(channel, name, _)| (*channel, name.len()))
    }

    /// The obvious meaning of a misspelt word. Its ASCII letters, in lower case, begin with a channel's name, or are
    /// the first four or more letters of one, or are a few edits away from one.
    pub(super) fn guess(word: &str) -> Option<Self> {
        let letters: String =
            word.chars().filter(char::is_ascii_alphabetic).take(24).map(|c| c.to_ascii_lowercase()).collect();
        let near = |(_, name, edits): &&(Self, &str, usize)| {
            letters.starts_with(name)
                || (letters.len() >= 4 && (name.starts_with(&letters) || distance(&letters, name) <= *edits))
        };
        CHANNELS.iter().find(near).map(|(channel, ..)| *channel)
    }
}

/// Whether the lower-case word can grow into a channel's name.
pub(super) fn begins_channel(word: &str) -> bool {
    CHANNELS.iter().any(|(_, name, _)| name.starts_with(word))
}

/// Whether the lower-case word can grow into a role.
pub(super) fn begins_role(word: &str) -> bool {
    ROLES.iter().any(|name| name.starts_with(word))
}

/// Whether the lower-case word can grow into a usual content type.
pub(super) fn begins_content_type(word: &str) -> bool {
    ["json", "code"].iter().any(|name| name.starts_with(word))
}

/// The role that the lower-case word begins with.
pub(super) fn role_prefix(word: &str) -> Option<&'static str> {
    ROLES.iter().find(|name| word.starts_with(**name)).copied()
}

/// Whether the lower-case word is a role.
pub(super) fn is_role(word: &str) -> bool {
    ROLES.contains(&word)
}

/// Whether the word is nearly "assistant".
pub(super) fn is_nearly_assistant(word: &str) -> bool {
    word.len() >= 6 && word.len() <= 16 && distance(&word.to_ascii_lowercase(), "assistant") <= 2
}

/// Whether the lower-case word names a content type.
pub(super) fn is_content_type(word: &str) -> bool {
    CONTENT_TYPES.contains(&word) || is_media_type(word)
}

fn is_media_type(word: &str) -> bool {
    ["application/", "text/"].iter().any(|kind| word.strip_prefix(kind).is_some_and(|rest| !rest.is_empty()))
}

/// Length of the content type that the lower-case word begins with.
pub(super) fn content_type_prefix(word: &str) -> Option<usize> {
    CONTENT_TYPES.iter().find(|name| word.starts_with(**name)).map(|name| name.len())
}

/// The name without a content type glued to its end (`shelljson`). A name whose last part is a word of its own
/// (`parse_json`, `toJson`, `geojson`) keeps it.
pub(super) fn without_glued_type(name: &str) -> &str {
    let Some(stem) = name.strip_suffix("json") else { return name };
    let is_own_word = !stem.ends_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        || JSON_WORDS.iter().any(|word| {
            name.strip_suffix(word).is_some_and(|rest| !rest.ends_with(|c: char| c.is_ascii_alphanumeric()))
        });
    if is_own_word { name } else { stem }
}

/// Levenshtein distance. Callers bound the lengths.
fn distance(a: &str, b: &str) -> usize {
    let b = b.as_bytes();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn obvious_misspellings_are_channels() {
        for (word, channel) in [
            ("commentary?", Channel::Commentary),
            ("––commentary", Channel::Commentary),
            ("comentary", Channel::Commentary),
            ("comment", Channel::Commentary),
            ("finall", Channel::Final),
            ("finalx", Channel::Final),
            ("Final", Channel::Final),
            ("fnal", Channel::Final),
            ("ANALYSIS", Channel::Analysis),
            ("analyis", Channel::Analysis),
        ] {
            assert_eq!(Channel::guess(word), Some(channel), "{word}");
        }
        for word in ["??", "", "fin", "signal", "banana", "json", "2", "финал"] {
            assert_eq!(Channel::guess(word), None, "{word}");
        }
    }

    #[test]
    fn glued_types_leave_names_that_end_in_json_alone() {
        for (name, clean) in [
            ("shelljson", "shell"),
            ("search2json", "search2"),
            ("get_weatherjson", "get_weather"),
            ("json", "json"),
            ("parse_json", "parse_json"),
            ("toJson", "toJson"),
            ("to-json", "to-json"),
            ("geojson", "geojson"),
            ("get_geojson", "get_geojson"),
            ("parseJSON", "parseJSON"),
        ] {
            assert_eq!(without_glued_type(name), clean);
        }
    }

    #[test]
    fn distances() {
        assert_eq!(distance("final", "final"), 0);
        assert_eq!(distance("finial", "final"), 1);
        assert_eq!(distance("", "final"), 5);
        assert_eq!(distance("sitting", "kitten"), 3);
    }
}
