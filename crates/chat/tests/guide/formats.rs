//! Guides and parsers of both formats, held together by random play.

use ctxserve_chat::guide::{CallRule, Demands, Grammar};
use ctxserve_chat::{Finish, ParsedMessage};
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::common::{Bench, FORMATS, Random, object, schema_of, tool, validate};

const MOST: usize = 4000;

/// Calls are of declared functions, and their arguments what was asked.
fn check_calls(message: &ParsedMessage, demands: &Demands) {
    for call in &message.calls {
        let tool = demands.tools.iter().find(|tool| tool.name == call.name);
        let tool = tool.unwrap_or_else(|| panic!("{} is not on offer", call.name));
        if tool.strict || demands.calls == CallRule::Required {
            let value: Value = serde_json::from_str(&call.arguments).expect(&call.arguments);
            assert_eq!(validate(&value, tool.parameters.as_ref().unwrap()), Ok(()));
        }
    }
    if demands.one_call {
        assert!(message.calls.len() <= 1);
    }
}

fn demands(random: &mut Random) -> Demands {
    let names = ["get_weather", "get", "Grep", "read-file.v2"];
    let tools: Vec<_> = names
        .iter()
        .take(random.below(names.len() + 1))
        .map(|name| tool(name, object(random, 2), random.one_in(2)))
        .collect();
    let calls = if tools.is_empty() {
        CallRule::Free
    } else {
        *random.of(&[CallRule::Free, CallRule::Required, CallRule::Required, CallRule::Forbidden])
    };
    let content = random.one_in(2).then(|| match random.below(4) {
        0 => Grammar::Regex("[a-c]{3,9}x".to_owned()),
        1 => Grammar::Choice(vec!["yes".to_owned(), "no, never".to_owned()]),
        _ => Grammar::Json { schema: object(random, 2), strict: true },
    });
    Demands { tools, calls, one_call: random.one_in(2), content }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// HAR-11, HAR-12, HAR-13, HAR-14, HER-05: whatever is asked, and whatever a model picks of what is allowed, the
    /// parser finds declared and valid calls, and content that is in its grammar; nothing has to be recovered from.
    #[test]
    fn what_is_allowed_is_read_as_what_was_asked(seed: u64) {
        let mut random = Random(seed);
        let bench = Bench::new(random.of::<&str>(&FORMATS));
        let demands = demands(&mut random);
        prop_assume!(demands.is_any());
        let thinking = bench.format.name() == "hermes" && random.one_in(2);
        let mut guide = bench.guide(&demands, thinking);
        let Some(ids) = bench.play(&mut *guide, &mut random, MOST) else { return Ok(()) };
        let shown = bench.tokenizer.decode(&ids, false);
        let (message, finish, recoveries) = bench.parse(&ids, &demands, thinking);
        check_calls(&message, &demands);
        match demands.calls {
            CallRule::Required => prop_assert!(!message.calls.is_empty(), "{}", shown),
            CallRule::Forbidden => prop_assert!(message.calls.is_empty(), "{}", shown),
            CallRule::Free => {}
        }
        if message.calls.is_empty() {
            prop_assert_eq!(finish, Finish::Stop);
            let content = message.content.clone().unwrap_or_default();
            match &demands.content {
                Some(grammar @ Grammar::Json { .. }) => {
                    let value: Value = serde_json::from_str(&content).expect(&shown);
                    prop_assert_eq!(validate(&value, schema_of(grammar)), Ok(()));
                }
                Some(Grammar::Regex(_)) => {
                    prop_assert!(content.ends_with('x') && (4..=10).contains(&content.len()), "{}", shown);
                }
                Some(Grammar::Choice(list)) => prop_assert!(list.contains(&content), "{}", shown),
                _ => {}
            }
        } else {
            prop_assert_eq!(finish, Finish::ToolCalls);
            if demands.content.is_some() {
                prop_assert!(message.content.is_none(), "text beside calls: {}", shown);
            }
        }
        let bound = demands.tools.iter().all(|tool| tool.strict || demands.calls == CallRule::Required);
        if bound && bench.format.name() == "harmony" {
            // Reserved tokens in reasoning are dropped, and noted.
            let odd = recoveries.iter().any(|name| *name != "unknown_control");
            prop_assert!(!odd, "{:?}: {}", recoveries, shown);
        }
    }

    /// A copy of a guide goes the same way and disturbs nothing.
    #[test]
    fn copies_are_independent(seed: u64) {
        let mut random = Random(seed);
        let bench = Bench::new(random.of::<&str>(&FORMATS));
        let tools = vec![tool("f", object(&mut random, 2), true)];
        let demands = Demands { tools, calls: CallRule::Required, ..Demands::default() };
        let mut guide = bench.guide(&demands, false);
        for _ in 0..random.below(40) {
            let mut copy = guide.fork();
            let allowed = guide.allowed().unwrap();
            prop_assert_eq!(&copy.allowed().unwrap(), &allowed);
            let other = bench.pick(&allowed, &mut random);
            copy.accept(other).unwrap();
            prop_assert_eq!(&guide.allowed().unwrap(), &allowed);
            guide.accept(bench.pick(&allowed, &mut random)).unwrap();
            if guide.is_settled() {
                break;
            }
        }
    }
}

/// The model's usual way of writing is allowed, token for token.
fn allows(name: &str, demands: &Demands, thinking: bool, text: &str) -> Result<(), String> {
    let bench = Bench::new(name);
    let mut guide = bench.guide(demands, thinking);
    for id in bench.tokenizer.encode_with_control(text) {
        if !guide.allowed().unwrap().allows(id) {
            let token = bench.tokenizer.token_text(id);
            return Err(format!("{token:?} is not allowed in {text:?}"));
        }
        guide.accept(id).unwrap();
    }
    Ok(())
}

fn weather(strict: bool, calls: CallRule, content: Option<Grammar>) -> Demands {
    let parameters = json!({
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
        "additionalProperties": false,
    });
    Demands { tools: vec![tool("get_weather", parameters, strict)], calls, one_call: false, content }
}

/// HAR-04, HAR-11: the headers that gpt-oss writes are legal, recipient before or behind the channel.
#[test]
fn harmony_as_models_write_it() {
    let analysis = "<|channel|>analysis<|message|>Hm. <Let me> see {\"a\": 1}<|end|><|start|>assistant";
    let body = "<|message|>{\"city\": \"Bern\"}<|call|>";
    let required = weather(false, CallRule::Required, None);
    for header in [
        "<|channel|>commentary to=functions.get_weather <|constrain|>json",
        "<|channel|>commentary to=functions.get_weather json",
        "<|channel|>commentary to=functions.get_weather",
        " to=functions.get_weather<|channel|>commentary <|constrain|>json",
        " to=functions.get_weather<|channel|>commentary",
    ] {
        assert_eq!(allows("harmony", &required, false, &format!("{analysis}{header}{body}")), Ok(()));
        assert_eq!(allows("harmony", &required, false, &format!("{header}{body}")), Ok(()));
    }
    let preamble = "<|channel|>commentary<|message|>I will look.<|end|><|start|>assistant";
    let call = format!("{analysis}{preamble}<|channel|>commentary to=functions.get_weather{body}");
    assert_eq!(allows("harmony", &required, false, &call), Ok(()));
    let answer = "<|channel|>final<|message|>Hello<|return|>";
    assert!(allows("harmony", &required, false, answer).is_err());
    let strict = weather(true, CallRule::Free, None);
    assert_eq!(allows("harmony", &strict, false, &format!("{analysis}{answer}")), Ok(()));
    assert_eq!(allows("harmony", &strict, false, &call), Ok(()));
    let none = weather(true, CallRule::Forbidden, None);
    assert_eq!(allows("harmony", &none, false, &format!("{analysis}{answer}")), Ok(()));
    assert!(allows("harmony", &none, false, &call).is_err());
}

/// HAR-12: neither an undeclared name nor other arguments can be sampled.
#[test]
fn harmony_strict_functions() {
    let strict = weather(true, CallRule::Free, None);
    let head = "<|channel|>commentary to=functions.";
    for bad in ["get_time<|message|>{}", "get_weather<|message|>{}", "get_weather<|message|>{\"city\": 7}"] {
        assert!(allows("harmony", &strict, false, &format!("{head}{bad}<|call|>")).is_err(), "{bad}");
    }
    // A call that is not strict says what it likes.
    let mut two = strict;
    two.tools.push(tool("note", json!({"type": "object"}), false));
    assert_eq!(allows("harmony", &two, false, &format!("{head}note<|message|>no JSON<|call|>")), Ok(()));
}

/// HAR-13, HAR-14: analysis stays free, the header of the final message legal, and calls possible.
#[test]
fn harmony_with_a_response_format() {
    let schema = json!({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": false});
    let content = Some(Grammar::Json { schema, strict: true });
    let demands = weather(false, CallRule::Free, content);
    let analysis = "<|channel|>analysis<|message|>No JSON here.<|end|><|start|>assistant";
    for good in [
        "<|channel|>final<|message|>{\"ok\": true}<|return|>",
        "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{\"city\": 3}<|call|>",
    ] {
        assert_eq!(allows("harmony", &demands, false, &format!("{analysis}{good}")), Ok(()));
    }
    for bad in [
        "<|channel|>final<|message|>ok",
        "<|channel|>final<|message|>{\"ok\": 1",
        "<|channel|>commentary<|message|>",
    ] {
        assert!(allows("harmony", &demands, false, &format!("{analysis}{bad}")).is_err(), "{bad}");
    }
}

/// HER-05: thinking is free whether the prompt or the model begins it, and the call or the JSON follows it.
#[test]
fn hermes_as_models_write_it() {
    let call = "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"city\": \"Bern\"}}\n</tool_call>";
    let required = weather(false, CallRule::Required, None);
    for (thinking, text) in [
        (false, format!("{call}<|im_end|>")),
        (false, format!("<think>\nHm {{\"a\"\n</think>\n\n{call}<|im_end|>")),
        (true, format!("Hm.\n</think>\n\n{call}\n{call}<|im_end|>")),
    ] {
        assert_eq!(allows("hermes", &required, thinking, &text), Ok(()));
    }
    assert!(allows("hermes", &required, false, "Hello").is_err());
    assert!(allows("hermes", &required, true, "Hello<|im_end|>").is_err());
    let one = Demands { one_call: true, ..required };
    assert!(allows("hermes", &one, false, &format!("{call}\n{call}<|im_end|>")).is_err());

    let json = Grammar::Json {
        schema: json!({"type": "object", "properties": {"ok": {"type": "boolean"}}}),
        strict: false,
    };
    let formatted = weather(false, CallRule::Free, Some(json));
    for text in ["{\"ok\": true}<|im_end|>", call] {
        assert_eq!(allows("hermes", &formatted, false, text), Ok(()));
        assert_eq!(allows("hermes", &formatted, true, &format!("Well.</think>\n\n{text}")), Ok(()));
    }
    assert!(allows("hermes", &formatted, false, "Sure: ").is_err());
    // The line breaks that templates write behind the thinking, with no calls that could follow them.
    let alone = Demands { tools: Vec::new(), ..formatted };
    for breaks in ["", "\n", "\n\n"] {
        let text = format!("Well.</think>{breaks}{{\"ok\": true}}<|im_end|>");
        assert_eq!(allows("hermes", &alone, true, &text), Ok(()));
        assert_eq!(allows("hermes", &alone, false, &format!("<think>{text}")), Ok(()));
    }
    assert!(allows("hermes", &alone, false, "\n\n{").is_err());
    assert!(allows("hermes", &alone, true, "Well.</think>\n\n\n").is_err());

    let strict = weather(true, CallRule::Free, None);
    for text in [format!("Let me look.\n{call}<|im_end|>"), "Hello <b>.<|im_end|>".to_owned()] {
        assert_eq!(allows("hermes", &strict, false, &text), Ok(()));
    }
    assert!(allows("hermes", &strict, false, "<tool_call>\n{\"name\": \"rm\"").is_err());
    assert!(
        allows("hermes", &strict, false, "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {}")
            .is_err()
    );
    let none = weather(false, CallRule::Forbidden, None);
    assert!(allows("hermes", &none, false, call).is_err());
    assert_eq!(allows("hermes", &none, false, "Hello<|im_end|>"), Ok(()));
}

/// Reasoning loses no token but those that would end the turn; free parts take no mask.
#[test]
fn reasoning_is_free() {
    for name in FORMATS {
        let bench = Bench::new(name);
        let mut guide = bench.guide(&weather(false, CallRule::Required, None), true);
        if name == "harmony" {
            for id in bench.tokenizer.encode_with_control("<|channel|>analysis<|message|>") {
                guide.accept(id).unwrap();
            }
        }
        let allowed = guide.allowed().unwrap();
        let refused = (0..bench.tokenizer.len() as u32).filter(|&id| !allowed.allows(id)).count();
        assert!(matches!(allowed, ctxserve_core::Allowed::Except(_)) && refused < 10, "{name}: {refused}");
        assert!(guide.is_quick(bench.tokenizer.encode(" a")[0]) && !guide.is_settled());
    }
}
