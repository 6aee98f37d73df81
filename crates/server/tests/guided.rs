//! Constrained decoding over the API, on a model that says at random whatever it is allowed to say.
#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests should stop where they fail")]

mod common;

use std::collections::VecDeque;

use common::{Server, Setup};
use ctxserve_backend::{
    Batch, DeviceError, KvDtype, KvGroup, KvPlan, KvSpec, SampleError, SampleRow, Sampled,
};
use ctxserve_chat::Tokenizer;
use ctxserve_core::TokenId;
use ctxserve_engine::{Runner, RunnerInfo};
use serde_json::{Value, json};

/// Picks at random among what masks and bans leave, and more often what brings an end nearer.
struct RandomRunner {
    info: RunnerInfo,
    near: [Vec<TokenId>; 2],
    in_flight: VecDeque<Vec<Result<Sampled, SampleError>>>,
}

impl RandomRunner {
    fn new(tokenizer: &Tokenizer, context: usize) -> Self {
        let groups = vec![KvGroup { window: None, layers: vec![0], dtype: KvDtype::Bf16 }];
        let kv = KvSpec { page_size: 16, kv_heads: 1, head_dim: 1, groups };
        let info = RunnerInfo {
            vocab_size: tokenizer.len(),
            max_context: context,
            kv,
            description: "random".to_owned(),
        };
        let ends =
            ["<|end|>", "<|return|>", "<|call|>", "<|im_end|>", "</think>", "<tool_call>", "</tool_call>"];
        let ends = ends.iter().filter_map(|name| tokenizer.special_id(name)).collect();
        let brief = ["\"", "}", "]", ":", ",", "1"].iter().flat_map(|text| tokenizer.encode(text)).collect();
        Self { info, near: [ends, brief], in_flight: VecDeque::new() }
    }

    fn pick(&self, row: &SampleRow) -> Result<Sampled, SampleError> {
        let mut state = row.seed.wrapping_add((row.step + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut below = |n: usize| {
            state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            state ^= state >> 31;
            (state % n as u64) as usize
        };
        let allowed =
            |id: &TokenId| !row.banned.contains(id) && row.mask.as_ref().is_none_or(|mask| mask.allows(*id));
        let near: Vec<_> = match self.near.get(below(4)) {
            Some(ids) => ids.iter().copied().filter(allowed).collect(),
            None => Vec::new(),
        };
        let ids: Vec<_> = match &row.mask {
            _ if !near.is_empty() => near,
            Some(mask) => mask.ids().filter(allowed).collect(),
            None => (0..self.info.vocab_size as TokenId).filter(allowed).collect(),
        };
        if ids.is_empty() {
            return Err(SampleError::NothingLeft);
        }
        Ok(Sampled { id: ids[below(ids.len())], logprobs: None })
    }
}

impl Runner for RandomRunner {
    fn info(&self) -> &RunnerInfo {
        &self.info
    }

    fn allocate(&mut self, _plan: &KvPlan) -> Result<(), DeviceError> {
        Ok(())
    }

    fn steps_in_flight(&self) -> usize {
        2
    }

    fn launch(&mut self, batch: &Batch) -> Result<(), DeviceError> {
        let picked = batch.sample_rows().map(|row| self.pick(row)).collect();
        self.in_flight.push_back(picked);
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<Result<Sampled, SampleError>>, DeviceError> {
        self.in_flight.pop_front().ok_or_else(|| DeviceError::new("collect", "nothing in flight"))
    }
}

/// Whether a text is what was asked for.
type Holds<'a> = &'a dyn Fn(&str) -> bool;

const FORMATS: [&str; 2] = ["harmony", "hermes"];

fn server(format: &str) -> Server {
    let setup = if format == "harmony" { Setup::new(&[]) } else { Setup::hermes(&[]) };
    let runner = RandomRunner::new(&setup.tokenizer, setup.context);
    setup.start_with(Box::new(runner))
}

fn tools(strict: bool) -> Value {
    let weather = json!({
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"], "additionalProperties": false,
    });
    let sum = json!({
        "type": "object", "properties": {"of": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}},
        "required": ["of"], "additionalProperties": false,
    });
    let tool = |name: &str, parameters: Value| json!({"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}});
    json!([tool("get_weather", weather), tool("sum.of-all", sum)])
}

/// Whether a call is one that [`tools`] declare.
fn check_call(call: &Value) {
    let text = call["function"]["arguments"].as_str().unwrap();
    let arguments: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let keys: Vec<_> = arguments.as_object().unwrap().keys().map(String::as_str).collect();
    match call["function"]["name"].as_str().unwrap() {
        "get_weather" => {
            assert!(keys.len() == 2 && arguments["city"].as_str().unwrap().chars().count() <= 8, "{text}");
            assert!((1..=9).contains(&arguments["days"].as_i64().unwrap()), "{text}");
        }
        "sum.of-all" => {
            let of = arguments["of"].as_array().unwrap();
            assert!(keys.len() == 1 && of.len() <= 3 && of.iter().all(Value::is_boolean), "{text}");
        }
        other => panic!("{other} is not declared"),
    }
}

fn ask(more: Value) -> Value {
    let mut body =
        json!({"model": "scripted", "messages": [{"role": "user", "content": "Hi"}], "temperature": 1.0});
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

async fn choices(server: &Server, body: Value) -> Vec<Value> {
    let reply = server.chat(&ask(body)).await;
    let answer = reply.json();
    assert!(answer["error"].is_null(), "{answer}");
    answer["choices"].as_array().unwrap().clone()
}

/// HAR-11: `required` and named calls are declared and valid in all of 500 runs, in both formats.
#[tokio::test(flavor = "multi_thread")]
async fn forced_calls_are_valid_every_time() {
    for format in FORMATS {
        let server = server(format);
        let named = json!({"type": "function", "function": {"name": "sum.of-all"}});
        let (mut whole, mut cut) = (0, 0);
        for round in 0..5 {
            for choice in [json!("required"), named.clone()] {
                let body =
                    json!({"tools": tools(false), "tool_choice": choice, "n": 50, "seed": 100 * round});
                for answer in choices(&server, body).await {
                    let calls = answer["message"]["tool_calls"].as_array().cloned().unwrap_or_default();
                    if answer["finish_reason"] == "length" {
                        cut += 1;
                        continue;
                    }
                    whole += 1;
                    assert_eq!(answer["finish_reason"], "tool_calls", "{answer}");
                    assert!(!calls.is_empty(), "{answer}");
                    calls.iter().for_each(check_call);
                    if choice.is_object() {
                        assert_eq!((calls.len(), &calls[0]["function"]["name"]), (1, &json!("sum.of-all")));
                    }
                }
            }
        }
        assert!(whole + cut == 500 && cut < 50, "{format}: {cut} of {} were cut", whole + cut);
    }
}

/// HAR-12, HAR-14, HER-05: strict functions beside a schema for the answer: every answer is a valid call or valid JSON.
#[tokio::test(flavor = "multi_thread")]
async fn strict_calls_and_schemas_together() {
    let schema = json!({
        "type": "object", "properties": {"ok": {"type": "boolean"}, "why": {"type": ["string", "null"], "maxLength": 5}},
        "required": ["ok", "why"], "additionalProperties": false,
    });
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "verdict", "strict": true, "schema": schema}});
    for name in FORMATS {
        let server = server(name);
        let (mut calls, mut contents) = (0, 0);
        for answer in
            choices(&server, json!({"tools": tools(true), "response_format": format, "n": 100, "seed": 7}))
                .await
        {
            let message = &answer["message"];
            match answer["finish_reason"].as_str().unwrap() {
                "tool_calls" => {
                    calls += 1;
                    message["tool_calls"].as_array().unwrap().iter().for_each(check_call);
                }
                "stop" => {
                    contents += 1;
                    let text = message["content"].as_str().unwrap();
                    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
                    assert!(value["ok"].is_boolean() && value.as_object().unwrap().len() == 2, "{text}");
                }
                other => assert_eq!(other, "length"),
            }
        }
        assert!(calls > 0 && contents > 0, "{name}: {calls} calls, {contents} answers");
        println!("{name}: {calls} calls, {contents} answers");
    }
}

/// HAR-11, HAR-12 and HAR-13, for the Messages API.
#[tokio::test(flavor = "multi_thread")]
async fn messages_are_held_to_what_they_ask_for() {
    let tool = |tool: &Value| {
        let function = &tool["function"];
        json!({"name": function["name"], "input_schema": function["parameters"], "strict": true})
    };
    let declared: Vec<Value> = tools(true).as_array().unwrap().iter().map(tool).collect();
    let verdict = json!({
        "type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": false,
    });
    let format = json!({"format": {"type": "json_schema", "schema": verdict}});
    let asked = [
        json!({"tools": declared, "tool_choice": {"type": "any", "disable_parallel_tool_use": true}}),
        json!({"tools": declared, "tool_choice": {"type": "tool", "name": "sum.of-all"}}),
        json!({"output_config": format}),
        json!({"output_format": format["format"]}),
    ];
    for name in FORMATS {
        let server = server(name);
        for (index, more) in asked.iter().enumerate() {
            let mut whole = 0;
            for _ in 0..30 {
                let body =
                    common::messages::request(common::merged(json!({"temperature": 1.0}), more.clone()));
                let message = server.post(common::messages::PATH, &body).await.json();
                let blocks = message["content"].as_array().unwrap_or_else(|| panic!("{message}"));
                let of = |kind: &str| blocks.iter().filter(|block| block["type"] == kind).collect::<Vec<_>>();
                match message["stop_reason"].as_str().unwrap() {
                    "max_tokens" => continue,
                    "tool_use" if index < 2 => {
                        let [block] = of("tool_use")[..] else { panic!("{message}") };
                        let function =
                            json!({"name": block["name"], "arguments": block["input"].to_string()});
                        check_call(&json!({"function": function}));
                        assert!(index == 0 || block["name"] == "sum.of-all", "{message}");
                    }
                    "end_turn" if index >= 2 => {
                        let text: String =
                            of("text").iter().filter_map(|block| block["text"].as_str()).collect();
                        let value: Value =
                            serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
                        assert!(value["ok"].is_boolean() && value.as_object().unwrap().len() == 1, "{text}");
                    }
                    _ => panic!("{message}"),
                }
                whole += 1;
            }
            assert!(whole > 15, "{name}: {whole} of 30 were whole");
        }
    }
}

/// HAR-13: every spelling of a constraint holds for the text for the user, whole and streamed.
#[tokio::test(flavor = "multi_thread")]
async fn every_spelling_of_a_constraint() {
    let schema = json!({"type": "object", "properties": {"n": {"type": "integer", "maximum": 99, "minimum": 0}}, "required": ["n"], "additionalProperties": false});
    let is_json = |text: &str| {
        let value: Value = serde_json::from_str(text).unwrap();
        value["n"].is_i64()
    };
    let is_object = |text: &str| text.trim_start().starts_with('{') && text.trim_end().ends_with('}');
    let is_code = |text: &str| {
        text.len() == 4 && text.starts_with('x') && text[1..].bytes().all(|b| b.is_ascii_digit())
    };
    let is_choice = |text: &str| ["yes", "no way"].contains(&text);
    let is_nested = |text: &str| text.contains('x') && text.matches('(').count() == text.matches(')').count();
    let cases: Vec<(Value, Holds<'_>)> = vec![
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}),
            &is_json,
        ),
        (json!({"response_format": {"type": "json_object"}}), &is_object),
        (json!({"structured_outputs": {"json": schema}}), &is_json),
        (json!({"structured_outputs": {"json": schema.to_string()}}), &is_json),
        (json!({"structured_outputs": {"json_object": true}}), &is_object),
        (json!({"structured_outputs": {"regex": "x[0-9]{3}"}}), &is_code),
        (json!({"structured_outputs": {"choice": ["yes", "no way"]}}), &is_choice),
        (json!({"structured_outputs": {"grammar": "start: \"(\" start \")\" | \"x\""}}), &is_nested),
        (json!({"guided_json": schema}), &is_json),
        (json!({"guided_regex": "x[0-9]{3}"}), &is_code),
        (json!({"guided_choice": ["yes", "no way"]}), &is_choice),
        (json!({"guided_grammar": "start: \"(\" start \")\" | \"x\""}), &is_nested),
    ];
    for name in FORMATS {
        let server = server(name);
        for (fields, holds) in &cases {
            let mut body = fields.clone();
            body["n"] = json!(8);
            for answer in choices(&server, body).await {
                if answer["finish_reason"] == "stop" {
                    let text = answer["message"]["content"].as_str().unwrap();
                    assert!(holds(text), "{name} {fields}: {text:?}");
                }
            }
            let mut completion = fields.clone();
            completion["prompt"] = json!("Say");
            completion["max_tokens"] = json!(1000);
            if name == "hermes" {
                continue;
            }
            let answer = server.post("/v1/completions", &completion).await.json();
            if answer["choices"][0]["finish_reason"] == "stop" {
                let text = answer["choices"][0]["text"].as_str().unwrap();
                assert!(holds(text), "completion {fields}: {text:?}");
            }
        }
    }
}

/// `none` makes calls impossible; `allowed_tools` all but some; `parallel_tool_calls: false` more than one.
#[tokio::test(flavor = "multi_thread")]
async fn calls_are_limited() {
    for name in FORMATS {
        let server = server(name);
        for answer in choices(
            &server,
            json!({"tools": tools(false), "tool_choice": "none", "n": 20, "max_tokens": 300}),
        )
        .await
        {
            assert!(
                answer["message"]["tool_calls"].is_null() && answer["finish_reason"] != "tool_calls",
                "{answer}"
            );
        }
        let function = json!({"type": "function", "function": {"name": "get_weather"}});
        let allowed =
            json!({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [function]}});
        for answer in choices(&server, json!({"tools": tools(false), "tool_choice": allowed, "n": 20})).await
        {
            for call in answer["message"]["tool_calls"].as_array().into_iter().flatten() {
                assert_eq!(call["function"]["name"], "get_weather");
            }
        }
        let one =
            json!({"tools": tools(false), "tool_choice": "required", "parallel_tool_calls": false, "n": 20});
        for answer in choices(&server, one).await {
            assert!(
                answer["finish_reason"] == "length"
                    || answer["message"]["tool_calls"].as_array().unwrap().len() == 1
            );
        }
    }
}

/// OAI-02: a seeded answer is the same streamed and whole.
#[tokio::test(flavor = "multi_thread")]
async fn streams_say_the_same() {
    let server = server("harmony");
    let body = json!({"tools": tools(false), "tool_choice": "required", "seed": 5});
    let whole = choices(&server, body.clone()).await;
    let mut streamed = body;
    streamed["stream"] = json!(true);
    let frames = server.chat(&ask(streamed)).await.frames();
    let mut arguments = String::new();
    for frame in &frames {
        for call in frame["choices"][0]["delta"]["tool_calls"].as_array().into_iter().flatten() {
            arguments.push_str(call["function"]["arguments"].as_str().unwrap_or_default());
        }
    }
    assert_eq!(whole[0]["finish_reason"], "tool_calls");
    assert_eq!(whole[0]["message"]["tool_calls"][0]["function"]["arguments"], arguments);
}

/// OPS-17 and the grammar rows of the security matrix: 400, naming the field, and the server goes on.
#[tokio::test(flavor = "multi_thread")]
async fn bad_constraints_name_their_field() {
    let server = server("harmony");
    let schema = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "strict": true, "schema": schema}}});
    let at_schema = "response_format.json_schema.schema";
    let tool = |parameters: Value| json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters, "strict": true}}]});
    let at_tool = "tools[0].function.parameters";
    let mut deep = json!({"type": "string"});
    (0..70).for_each(|_| deep = json!({"type": "array", "items": deep}));
    let cases = [
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"tool_choice": "sometimes"}), "tool_choice"),
        (json!({"tool_choice": 1}), "tool_choice"),
        (
            json!({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": tools(false)}),
            "tool_choice",
        ),
        (json!({"tool_choice": {"type": "function"}, "tools": tools(false)}), "tool_choice"),
        (json!({"tool_choice": {"type": "custom"}, "tools": tools(false)}), "tool_choice"),
        (
            json!({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": []}}, "tools": tools(false)}),
            "tool_choice",
        ),
        (json!({"response_format": "json"}), "response_format"),
        (json!({"response_format": {"type": "yaml"}}), "response_format.type"),
        (json!({"response_format": {"type": "structural_tag"}}), "response_format.type"),
        (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
        (json!({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}), at_schema),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "strict": 1}}}),
            "response_format.json_schema.strict",
        ),
        (schema(json!({"type": 5})), at_schema),
        (schema(json!({"type": "object", "properties": []})), at_schema),
        (schema(json!({"type": "string", "pattern": "("})), at_schema),
        (schema(json!({"type": "array", "uniqueItems": true})), at_schema),
        (schema(json!({"$ref": "#/nowhere"})), at_schema),
        (schema(json!({"type": "integer", "minimum": 2, "maximum": 1})), at_schema),
        (schema(deep), at_schema),
        (schema(json!({"enum": (0..100_000).map(|i| format!("e{i}")).collect::<Vec<_>>()})), at_schema),
        (tool(json!({"type": "object", "properties": {"a": {"type": "string", "pattern": "(("}}})), at_tool),
        (tool(json!({"type": "nonsense"})), at_tool),
        (json!({"structured_outputs": []}), "structured_outputs"),
        (json!({"structured_outputs": {"regex": "("}}), "structured_outputs.regex"),
        (json!({"structured_outputs": {"regex": "(".repeat(30_000)}}), "structured_outputs.regex"),
        (json!({"structured_outputs": {"regex": ""}}), "structured_outputs.regex"),
        (json!({"structured_outputs": {"regex": 7}}), "structured_outputs.regex"),
        (json!({"structured_outputs": {"choice": []}}), "structured_outputs.choice"),
        (json!({"structured_outputs": {"choice": [1]}}), "structured_outputs.choice"),
        (json!({"structured_outputs": {"grammar": "root ::= \"x\""}}), "structured_outputs.grammar"),
        (json!({"structured_outputs": {"json": "{"}}), "structured_outputs.json"),
        (json!({"structured_outputs": {"json": {}, "regex": "a"}}), "structured_outputs.regex"),
        (json!({"structured_outputs": {"structural_tag": "x"}}), "structured_outputs.structural_tag"),
        (json!({"guided_json": {}, "guided_regex": "a"}), "guided_regex"),
    ];
    for (fields, param) in cases {
        let reply = server.chat(&ask(fields.clone())).await;
        let shown: String = fields.to_string().chars().take(200).collect();
        assert_eq!(reply.status.as_u16(), 400, "{shown}: {}", reply.json());
        assert_eq!(reply.json()["error"]["param"], param, "{shown}");
    }
    // What asks for nothing is fine, and the server still works.
    for fields in [
        json!({"response_format": {"type": "text"}}),
        json!({"response_format": null, "structured_outputs": {}, "guided_json": null}),
        json!({"structured_outputs": {"json": null, "disable_any_whitespace": false}}),
        json!({"structured_outputs": {"choice": ["fine"]}}),
    ] {
        let mut body = fields;
        body["max_tokens"] = json!(50);
        assert!(!choices(&server, body).await.is_empty());
    }
}
