//! Streaming gives what one-shot decoding gives, in whole characters, however the stream is cut.

use ctxserve_chat::testing::{demo_tokenizer, o200k_tokenizer};
use ctxserve_chat::{Detokenizer, Utf8Stream};
use proptest::prelude::*;

fn stream<'a>(chunks: impl IntoIterator<Item = &'a [u8]>) -> String {
    let (mut stream, mut out) = (Utf8Stream::default(), String::new());
    for chunk in chunks {
        stream.push(chunk, &mut out);
    }
    stream.finish(&mut out);
    out
}

#[track_caller]
fn every_cut(bytes: &[u8]) {
    let whole = String::from_utf8_lossy(bytes);
    assert_eq!(stream([bytes]), whole, "{bytes:02x?} at once");
    assert_eq!(stream(bytes.chunks(1)), whole, "{bytes:02x?} byte by byte");
    for first in 0..=bytes.len() {
        for second in first..=bytes.len() {
            let chunks = [&bytes[..first], &bytes[first..second], &bytes[second..]];
            assert_eq!(stream(chunks), whole, "{bytes:02x?} cut at {first} and {second}");
        }
    }
}

/// OAI-16.
#[test]
fn known_sequences_at_every_cut() {
    for bytes in [
        b"".as_slice(),
        "aé€🦀z".as_bytes(),
        "👩‍👧".as_bytes(),
        b"\xf0\x9f\xa6",
        b"\xf0\x9f\xa6a",
        b"\xe2\x82\xe2\x82\xac",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xf8\x88\x80\x80\x80",
        b"\xe0\x80\xaf",
        b"\x80\x80\xff\xfe",
        b"a\xe2\x28\xa1",
        b"\xf1\x80\xc2",
    ] {
        every_cut(bytes);
    }
}

/// OAI-16.
#[test]
fn a_character_comes_when_it_is_whole() {
    let (mut stream, mut out) = (Utf8Stream::default(), String::new());
    for byte in [0xf0, 0x9f, 0xa6] {
        stream.push(&[byte], &mut out);
        assert_eq!(out, "");
        assert!(stream.is_mid_character());
    }
    stream.push(&[0x80], &mut out);
    assert_eq!(out, "🦀");
    assert!(!stream.is_mid_character());
    stream.finish(&mut out);
    assert_eq!(out, "🦀");
}

#[test]
fn certain_text_is_not_held_back() {
    let (mut stream, mut out) = (Utf8Stream::default(), String::new());
    stream.push(b"ab\xffc\xe2", &mut out);
    assert_eq!(out, "ab\u{fffd}c");
    // What follows shows that the character will never be whole.
    stream.push(b"d", &mut out);
    assert_eq!(out, "ab\u{fffd}c\u{fffd}d");
}

#[test]
fn a_finished_stream_is_as_new() {
    let (mut stream, mut out) = (Utf8Stream::default(), String::new());
    stream.push(b"\xe2\x82", &mut out);
    stream.finish(&mut out);
    stream.finish(&mut out);
    stream.push(b"\xac", &mut out);
    assert_eq!(out, "\u{fffd}\u{fffd}");
}

#[test]
fn every_token_alone() {
    for tokenizer in [o200k_tokenizer(), demo_tokenizer()] {
        for id in 0..tokenizer.len() as u32 + 3 {
            let mut detokenizer = Detokenizer::new(tokenizer.clone());
            let text = detokenizer.push(id) + &detokenizer.finish();
            assert_eq!(text, tokenizer.decode(&[id], true), "token {id}");
        }
    }
}

proptest! {
    /// OAI-16: of any bytes.
    #[test]
    fn any_bytes_at_any_cut(chunks in prop::collection::vec(prop::collection::vec(
        prop_oneof![any::<u8>(), 0x80..0xc0_u8, Just(0xe2), Just(0xf0), Just(0x9f), Just(0xed)], 0..6), 0..20))
    {
        let whole = chunks.concat();
        prop_assert_eq!(stream(chunks.iter().map(Vec::as_slice)), String::from_utf8_lossy(&whole));
    }

    /// Low ids are single bytes in both vocabularies, so that characters are often cut.
    #[test]
    fn any_ids(ids in prop::collection::vec(prop_oneof![0..256_u32, 0..3_100_u32, 0..201_200_u32, any::<u32>()], 0..60)) {
        for tokenizer in [o200k_tokenizer(), demo_tokenizer()] {
            let mut detokenizer = Detokenizer::new(tokenizer.clone());
            let mut text = String::new();
            for (seen, id) in (1..).zip(&ids) {
                text.push_str(&detokenizer.push(*id));
                let so_far = tokenizer.decode(&ids[..seen], true);
                prop_assert!(so_far.starts_with(&text), "{:?} then became {:?}", text, so_far);
            }
            text.push_str(&detokenizer.finish());
            prop_assert_eq!(text, tokenizer.decode(&ids, true));
        }
    }
}
