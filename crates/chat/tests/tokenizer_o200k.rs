//! The tokenizer against tiktoken, on gpt-oss's real vocabulary.

use ctxserve_chat::testing::{o200k_special, o200k_tokenizer};

fn agree(text: &str) {
    let tokenizer = o200k_tokenizer();
    let ids = tokenizer.encode(text);
    let expected = tiktoken_rs::o200k_base_singleton().encode_ordinary(text);
    assert_eq!(ids, expected, "of {text:?}");
    assert_eq!(tokenizer.decode(&ids, true), text);
    assert_eq!(tokenizer.decode(&ids, false), text);
}

#[test]
fn ordinary_text() {
    for text in [
        "",
        "a",
        "Hello, world! It's the model's turn; they'll say we've won, I'm SURE YOU'RE right, he'd know.",
        "CamelCase and snake_case and SCREAMING_CASE, kebab-case; HTTPServer2XML v1.2.3-rc.4+build.5",
    ] {
        agree(text);
    }
}
