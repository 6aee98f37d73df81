//! The bytes of every token, by id.

use ctxserve_core::TokenId;

use super::file::{Contents, Spelling};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// No such id.
    Absent,
    Normal,
    /// A control token whose text is shown.
    Shown,
    /// A control token whose text is not.
    Special,
}

#[derive(Clone, Copy)]
struct Entry {
    start: u32,
    len: u32,
    kind: Kind,
}

/// Bytes of every token, in one buffer. Ids without a token have none, so no id is an error.
pub(super) struct TokenTable {
    entries: Vec<Entry>,
    buffer: Vec<u8>,
}

impl TokenTable {
    pub(super) fn new(contents: &Contents) -> Self {
        let ids = contents.vocab.iter().map(|(_, id)| *id).chain(contents.added.iter().map(|token| token.id));
        let len = ids.max().map_or(0, |id| id as usize + 1);
        let mut table =
            Self { entries: vec![Entry { start: 0, len: 0, kind: Kind::Absent }; len], buffer: Vec::new() };
        let alphabet = Alphabet::new();
        for (token, id) in &contents.vocab {
            match contents.spelling {
                Spelling::ByteLevel => match alphabet.bytes(token) {
                    Some(bytes) => table.set(*id, &bytes, Kind::Normal),
                    None => table.set(*id, token.as_bytes(), Kind::Normal),
                },
                Spelling::Plain { metaspace, bytes } => match byte_token(token) {
                    Some(byte) if bytes => table.set(*id, &[byte], Kind::Normal),
                    _ if metaspace => table.set(*id, token.replace('▁', " ").as_bytes(), Kind::Normal),
                    _ => table.set(*id, token.as_bytes(), Kind::Normal),
                },
            }
        }
        for token in &contents.added {
            let kind = match (token.is_special(), token.is_control()) {
                (true, _) => Kind::Special,
                (false, true) => Kind::Shown,
                (false, false) => Kind::Normal,
            };
            table.set(token.id, token.content.as_bytes(), kind);
        }
        table
    }

    fn set(&mut self, id: TokenId, bytes: &[u8], kind: Kind) {
        // Saturation is unreachable: the buffer holds at most what the size-limited file spelled.
        let start = u32::try_from(self.buffer.len()).unwrap_or(u32::MAX);
        let len = u32::try_from(bytes.len()).unwrap_or(0);
        if let Some(entry) = self.entries.get_mut(id as usize) {
            *entry = Entry { start, len, kind };
            self.buffer.extend_from_slice(bytes);
        }
    }

    /// Highest id + 1.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn bytes(&self, id: TokenId) -> Option<&[u8]> {
        let entry = self.entries.get(id as usize)?;
        if entry.kind == Kind::Absent {
            return None;
        }
        self.buffer.get(entry.start as usize..entry.start as usize + entry.len as usize)
    }

    pub(super) fn is_special(&self, id: TokenId) -> bool {
        self.kind(id) == Kind::Special
    }

    pub(super) fn is_control(&self, id: TokenId) -> bool {
        matches!(self.kind(id), Kind::Special | Kind::Shown)
    }

    fn kind(&self, id: TokenId) -> Kind {
        self.entries.get(id as usize).map_or(Kind::Absent, |entry| entry.kind)
    }

    /// For each byte the normal token that is it alone.
    pub(super) fn byte_ids(&self) -> Box<[Option<TokenId>; 256]> {
        let mut ids = Box::new([None; 256]);
        for (id, entry) in (0..).zip(&self.entries) {
            if entry.kind == Kind::Normal
                && entry.len == 1
                && let Some(byte) = self.buffer.get(entry.start as usize)
            {
                ids[usize::from(*byte)].get_or_insert(id);
            }
        }
        ids
    }
}

/// `<0x0A>` in vocabularies with byte fallback.
fn byte_token(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let digits = hex.len() == 2 && hex.bytes().all(|digit| digit.is_ascii_hexdigit());
    if digits { u8::from_str_radix(hex, 16).ok() } else { None }
}

/// GPT-2's alphabet inverted: printable Latin-1 stands for itself, every other byte for the next free code point
/// from U+0100 on.
struct Alphabet {
    byte_of: [Option<u8>; 0x144],
}

impl Alphabet {
    fn new() -> Self {
        let mut byte_of = [None; 0x144];
        let mut next = 0x100;
        for byte in 0..=u8::MAX {
            let char = if matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff) {
                usize::from(byte)
            } else {
                next += 1;
                next - 1
            };
            byte_of[char] = Some(byte);
        }
        Self { byte_of }
    }

    /// `None` if a character is not of the alphabet; such a token stands for its own text.
    fn bytes(&self, token: &str) -> Option<Vec<u8>> {
        token.chars().map(|c| self.byte_of.get(c as usize).copied().flatten()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_covers_every_byte_once() {
        let alphabet = Alphabet::new();
        let mut bytes: Vec<u8> = alphabet.byte_of.iter().flatten().copied().collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(alphabet.bytes("ĠaĊ"), Some(b" a\n".to_vec()));
        assert_eq!(alphabet.bytes("日"), None);
    }

    #[test]
    fn byte_tokens_have_two_hex_digits() {
        assert_eq!(byte_token("<0x0A>"), Some(10));
        assert_eq!(byte_token("<0xA>"), None);
        assert_eq!(byte_token("<0x+A>"), None);
        assert_eq!(byte_token("a"), None);
    }
}
