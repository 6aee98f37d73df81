//! Headers that nobody wrote on purpose: no panic, no allocation beyond the input, no entry outside it.

use proptest::prelude::*;

use super::read;
use crate::dtype::Dtype;
use crate::source::Source;

fn file(header: &[u8], data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header, &vec![0; data]].concat()
}

/// What must hold of anything that is accepted.
fn accepted_entries_tile_the_file(bytes: Vec<u8>) -> bool {
    let len = bytes.len() as u64;
    let Ok(entries) = read(&Source::memory(bytes)) else { return false };
    let mut at = entries.first().map_or(len, |entry| entry.offset);
    for entry in &entries {
        assert_eq!(entry.offset, at, "{entry:?}");
        let dims: Vec<u64> = entry.shape.iter().map(|&dim| dim as u64).collect();
        assert_eq!(entry.dtype.bytes(&dims), Some(entry.bytes as u64), "{entry:?}");
        at += entry.bytes as u64;
    }
    assert_eq!(at, len);
    true
}

fn valid() -> Vec<u8> {
    let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"BF16","shape":[4],"data_offsets":[24,32]},"c":{"dtype":"U8","shape":[],"data_offsets":[32,33]}}"#;
    file(header.as_bytes(), 33)
}

/// Headers of the right form with wrong numbers.
fn header() -> impl Strategy<Value = (String, usize)> {
    let number = prop_oneof![
        4 => (0_u64..64).prop_map(|n| n.to_string()),
        1 => prop::sample::select(vec!["-1", "1e3", "18446744073709551615", "18446744073709551616", "null", "[]"])
            .prop_map(str::to_owned),
    ];
    let dtype = prop::sample::select(vec!["F32", "BF16", "U8", "F4", "I64", "F8_E4M3", "Q4", ""]);
    let name = prop::sample::select(vec!["a", "b", "c", "__metadata__", ""]);
    let entry = (name, dtype, prop::collection::vec(number.clone(), 0..4), number.clone(), number).prop_map(
        |(name, dtype, shape, begin, end)| {
            let shape = shape.join(",");
            format!(r#""{name}":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{begin},{end}]}}"#)
        },
    );
    (
        prop::collection::vec(entry, 0..4).prop_map(|entries| format!("{{{}}}", entries.join(","))),
        0_usize..128,
    )
}

/// Shapes whose tensors follow each other, under any JSON spacing: what must be accepted.
fn honest() -> impl Strategy<Value = (Vec<(Dtype, Vec<u64>)>, usize)> {
    let dtype = prop::sample::select(vec![Dtype::F32, Dtype::BF16, Dtype::U8, Dtype::I64, Dtype::F8_E8M0]);
    let shape = prop::collection::vec(0_u64..5, 0..4);
    (prop::collection::vec((dtype, shape), 0..6), 0_usize..9)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        accepted_entries_tile_the_file(bytes);
    }

    #[test]
    fn any_header_bytes(header in prop::collection::vec(any::<u8>(), 0..200), data in 0_usize..64) {
        accepted_entries_tile_the_file(file(&header, data));
    }

    #[test]
    fn any_numbers((header, data) in header()) {
        accepted_entries_tile_the_file(file(header.as_bytes(), data));
    }

    #[test]
    fn one_byte_changed(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = valid();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        accepted_entries_tile_the_file(bytes);
    }

    #[test]
    fn any_cut(at in any::<prop::sample::Index>()) {
        let mut bytes = valid();
        bytes.truncate(at.index(bytes.len()));
        prop_assert!(!accepted_entries_tile_the_file(bytes), "every proper prefix is truncated");
    }

    #[test]
    fn honest_files_are_accepted((tensors, padding) in honest()) {
        let mut at = 0;
        let entries: Vec<String> = tensors.iter().enumerate().map(|(i, (dtype, shape))| {
            let end = at + dtype.bytes(shape).unwrap();
            let entry = format!(r#""t{i}":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{at},{end}]}}"#);
            at = end;
            entry
        }).collect();
        let header = format!("{{{}}}{}", entries.join(","), " ".repeat(padding));
        prop_assert!(accepted_entries_tile_the_file(file(header.as_bytes(), at as usize)));
    }
}

#[test]
fn the_valid_example_is_valid() {
    assert!(accepted_entries_tile_the_file(valid()));
}
