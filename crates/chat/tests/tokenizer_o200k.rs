//! The tokenizer against tiktoken, on gpt-oss's real vocabulary.

use ctxserve_chat::testing::{o200k_ranks, o200k_special, o200k_tokenizer};
use proptest::prelude::*;

#[track_caller]
fn agree(text: &str) {
    let tokenizer = o200k_tokenizer();
    let ids = tokenizer.encode(text);
    let expected = tiktoken_rs::o200k_base_singleton().encode_ordinary(text);
    assert_eq!(ids, expected, "of {text:?}");
    assert_eq!(tokenizer.decode(&ids, true), text);
    assert_eq!(tokenizer.decode(&ids, false), text);
}

#[test]
fn english_and_contractions() {
    for text in [
        "",
        "a",
        "Hello, world! It's the model's turn; they'll say we've won, I'm SURE YOU'RE right, he'd know.",
        "DON'T can'T It'S ’s 's's''s 'ſ x'ſ naïve café façade Ångström coöperate",
        "CamelCase and snake_case and SCREAMING_CASE, kebab-case; HTTPServer2XML v1.2.3-rc.4+build.5",
        "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs!\n\nNew paragraph.",
        "https://example.org/a/b?c=d&e=%20f#g  user@example.org  (see §4.2, fig. 3) — “quoted” … ½ ™ ²³",
    ] {
        agree(text);
    }
}

#[test]
fn code() {
    for text in [
        include_str!("tokenizer_o200k.rs"),
        include_str!("../src/harmony/typescript.rs"),
        "def f(x):\n\tif x:\n\t\treturn {'a': [1, 2, 3]}\r\n    \r\n\r\n# end\n",
        "SELECT * FROM t WHERE a <> 'b' AND c >= 10; -- comment\n/* /// */ ///\n//\n",
        r#"{"query":"a \"b\"","n":[1,2.5e-10,null,true],"ü":"\u00fc"}"#,
        "<div class=\"x\">&nbsp;</div>\n<!-- <|not a token|> -->\n",
    ] {
        agree(text);
    }
}

#[test]
fn scripts_of_the_world() {
    for text in [
        "東京は日本の首都です。今天天气很好，我们去公园吧！안녕하세요 반갑습니다.",
        "Съешь же ещё этих мягких французских булок. Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
        "صِف خَلقَ خَودِ كَمِثلِ الشَمسِ إِذ بَزَغَت ١٢٣ שלום עולם",
        "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण ๐๑๒ ภาษาไทยไม่มีวรรค ქართული ენა",
        "e\u{301}e\u{300}\u{323} Z\u{351}\u{36b}a\u{343}lgo \u{301} \u{301}\u{301}a A\u{30a} \u{1100}\u{1161}\u{11a8}",
        "ǅ ʰ ª º Ⅷ ⅷ 𝒜𝓑𝕮 ﬁ ß ẞ İ ı ſ K Å",
    ] {
        agree(text);
    }
}

#[test]
fn emoji() {
    for text in
        ["👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇫🇷 #️⃣ ☃️ ❤️‍🔥 🦀🦀🦀", "a👨‍💻b 🧑🏿‍🚀\u{200d}\u{fe0f}\u{fe0e} \u{1f3fb}", "🙂 🙂  🙂\n🙂\t🙂"]
    {
        agree(text);
    }
}

#[test]
fn white_space_and_numbers() {
    for n in [1, 2, 3, 7, 80, 81, 500, 3_000] {
        agree(&" ".repeat(n));
        agree(&format!("{}x", " ".repeat(n)));
        agree(&format!("x{}\n{}y", " ".repeat(n), "\t".repeat(n)));
        agree(&"\n".repeat(n));
        agree(&"\r\n".repeat(n));
        agree(&"a".repeat(n));
        agree(&"A".repeat(n));
        agree(&"=".repeat(n));
        agree(&"9".repeat(n));
        agree(&"あ".repeat(n));
    }
    agree("\u{a0}\u{2003} \u{3000}x\u{2028}\u{85}\u{b}\u{c}\u{0}\u{1}\u{7f}\u{feff}");
    agree("1 12 123 1234 12345 1,234,567.89 0x1F 3.14159 １２３４ ٣٤٥٦ ½⅓");
}

#[test]
fn control_tokens_spelled_as_text_are_text() {
    for id in 199_998..201_088 {
        agree(&o200k_special(id));
    }
    agree("<|start|>assistant<|channel|>final<|message|>hi<|end|>");
}

#[test]
fn ids_and_bytes_are_tiktokens() {
    let tokenizer = o200k_tokenizer();
    assert_eq!(tokenizer.len(), 201_088);
    for (id, bytes) in (0..).zip(&o200k_ranks()) {
        assert_eq!(tokenizer.token_bytes(id), Some(bytes.as_slice()), "token {id}");
        assert!(!tokenizer.is_special(id));
    }
    for id in 199_998..201_088 {
        let name = o200k_special(id);
        assert_eq!(tokenizer.special_id(&name), Some(id));
        assert_eq!(tokenizer.token_bytes(id), Some(name.as_bytes()));
        assert!(tokenizer.is_special(id));
    }
    for id in [201_088, 1 << 20, u32::MAX] {
        assert_eq!(tokenizer.token_bytes(id), None);
        assert!(!tokenizer.is_special(id));
        assert_eq!(tokenizer.decode(&[id], false), "");
    }
}

#[test]
fn published_ids() {
    let tokenizer = o200k_tokenizer();
    for (text, ids) in [
        ("system", vec![17_360]),
        ("developer", vec![77_944]),
        ("user", vec![1_428]),
        ("assistant", vec![173_781]),
        ("functions", vec![44_580]),
        ("analysis", vec![35_644]),
        ("final", vec![17_196]),
        ("commentary", vec![12_606, 815]),
        (" to=", vec![316, 28]),
        ("json", vec![4_108]),
    ] {
        assert_eq!(tokenizer.encode(text), ids, "{text}");
    }
}

#[test]
fn control_tokens_in_trusted_text() {
    let tokenizer = o200k_tokenizer();
    assert_eq!(
        tokenizer.encode_with_control("<|start|>assistant<|channel|>final<|message|>a <|b|><|end|>"),
        [[200_006, 173_781, 200_005, 17_196, 200_008].as_slice(), &tokenizer.encode("a <|b|>"), &[200_007]]
            .concat()
    );
    assert!(tokenizer.encode_with_control("").is_empty());
    assert_eq!(tokenizer.encode_with_control("日本"), tokenizer.encode("日本"));
}

#[test]
fn cut_characters_are_byte_tokens() {
    let tokenizer = o200k_tokenizer();
    for bytes in [
        b"\xe2".as_slice(),
        b"\xe2\x82",
        b"\x82\xac",
        b"ok \xf0\x9f\xa6",
        b"\xff\xfe",
        b"a\xc3",
        b"",
        "€".as_bytes(),
    ] {
        let ids = tokenizer.encode_bytes(bytes).unwrap();
        let decoded: Vec<u8> =
            ids.iter().flat_map(|id| tokenizer.token_bytes(*id).unwrap()).copied().collect();
        assert_eq!(decoded, bytes);
    }
    assert_eq!(tokenizer.encode_bytes("plain".as_bytes()).unwrap(), tokenizer.encode("plain"));
}

/// Longer than what is encoded at once.
#[test]
fn long_text() {
    let source = include_str!("tokenizer_o200k.rs");
    agree(&source.repeat(2_600_000 / source.len()));
    agree(&"Съешь же ещё этих мягких французских булок.  Да выпей чаю! ".repeat(30_000));
    // A run that the library's regex engine gives up on.
    let text = format!("{}!", "A".repeat(12_000_000));
    let tokenizer = o200k_tokenizer();
    assert_eq!(tokenizer.decode(&tokenizer.encode(&text), true), text);
}

proptest! {
    #[test]
    fn random_text(text in ".{0,200}") {
        agree(&text);
    }

    #[test]
    fn random_bytes(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        agree(&String::from_utf8_lossy(&bytes));
        let tokenizer = o200k_tokenizer();
        let ids = tokenizer.encode_bytes(&bytes).unwrap();
        let decoded: Vec<u8> = ids.iter().flat_map(|id| tokenizer.token_bytes(*id).unwrap()).copied().collect();
        prop_assert_eq!(decoded, bytes);
    }

    #[test]
    fn random_mixtures(pieces in prop::collection::vec(
        prop_oneof![
            Just(" "), Just("  "), Just("\n"), Just("\r\n"), Just("\t"), Just("'s"), Just("'RE"), Just("é"), Just("\u{301}"),
            Just("日本"), Just("🦀"), Just("\u{200d}"), Just("12"), Just("3456"), Just("Word"), Just("lower"), Just("UPPER"),
            Just("<|end|>"), Just("//"), Just("..."), Just("_"), Just("\u{a0}"), Just("ǅ"), Just("ʰ"),
        ], 0..40,
    )) {
        agree(&pieces.concat());
    }
}
