//! openai-harmony, working offline.

use std::path::PathBuf;
use std::sync::OnceLock;

use ctxserve_chat::testing::o200k_ranks;
use openai_harmony::chat::{
    Author, Content, DeveloperContent, Message, Role, SystemContent, ToolDescription,
};
use openai_harmony::{HarmonyEncoding, HarmonyEncodingName, load_harmony_encoding};

/// Name under which openai-harmony caches o200k_base: the hash of its address.
const CACHED_VOCABULARY: &str = "fb374d419588a4632f3f557e76b4b70aebbca790";

/// Puts the vocabulary where openai-harmony looks before it downloads. It checks the file's hash itself.
fn provide_vocabulary() {
    if std::env::var_os("TIKTOKEN_ENCODINGS_BASE").is_some() {
        return;
    }
    let dir = std::env::var_os("TIKTOKEN_RS_CACHE_DIR")
        .map_or_else(|| std::env::temp_dir().join("tiktoken-rs-cache"), PathBuf::from);
    std::fs::create_dir_all(&dir).expect("the cache directory can be made");
    let mut text = String::new();
    for (rank, token) in o200k_ranks().iter().enumerate() {
        text.push_str(&format!("{} {rank}\n", base64(token)));
    }
    let unfinished = dir.join(format!("{CACHED_VOCABULARY}.{}", std::process::id()));
    std::fs::write(&unfinished, text).expect("the vocabulary can be written");
    std::fs::rename(&unfinished, dir.join(CACHED_VOCABULARY)).expect("the vocabulary can be renamed");
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let bits =
            chunk.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for digit in 0..4 {
            let value = (bits >> (18 - 6 * digit)) & 63;
            out.push(if digit <= chunk.len() { char::from(DIGITS[value as usize]) } else { '=' });
        }
    }
    out
}

fn encoding() -> &'static HarmonyEncoding {
    static ENCODING: OnceLock<HarmonyEncoding> = OnceLock::new();
    ENCODING.get_or_init(|| {
        provide_vocabulary();
        load_harmony_encoding(HarmonyEncodingName::HarmonyGptOss).expect("the vocabulary is in place")
    })
}

/// The reference's prompt ids, with its own default of dropping analysis, or without.
pub(crate) fn render(messages: &[Message], keep_reasoning: bool) -> Vec<u32> {
    let config = if keep_reasoning { None } else { Some(&Default::default()) };
    encoding()
        .render_conversation_for_completion(messages, Role::Assistant, config)
        .expect("the reference renders")
}

pub(crate) fn decode(ids: &[u32]) -> String {
    encoding().tokenizer().decode_utf8(ids.iter().copied()).unwrap_or_else(|e| format!("(not UTF-8: {e})"))
}

pub(crate) fn system(content: SystemContent) -> Message {
    Message::from_role_and_content(Role::System, content)
}

pub(crate) fn developer(instructions: Option<&str>, tools: Vec<ToolDescription>) -> Message {
    let mut content = DeveloperContent::new();
    if let Some(text) = instructions {
        content = content.with_instructions(text);
    }
    if !tools.is_empty() {
        content = content.with_function_tools(tools);
    }
    Message::from_role_and_content(Role::Developer, content)
}

pub(crate) fn user(text: &str) -> Message {
    Message::from_role_and_content(Role::User, text)
}

pub(crate) fn assistant(channel: &str, text: &str) -> Message {
    Message::from_role_and_content(Role::Assistant, text).with_channel(channel)
}

pub(crate) fn call(function: &str, arguments: &str) -> Message {
    assistant("commentary", arguments)
        .with_recipient(format!("functions.{function}"))
        .with_content_type("<|constrain|>json")
}

pub(crate) fn result(function: &str, text: &str) -> Message {
    let author = Author::new(Role::Tool, format!("functions.{function}"));
    Message::from_author_and_content(author, Content::from(text))
        .with_recipient("assistant")
        .with_channel("commentary")
}
