//! HAR-07: turns that the model wrote come back in later prompts id for id, however it cut their text into tokens.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests, too")]

use std::collections::BTreeMap;
use std::sync::Arc;

use ctxserve_chat::testing::{o200k_tokenizer, qwen_tokenizer};
use ctxserve_chat::{
    ChatFormat, Collector, Conversation, End, Generated, Message, ParsedMessage, ParserOptions, PromptFiles,
    Rendered, Tokenizer, ToolCall, formats,
};
use proptest::prelude::*;
use proptest::sample::Index;

/// A format on its tokenizer, and what conversations say of thinking.
struct Bench {
    format: Arc<dyn ChatFormat>,
    tokenizer: Arc<Tokenizer>,
    thinking: Option<bool>,
}

impl Bench {
    fn harmony() -> Self {
        let tokenizer = o200k_tokenizer();
        let format = formats::open("harmony", Arc::clone(&tokenizer), &PromptFiles::default()).unwrap();
        Self { format, tokenizer, thinking: None }
    }

    /// The default template, or that of models that may think.
    fn hermes(thinks: bool, thinking: Option<bool>) -> Self {
        let tokenizer = qwen_tokenizer();
        let template = thinks.then(|| include_str!("data/templates/thinking.jinja").to_owned());
        let files = PromptFiles { chat_template: template, ..PromptFiles::default() };
        let format = formats::open("hermes", Arc::clone(&tokenizer), &files).unwrap();
        Self { format, tokenizer, thinking }
    }

    /// Ids of text in which control tokens are spelled out, the rest cut into tokens anywhere, within characters too.
    fn ids(&self, text: &str, cuts: &[Index]) -> Vec<u32> {
        let (mut ids, mut rest) = (Vec::new(), text);
        loop {
            let (at, len, control) = match self.tokenizer.find_control(rest) {
                Some((at, len, id)) => (at, len, Some(id)),
                None => (rest.len(), 0, None),
            };
            let bytes = &rest.as_bytes()[..at];
            let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
            places.extend([0, bytes.len()]);
            places.sort_unstable();
            for pair in places.windows(2) {
                ids.extend(self.tokenizer.encode_bytes(&bytes[pair[0]..pair[1]]).unwrap());
            }
            ids.extend(control);
            rest = &rest[at + len..];
            if rest.is_empty() {
                return ids;
            }
        }
    }

    /// The turn of an answer to a prompt; `None` if it is malformed.
    fn turn(&self, prompt: &[u32], ids: Vec<u32>) -> Option<Generated> {
        let thinking = self.format.leaves_thinking_open(prompt);
        let mut parser = self.format.parser(ParserOptions { thinking, ..ParserOptions::default() });
        let mut deltas = Vec::new();
        for id in &ids {
            parser.push(*id, &mut deltas);
        }
        let outcome = parser.finish(End::Stop, &mut deltas);
        let mut said = Collector::default();
        deltas.iter().for_each(|delta| said.add(delta));
        let head = self.format.turn_head(prompt).into();
        outcome.recoveries.is_empty().then(|| Generated { said: said.into_message(), head, ids: ids.into() })
    }

    fn render(&self, messages: &[Message], generated: &BTreeMap<usize, Arc<Generated>>) -> Rendered {
        let conversation = Conversation {
            messages: messages.to_vec(),
            thinking: self.thinking,
            generated: generated.clone(),
            ..Conversation::default()
        };
        self.format.render_turns(&conversation, true).unwrap()
    }
}

fn user(text: &str) -> Message {
    Message::User { name: None, content: text.to_owned() }
}

/// What a client sends back of a turn.
fn echo(said: &ParsedMessage) -> Message {
    let calls = said.calls.iter().enumerate();
    Message::Assistant {
        reasoning: said.reasoning.clone(),
        content: said.content.clone(),
        tool_calls: calls
            .map(|(index, call)| ToolCall {
                id: index.to_string(),
                name: call.name.clone(),
                arguments: call.arguments.clone(),
            })
            .collect(),
    }
}

/// Runs a tool loop over answers and checks that each prompt begins with the one before and its answer.
fn check_loop(bench: &Bench, answers: &[(String, Vec<Index>)]) -> Result<(), TestCaseError> {
    let (mut messages, mut generated) = (vec![user("Why?")], BTreeMap::new());
    let mut prompt = bench.render(&messages, &generated).ids;
    for (number, (answer, cuts)) in answers.iter().enumerate() {
        let turn = bench.turn(&prompt, bench.ids(answer, cuts));
        prop_assume!(turn.is_some());
        let turn = turn.unwrap();
        prop_assume!(!turn.said.calls.is_empty());
        messages.push(echo(&turn.said));
        prompt.extend(&turn.ids);
        generated.insert(messages.len() - 1, Arc::new(turn));
        messages.push(Message::Tool { call_id: "0".to_owned(), content: "<b>42</b>".to_owned() });
        let next = bench.render(&messages, &generated);
        let text = bench.tokenizer.decode(&next.ids, false);
        prop_assert!(next.ids.starts_with(&prompt), "{}", text);
        prop_assert_eq!(next.replayed, number + 1);
        prompt = next.ids;
    }
    Ok(())
}

fn words() -> impl Strategy<Value = String> {
    prop_oneof!["[ -~]{1,30}", "[a-z \n\u{e9}\u{65e5}\u{1f980}]{1,20}", Just("I look. {\"a\": 1}".to_owned())]
}

/// Arguments, spelled in ways that no serialiser agrees on.
fn arguments() -> impl Strategy<Value = String> {
    let text = "[a-zA-Z \u{e9}\u{65e5}]{0,12}";
    prop_oneof![
        Just("{}".to_owned()),
        text.prop_map(|text| format!("{{\"q\":\"{text}\"}}")),
        text.prop_map(|text| format!("{{ \"q\" : [1, {{\"b\":null}}], \"r\": \"{text}\\n\\u00e9\" }}")),
    ]
}

fn cuts() -> impl Strategy<Value = Vec<Index>> {
    prop::collection::vec(any::<Index>(), 0..12)
}

/// A turn of Harmony's that calls: its messages in any order that models use.
fn harmony_call() -> impl Strategy<Value = String> {
    let before = (any::<bool>(), words()).prop_map(|(analysis, text)| {
        let channel = if analysis { "analysis" } else { "commentary" };
        format!("<|channel|>{channel}<|message|>{text}<|end|><|start|>assistant")
    });
    (prop::collection::vec(before, 0..4), any::<bool>(), arguments()).prop_map(
        |(before, role_first, arguments)| {
            let head = if role_first {
                " to=functions.f<|channel|>commentary <|constrain|>json"
            } else {
                "<|channel|>commentary to=functions.f <|constrain|>json"
            };
            format!("{}{head}<|message|>{arguments}<|call|>", before.concat())
        },
    )
}

/// A hermes turn that calls, behind the thinking that `thinking` says of it.
fn hermes_call(thinking: fn(&str) -> String) -> impl Strategy<Value = String> {
    let call = (arguments(), any::<bool>()).prop_map(|(arguments, spaced)| {
        let space = if spaced { " " } else { "" };
        format!(
            "<tool_call>\n{{\"name\":{space}\"f\",{space}\"arguments\":{space}{arguments}}}\n</tool_call>"
        )
    });
    let thoughts = "[a-zA-Z .,\u{e9}]{1,30}";
    let text = prop_oneof![Just(String::new()), "[a-zA-Z .,\u{65e5}]{1,30}\n"];
    (thoughts, text, prop::collection::vec(call, 1..3)).prop_map(move |(thoughts, text, calls)| {
        format!("{}{text}{}<|im_end|>", thinking(&thoughts), calls.join("\n"))
    })
}

fn loops(turn: impl Strategy<Value = String>) -> impl Strategy<Value = Vec<(String, Vec<Index>)>> {
    prop::collection::vec((turn, cuts()), 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// HAR-07: Harmony's loops continue token for token.
    #[test]
    fn har_07_harmony_loops_are_exact(answers in loops(harmony_call())) {
        check_loop(&Bench::harmony(), &answers)?;
    }

    /// HAR-07: so do loops of models that do not think.
    #[test]
    fn har_07_hermes_loops_are_exact(answers in loops(hermes_call(|_| String::new()))) {
        check_loop(&Bench::hermes(false, None), &answers)?;
        // Thinking turned off: the template's history leaves the empty thinking out, the turn keeps it.
        check_loop(&Bench::hermes(true, Some(false)), &answers)?;
    }

    /// HAR-07: so do those of models that think, whether the prompt begins the thinking or the model.
    #[test]
    fn har_07_thinking_loops_are_exact(
        open in loops(hermes_call(|thoughts| format!("{thoughts}\n</think>\n\n"))),
        own in loops(hermes_call(|thoughts| format!("<think>\n{thoughts}\n</think>\n\n"))),
    ) {
        check_loop(&Bench::hermes(true, Some(true)), &open)?;
        check_loop(&Bench::hermes(true, None), &own)?;
    }
}

/// One answered turn and what comes behind it, rendered with and without the model's ids.
fn after(
    bench: &Bench,
    answer: &str,
    change: impl Fn(&mut Message),
    behind: &[Message],
) -> (Vec<u32>, Rendered, Rendered) {
    let prompt = bench.render(&[user("Why?")], &BTreeMap::new()).ids;
    // Every character a token of its own.
    let every: Vec<u32> = bench.ids(answer, &[]);
    let mut ids = Vec::new();
    for id in every {
        match bench.tokenizer.is_control(id) {
            true => ids.push(id),
            false => {
                let text = bench.tokenizer.token_text(id).unwrap();
                text.chars().for_each(|c| ids.extend(bench.tokenizer.encode(c.encode_utf8(&mut [0; 4]))));
            }
        }
    }
    let turn = bench.turn(&prompt, ids.clone()).unwrap();
    let mut message = echo(&turn.said);
    change(&mut message);
    let mut messages = vec![user("Why?"), message];
    messages.extend_from_slice(behind);
    let generated = BTreeMap::from([(1, Arc::new(turn))]);
    (ids, bench.render(&messages, &generated), bench.render(&messages, &BTreeMap::new()))
}

fn has(prompt: &[u32], ids: &[u32]) -> bool {
    prompt.windows(ids.len()).any(|window| window == ids)
}

/// HAR-07, HAR-15: behind a final answer the format drops the analysis as ever, and the answer's own ids stay.
#[test]
fn har_07_har_15_answers_stay_without_their_analysis() {
    let bench = Bench::harmony();
    let answer = "<|channel|>analysis<|message|>Let me think.<|end|><|start|>assistant<|channel|>final<|message|>Therefore.<|return|>";
    let (ids, own, canonical) = after(&bench, answer, |_| {}, &[user("And?")]);
    let text = |rendered: &Rendered| bench.tokenizer.decode(&rendered.ids, false);
    assert_eq!(text(&own), text(&canonical));
    assert!(!text(&own).contains("think") && !text(&own).contains("<|return|>"), "{}", text(&own));
    let start = ids.iter().rposition(|id| Some(*id) == bench.tokenizer.special_id("<|channel|>")).unwrap();
    assert!(has(&own.ids, &ids[start..ids.len() - 1]) && !has(&canonical.ids, &ids[start..ids.len() - 1]));
    assert_eq!((own.replayed, canonical.replayed), (1, 0));
}

/// HAR-07: the same of a template that drops earlier thinking, the empty thinking too.
#[test]
fn har_07_hermes_answers_stay_without_their_thinking() {
    for (thinking, answer) in [
        (Some(true), "Hm.\n</think>\n\nTherefore.<|im_end|>"),
        (None, "<think>\nHm.\n</think>\n\nTherefore.<|im_end|>"),
        (Some(false), "Therefore.<|im_end|>"),
    ] {
        let bench = Bench::hermes(true, thinking);
        let (ids, own, canonical) = after(&bench, answer, |_| {}, &[user("And?")]);
        let text = |rendered: &Rendered| bench.tokenizer.decode(&rendered.ids, false);
        assert_eq!(text(&own), text(&canonical), "{thinking:?}");
        let tail = &ids[ids.len() - "Therefore.".len() - 1..];
        assert!(has(&own.ids, tail) && !has(&canonical.ids, tail), "{thinking:?}");
        assert_eq!((own.replayed, canonical.replayed), (1, 0));
    }
}

/// HAR-07: whatever a client changes takes the canonical form; reasoning that it left out is left out.
#[test]
fn har_07_changed_turns_are_canonical() {
    type Change = fn(&mut Message);
    let changes: [Change; 4] = [
        |message| {
            let Message::Assistant { content, .. } = message else { return };
            *content = Some("Other.".to_owned());
        },
        |message| {
            let Message::Assistant { tool_calls, .. } = message else { return };
            tool_calls[0].arguments = "{\"a\": 2}".to_owned();
        },
        |message| {
            let Message::Assistant { tool_calls, .. } = message else { return };
            tool_calls[0].name = "g".to_owned();
        },
        |message| {
            let Message::Assistant { reasoning, .. } = message else { return };
            *reasoning = Some("Other.".to_owned());
        },
    ];
    let harmony = "<|channel|>analysis<|message|>Let me think.<|end|><|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>{\"a\": 1}<|call|>";
    let hermes = "<think>\nLet me think.\n</think>\n\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call><|im_end|>";
    let behind = [Message::Tool { call_id: "0".to_owned(), content: "x".to_owned() }];
    for (bench, answer) in [(Bench::harmony(), harmony), (Bench::hermes(true, None), hermes)] {
        for change in changes {
            let (_, own, canonical) = after(&bench, answer, change, &behind);
            assert_eq!((own.replayed, own.ids), (0, canonical.ids));
        }
        let silent: Change = |message| {
            let Message::Assistant { reasoning, .. } = message else { return };
            *reasoning = None;
        };
        let (ids, own, canonical) = after(&bench, answer, silent, &behind);
        let text = |rendered: &Rendered| bench.tokenizer.decode(&rendered.ids, false);
        assert!(!text(&own).contains("think."), "{}", text(&own));
        let call = &ids[ids.len() - 20..];
        assert!(has(&own.ids, call) && !has(&canonical.ids, call));
        assert_eq!(own.replayed, 1);
    }
}

/// HAR-07: a turn is not repeated where the template does not write one turn a message, or writes something else.
#[test]
fn har_07_templates_of_other_kinds_are_left_alone() {
    let answer = "Therefore.<|im_end|>";
    for template in [
        // Turns that no message has, messages that have no turn, another role's name, other words.
        "<|im_start|>assistant\nHello.<|im_end|>{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}",
        "{% for m in messages if m.role == 'user' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}",
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
    ] {
        let open = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
        let files =
            PromptFiles { chat_template: Some(format!("{template}{open}")), ..PromptFiles::default() };
        let tokenizer = qwen_tokenizer();
        let format = formats::open("hermes", Arc::clone(&tokenizer), &files).unwrap();
        let bench = Bench { format, tokenizer, thinking: None };
        let (_, own, canonical) = after(&bench, answer, |_| {}, &[user("And?")]);
        assert_eq!((own.replayed, own.ids), (0, canonical.ids), "{template}");
    }
}
