//! Where templates come from, what they are told, and what is refused.

use ctxserve_chat::testing::{demo_tokenizer, qwen_tokenizer};
use ctxserve_chat::{
    Conversation, FormatError, FunctionTool, Message, PromptFiles, ReasoningEffort, ToolCall, formats,
};
use serde_json::{Value, json};

use super::{hermes, text_of, with_template};

fn user(text: &str) -> Message {
    Message::User { name: None, content: text.to_owned() }
}

fn asking(text: &str) -> Conversation {
    Conversation { messages: vec![user(text)], ..Conversation::default() }
}

fn read_tool() -> FunctionTool {
    FunctionTool {
        name: "Read".to_owned(),
        description: Some("Reads.".to_owned()),
        parameters: Some(json!({"type": "object"})),
        declaration: None,
    }
}

fn open(config: Value) -> Result<String, FormatError> {
    let files = PromptFiles { tokenizer_config: Some(config), ..PromptFiles::default() };
    let format = formats::open("hermes", qwen_tokenizer(), &files)?;
    let with_tools = Conversation { tools: vec![read_tool()], ..asking("a") };
    Ok(text_of(&*format, &asking("a")).unwrap() + "|" + &text_of(&*format, &with_tools).unwrap())
}

#[test]
fn templates_come_from_either_file() {
    assert_eq!(open(json!({ "chat_template": "x{{ messages[0].content }}" })).unwrap(), "xa|xa");
    let list =
        json!([{ "name": "tool_use", "template": "tools" }, { "name": "default", "template": "plain" }]);
    assert_eq!(open(json!({ "chat_template": list })).unwrap(), "plain|tools");
    assert_eq!(open(json!({ "chat_template": [{ "name": "only", "template": "one" }] })).unwrap(), "one|one");
    assert!(open(json!({})).unwrap().starts_with("<|im_start|>user\na<|im_end|>"));
    assert!(open(json!({ "chat_template": null })).is_ok());
    // The file of its own wins.
    let files = PromptFiles {
        chat_template: Some("own".to_owned()),
        tokenizer_config: Some(json!({ "chat_template": "config" })),
    };
    let format = formats::open("hermes", qwen_tokenizer(), &files).unwrap();
    assert_eq!(text_of(&*format, &asking("a")).unwrap(), "own");
}

#[test]
fn unusable_templates_are_refused_at_once() {
    for template in [
        json!("{% if %}"),
        json!("{{ a"),
        json!(7),
        json!([]),
        json!([{ "name": "a", "template": "x" }, { "name": "b", "template": "y" }]),
        json!("{% include 'other' %}"),
    ] {
        let error = open(json!({ "chat_template": template })).unwrap_err();
        assert!(matches!(error, FormatError::Template { .. }), "{error}");
    }
    let error = formats::open("hermes", demo_tokenizer(), &PromptFiles::default()).err().unwrap();
    assert_eq!(error, FormatError::MissingToken { format: "hermes", token: "<|im_start|>" });
}

#[test]
fn a_template_that_fails_is_the_request_s_error() {
    for (template, expected) in [
        ("{{ raise_exception('No ' ~ messages[0].content ~ '!') }}", "No <a>!"),
        ("{{ nothing.at.all }}", "cannot render"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", "too much"),
        ("{{ messages[0].content * 100000000 }}", "too much"),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recursion"),
    ] {
        let error = with_template(template).render(&asking("<a>")).unwrap_err();
        assert!(error.what.contains(expected) && error.message.is_none(), "{template}: {error}");
        assert_eq!(error.to_string(), error.what);
    }
}

#[test]
fn a_result_needs_an_earlier_call() {
    let call = Message::Assistant {
        reasoning: None,
        content: None,
        tool_calls: vec![ToolCall { id: "a".to_owned(), name: "f".to_owned(), arguments: String::new() }],
    };
    let result = |id: &str| Message::Tool { call_id: id.to_owned(), content: "r".to_owned() };
    for (messages, at) in [
        (vec![result("a")], 0),
        (vec![user("Hi"), result("a"), call.clone()], 1),
        (vec![user("Hi"), call.clone(), result("b")], 2),
    ] {
        let error = hermes().render(&Conversation { messages, ..Conversation::default() }).unwrap_err();
        assert_eq!(error.message, Some(at));
        assert!(error.to_string().contains("tool_call_id"), "{error}");
    }
    assert!(
        hermes()
            .render(&Conversation { messages: vec![call, result("a")], ..Conversation::default() })
            .is_ok()
    );
}

#[test]
fn declarations_are_shown_whole_or_made() {
    let shown = |tool: FunctionTool| {
        let text = text_of(&*hermes(), &Conversation { tools: vec![tool], ..asking("a") }).unwrap();
        let (_, rest) = text.split_once("<tools>\n").unwrap();
        rest.split_once("\n</tools>").unwrap().0.to_owned()
    };
    assert_eq!(
        shown(read_tool()),
        r#"{"type": "function", "function": {"name": "Read", "description": "Reads.", "parameters": {"type": "object"}}}"#
    );
    let declared = |json: &str| FunctionTool { declaration: Some(json.to_owned()), ..read_tool() };
    assert_eq!(
        shown(declared(r#"{"x":1,"function":{"name":"R"},"type":"function"}"#)),
        r#"{"x": 1, "function": {"name": "R"}, "type": "function"}"#
    );
    assert_eq!(
        shown(declared(r#"{"function":{"name":"R"}}"#)),
        r#"{"type": "function", "function": {"name": "R"}}"#
    );
    let deep = format!("{{\"function\":{}{}}}", "[".repeat(200), "]".repeat(200));
    let error = hermes().render(&Conversation { tools: vec![declared(&deep)], ..asking("a") }).unwrap_err();
    assert!(error.what.starts_with("tools[0]"), "{error}");
}

#[test]
fn templates_are_told_date_and_thinking() {
    let format = with_template(
        "{{ strftime_now('%d %b %Y') }} {{ enable_thinking is defined and enable_thinking }} {{ reasoning_effort | default('-') }}",
    );
    let told = |conversation: Conversation| text_of(&*format, &conversation).unwrap();
    let base = || Conversation { current_date: Some("2026-05-12".to_owned()), ..asking("a") };
    assert_eq!(told(base()), "12 May 2026 False -");
    assert_eq!(told(Conversation { thinking: Some(true), ..base() }), "12 May 2026 True -");
    let none = Some(ReasoningEffort::None);
    assert_eq!(told(Conversation { reasoning_effort: none, ..base() }), "12 May 2026 False none");
    assert_eq!(
        told(Conversation { reasoning_effort: none, thinking: Some(true), ..base() }),
        "12 May 2026 True none"
    );
    assert_eq!(
        told(Conversation { reasoning_effort: Some(ReasoningEffort::High), ..base() }),
        "12 May 2026 True high"
    );
    assert_eq!(told(asking("a")), " False -");
}

#[test]
fn templates_read_arguments_of_their_own() {
    let format = with_template(
        "{% set mine = 1 %}{% for m in messages %}{{ m.content }}{% endfor %}{{ style | default('-') }} {{ depth }} {{ mine }}\
         {{ strftime_now('') }}{{ bos_token }}{{ namespace(a=1).a }}{% if chat_template or tokenize or enable_thinking %}!{% endif %}",
    );
    assert_eq!(format.template_arguments(), ["depth", "style"]);
    let told = |arguments: serde_json::Value| {
        let serde_json::Value::Object(template_arguments) = arguments else { panic!("an object") };
        text_of(&*format, &Conversation { template_arguments, ..asking("a") }).unwrap()
    };
    assert_eq!(told(json!({})), "a-  11");
    assert_eq!(told(json!({"style": "brief", "depth": [1.0, {"é": null}]})), "abrief [1.0, {'é': None}] 11");
    // What the template does not read, and what is not an argument's to set, changes nothing.
    let others = json!({"mine": 2, "messages": [], "tokenize": true, "enable_thinking": true, "bos_token": "x", "namespace": 3});
    assert_eq!(told(others), "a-  11");
    // An argument's text is a client's.
    let control = json!({"style": "<|im_end|>"}).as_object().unwrap().clone();
    let ids = format.render(&Conversation { template_arguments: control, ..asking("a") }).unwrap();
    assert!(!ids.iter().any(|&id| qwen_tokenizer().is_control(id)), "{ids:?}");
    assert!(hermes().template_arguments().is_empty());
}

/// The parser begins where the prompt ends.
#[test]
fn the_prompt_s_end_tells_whether_it_is_thinking() {
    let tokenizer = qwen_tokenizer();
    for (prompt, open) in [
        ("<|im_start|>assistant\n", false),
        ("<|im_start|>assistant\n<think>\n", true),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", false),
        ("<|im_start|>assistant\n<think>a</think><think>", true),
        ("<think><|im_start|>assistant\n", false),
        ("<think>", false),
        ("", false),
    ] {
        assert_eq!(hermes().leaves_thinking_open(&tokenizer.encode_with_control(prompt)), open, "{prompt}");
    }
    // Written by a client it is text, and stands in another turn.
    let ids = hermes().render(&asking("<think>")).unwrap();
    assert!(!hermes().leaves_thinking_open(&ids));
}
