//! API keys: kept as digests, compared in constant time, never shown.

use std::fmt;
use std::hint::black_box;

use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use sha2::{Digest, Sha256};

/// Where Anthropic's clients put their key. Every route takes either header.
const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

type Hash = [u8; 32];

/// Keys that clients may present; none means that nobody needs one.
///
/// Only digests are kept: comparing them takes the same time whatever the lengths of keys are and wherever they differ, and
/// nothing that prints this can show a key.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct ApiKeys(Vec<Hash>);

/// How a request's key was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Presented {
    /// The key with this index.
    Known(usize),
    /// One that is not among them.
    Unknown,
    /// None.
    Absent,
}

impl ApiKeys {
    /// Of the keys themselves. White space around a key is no part of it, as in headers.
    pub fn new<K: AsRef<str>>(keys: impl IntoIterator<Item = K>) -> Self {
        Self(keys.into_iter().map(|key| digest(key.as_ref().trim().as_bytes())).collect())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nobody needs one.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The key of a request: `Authorization: Bearer KEY` or `X-Api-Key: KEY`. If it has both, either will do.
    pub(crate) fn of(&self, headers: &HeaderMap) -> Presented {
        let bearers = headers.get_all(AUTHORIZATION).iter().map(HeaderValue::as_bytes).map(bearer);
        let plain = headers.get_all(X_API_KEY).iter().map(|value| value.as_bytes().trim_ascii());
        bearers.chain(plain).map(|key| self.find(key)).fold(Presented::Absent, |best, next| {
            match (best, next) {
                (Presented::Known(_), _) | (Presented::Unknown, Presented::Unknown) => best,
                _ => next,
            }
        })
    }

    fn find(&self, key: &[u8]) -> Presented {
        let presented = digest(key);
        let mut found = Presented::Unknown;
        for (index, known) in self.0.iter().enumerate() {
            let difference = known.iter().zip(&presented).fold(0, |sum, (a, b)| black_box(sum | (a ^ b)));
            if difference == 0 {
                found = Presented::Known(index);
            }
        }
        found
    }
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} keys", self.0.len())
    }
}

fn digest(key: &[u8]) -> Hash {
    Sha256::digest(key).into()
}

/// The key in the header's value; empty under another scheme, which no key is.
fn bearer(value: &[u8]) -> &[u8] {
    let (scheme, key) = value.split_at(value.len().min(7));
    if scheme.eq_ignore_ascii_case(b"bearer ") { key.trim_ascii() } else { b"" }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(of: &[(&'static str, &'static str)]) -> HeaderMap {
        let pair = |&(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value));
        of.iter().map(pair).collect()
    }

    #[test]
    fn either_header_will_do() {
        let keys = ApiKeys::new(["first", "second\n"]);
        let cases: &[(&[(&str, &str)], Presented)] = &[
            (&[], Presented::Absent),
            (&[("authorization", "Bearer first")], Presented::Known(0)),
            (&[("authorization", "bEARER   second ")], Presented::Known(1)),
            (&[("x-api-key", "second")], Presented::Known(1)),
            (&[("authorization", "Bearer none"), ("x-api-key", "first")], Presented::Known(0)),
            (&[("authorization", "Bearer first"), ("x-api-key", "none")], Presented::Known(0)),
            (&[("authorization", "Basic first")], Presented::Unknown),
            (&[("authorization", "Bearer")], Presented::Unknown),
            (&[("authorization", "")], Presented::Unknown),
            (&[("x-api-key", "")], Presented::Unknown),
        ];
        for (given, found) in cases {
            assert_eq!(keys.of(&headers(given)), *found, "{given:?}");
        }
    }

    #[test]
    fn keys_compare_whole_and_are_not_shown() {
        let keys = ApiKeys::new(["secret"]);
        assert_eq!(keys.find(b"secret"), Presented::Known(0));
        for other in [&b"secreu"[..], b"secre", b"secret1", b"Secret", b"", b"secret\0"] {
            assert_eq!(keys.find(other), Presented::Unknown);
        }
        assert_eq!(format!("{keys:?}"), "1 keys");
    }
}
