//! Long text cut where no token crosses.

/// The library keeps some fifty bytes of bookkeeping a byte of text, and its regex engine gives up on runs of ten
/// million like characters: no call gets more than this.
const SEGMENT_BYTES: usize = 1 << 20;

/// Text that the library still fails on is retried in pieces of this size.
const PIECE_BYTES: usize = 4 << 10;

/// Segments of at most a MiB. The split regexes of byte-level vocabularies (GPT-2 to o200k, Qwen) let no token cross
/// the place where a space follows something that is not white space, or a letter or digit a line break, so cuts there
/// change nothing. A MiB without such a place is cut anyway: the ids still spell the text.
pub(super) fn segments(text: &str) -> impl Iterator<Item = &str> {
    cut(text, |rest| {
        if rest.len() <= SEGMENT_BYTES {
            return rest.len();
        }
        let limit = rest.floor_char_boundary(SEGMENT_BYTES);
        let window = &rest[..limit];
        // Backwards, looking at each character and the one in front of it.
        let mut following: Option<(usize, char)> = None;
        for (at, current) in window.char_indices().rev().take(SEGMENT_BYTES / 2) {
            if let Some((place, next)) = following
                && ((next == ' ' && !current.is_whitespace()) || (current == '\n' && next.is_alphanumeric()))
            {
                return place;
            }
            following = Some((at, current));
        }
        limit
    })
}

/// Pieces of a few KiB, cut between any two characters.
pub(super) fn pieces(text: &str) -> impl Iterator<Item = &str> {
    cut(text, |rest| rest.floor_char_boundary(PIECE_BYTES))
}

fn cut(text: &str, place: impl Fn(&str) -> usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (head, tail) = rest.split_at(place(rest));
        rest = tail;
        Some(head)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn cuts(text: &str) -> Vec<&str> {
        let found: Vec<&str> = segments(text).collect();
        assert_eq!(found.concat(), text);
        assert!(found.iter().all(|segment| !segment.is_empty() && segment.len() <= SEGMENT_BYTES));
        found
    }

    #[test]
    fn short_text_is_whole() {
        assert!(cuts("").is_empty());
        assert_eq!(cuts("a b"), ["a b"]);
        assert_eq!(cuts(&"a ".repeat(SEGMENT_BYTES / 2)).len(), 1);
    }

    #[test]
    fn cuts_are_where_no_token_crosses() {
        for (unit, starts) in [
            ("word  word,\n", ["  ", "wo"]),
            ("日本\n", ["日", "日"]),
            ("x\n\n/y\n", ["x", "x"]),
            ("é, ", [" ", " "]),
        ] {
            let text = unit.repeat(3 * SEGMENT_BYTES / unit.len());
            let found = cuts(&text);
            assert!(found.len() >= 3);
            assert!(
                found[1..].iter().all(|segment| starts.iter().any(|s| segment.starts_with(s))),
                "{unit:?}"
            );
        }
    }

    #[test]
    fn text_without_a_place_is_cut_between_characters() {
        for unit in ["日", " ", "🦀", "A", "\n"] {
            assert!(cuts(&unit.repeat(3 * SEGMENT_BYTES / unit.len())).len() >= 3, "{unit:?}");
        }
        assert_eq!(pieces(&"日".repeat(PIECE_BYTES)).collect::<String>().len(), 3 * PIECE_BYTES);
    }
}
