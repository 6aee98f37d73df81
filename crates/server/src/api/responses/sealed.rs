//! `encrypted_content` of reasoning items: what a client that keeps nothing else sends back.
//!
//! It is an encoding, not a secret: the same text stands beside it in the clear. So it holds no key, survives a restart and
//! is understood by every replica.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

const PREFIX: &str = "ctxr1.";

/// Encodes reasoning.
pub(super) fn seal(text: &str) -> String {
    let mut sealed = PREFIX.to_owned();
    URL_SAFE_NO_PAD.encode_string(text, &mut sealed);
    sealed
}

/// Decodes what [`seal`] made; `None` for anything else.
pub(super) fn open(sealed: &str) -> Option<String> {
    let bytes = URL_SAFE_NO_PAD.decode(sealed.strip_prefix(PREFIX)?).ok()?;
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_opens() {
        for text in ["", "Hm. 日本 🦀", "a\nb"] {
            assert_eq!(open(&seal(text)).as_deref(), Some(text));
        }
        for foreign in ["", "gAAAAABm", "ctxr1.!", "ctxr1._w"] {
            assert_eq!(open(foreign), None, "{foreign}");
        }
    }
}
