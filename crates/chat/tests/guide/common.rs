//! A model that picks at random among what is allowed, and a validator for the schemas of these tests.

use std::sync::Arc;

use ctxserve_chat::guide::{CallRule, Demands, Grammar, GuidedTool, Guides};
use ctxserve_chat::testing::{demo_tokenizer, qwen_tokenizer};
use ctxserve_chat::{
    ChatFormat, Collector, End, Finish, ParsedMessage, ParserOptions, PromptFiles, Tokenizer, formats,
};
use ctxserve_core::{Allowed, Constraint, TokenId};
use serde_json::{Value, json};

/// SplitMix64.
#[derive(Clone, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn of<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

/// A format on its tokenizer.
pub(crate) struct Bench {
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) format: Arc<dyn ChatFormat>,
    pub(crate) guides: Guides,
    /// Ends reasoning, and what else it may be.
    ends: Vec<TokenId>,
    brief: Vec<TokenId>,
}

pub(crate) const FORMATS: [&str; 2] = ["harmony", "hermes"];

impl Bench {
    pub(crate) fn new(name: &str) -> Self {
        let tokenizer = if name == "harmony" { demo_tokenizer() } else { qwen_tokenizer() };
        let format = formats::open(name, Arc::clone(&tokenizer), &PromptFiles::default()).unwrap();
        let ends =
            ["<|end|>", "<|return|>", "<|call|>", "<|im_end|>", "</think>", "<tool_call>", "</tool_call>"];
        let ends = ends.iter().filter_map(|token| tokenizer.special_id(token)).collect();
        let brief = ["\"", "}", "]", ":", ",", "0", "1", "7", "\",", "\"}"];
        let brief = brief.iter().map(|text| tokenizer.encode(text)).filter(|ids| ids.len() == 1);
        let brief = brief.flatten().collect();
        Self { guides: Guides::new(Arc::clone(&tokenizer)), tokenizer, format, ends, brief }
    }

    pub(crate) fn guide(&self, demands: &Demands, thinking: bool) -> Box<dyn Constraint> {
        self.format.guide(&self.guides, demands, &self.prompt(thinking)).unwrap()
    }

    /// A prompt's end: hermes reads from it whether thinking is open.
    pub(crate) fn prompt(&self, thinking: bool) -> Vec<TokenId> {
        let text = if thinking { "<|im_start|>assistant\n<think>\n" } else { "<|im_start|>assistant\n" };
        self.tokenizer.encode_with_control(text)
    }

    /// Picks one of the ids that are allowed: often one that brings an end nearer, else any.
    pub(crate) fn pick(&self, allowed: &Allowed, random: &mut Random) -> TokenId {
        let wanted = match random.below(4) {
            0 => &self.ends,
            1 => &self.brief,
            _ => &Vec::new(),
        };
        let nearer: Vec<_> = wanted.iter().copied().filter(|&id| allowed.allows(id)).collect();
        if !nearer.is_empty() {
            return *random.of(&nearer);
        }
        match allowed {
            Allowed::Only(mask) => {
                let ids: Vec<_> = mask.ids().collect();
                assert!(!ids.is_empty(), "nothing is allowed");
                *random.of(&ids)
            }
            _ => loop {
                let id = random.below(self.tokenizer.len()) as TokenId;
                if allowed.allows(id) && self.tokenizer.token_bytes(id).is_some() {
                    return id;
                }
            },
        }
    }

    /// Plays an answer to its stop token; `None` if it takes more than `most` tokens.
    pub(crate) fn play(
        &self,
        guide: &mut dyn Constraint,
        random: &mut Random,
        most: usize,
    ) -> Option<Vec<TokenId>> {
        let mut ids = Vec::new();
        while ids.len() < most {
            let allowed = guide.allowed().unwrap();
            let id = self.pick(&allowed, random);
            guide.accept(id).unwrap();
            ids.push(id);
            if self.format.stop_ids().contains(&id) {
                return Some(ids);
            }
        }
        None
    }

    pub(crate) fn parse(
        &self,
        ids: &[TokenId],
        demands: &Demands,
        thinking: bool,
    ) -> (ParsedMessage, Finish, Vec<&'static str>) {
        let names: Vec<String> = demands.tools.iter().map(|tool| tool.name.clone()).collect();
        let calls = demands.calls != CallRule::Forbidden;
        let mut parser = self.format.parser(ParserOptions { calls, tools: Some(names.into()), thinking });
        let (mut collector, mut out) = (Collector::default(), Vec::new());
        for &id in ids {
            parser.push(id, &mut out);
        }
        let outcome = parser.finish(End::Stop, &mut out);
        out.iter().for_each(|delta| collector.add(delta));
        (collector.into_message(), outcome.finish, outcome.recoveries)
    }
}

pub(crate) fn tool(name: &str, parameters: Value, strict: bool) -> GuidedTool {
    GuidedTool { name: name.to_owned(), parameters: Some(parameters), strict }
}

pub(crate) fn schema_of(grammar: &Grammar) -> &Value {
    match grammar {
        Grammar::Json { schema, .. } => schema,
        _ => panic!("no schema"),
    }
}

/// A random object schema of the keywords that [`validate`] knows.
pub(crate) fn object(random: &mut Random, depth: usize) -> Value {
    let names = ["path", "query", "n", "deep", "Zürich", "a b"];
    let (mut properties, mut required) = (serde_json::Map::new(), Vec::new());
    for name in names.iter().take(1 + random.below(names.len())) {
        properties.insert((*name).to_owned(), schema(random, depth.saturating_sub(1)));
        if random.one_in(2) {
            required.push(json!(name));
        }
    }
    json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
}

fn schema(random: &mut Random, depth: usize) -> Value {
    match random.below(if depth == 0 { 6 } else { 9 }) {
        0 => json!({"type": "string", "minLength": random.below(3), "maxLength": 3 + random.below(9)}),
        1 => json!({"type": "integer", "minimum": -5, "maximum": random.below(200)}),
        2 => json!({"type": "boolean"}),
        3 => json!({"enum": ["red", "dark green", 7, null]}),
        4 => json!({"type": "string", "pattern": "^[a-f]{2,4}$"}),
        5 => json!({"type": ["null", "integer"], "minimum": 0, "maximum": 9}),
        6 => {
            json!({"type": "array", "items": schema(random, depth - 1), "minItems": random.below(2), "maxItems": 3})
        }
        7 => json!({"anyOf": [{"type": "boolean"}, object(random, depth - 1)]}),
        _ => object(random, depth - 1),
    }
}

/// Whether a value is what a schema asks for.
pub(crate) fn validate(value: &Value, schema: &Value) -> Result<(), String> {
    let fail = |what: &str| Err(format!("{value} is not {what} of {schema}"));
    if let Some(any) = schema["anyOf"].as_array() {
        return if any.iter().any(|one| validate(value, one).is_ok()) { Ok(()) } else { fail("any") };
    }
    if let Some(list) = schema["enum"].as_array() {
        return if list.contains(value) { Ok(()) } else { fail("one") };
    }
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        // "-0" is read as a float.
        Value::Number(number) if number.as_f64().is_some_and(|n| n.fract() == 0.0) => "integer",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    let wanted = &schema["type"];
    if !(wanted.is_null()
        || wanted == kind
        || wanted.as_array().is_some_and(|list| list.contains(&json!(kind))))
    {
        return fail("the type");
    }
    match value {
        Value::String(text) => {
            let len = text.chars().count() as u64;
            if schema["minLength"].as_u64().is_some_and(|least| len < least)
                || schema["maxLength"].as_u64().is_some_and(|most| len > most)
            {
                return fail("the length");
            }
            let in_pattern = || (2..=4).contains(&len) && text.chars().all(|c| ('a'..='f').contains(&c));
            if schema.get("pattern").is_some() && !in_pattern() {
                return fail("the pattern");
            }
        }
        Value::Number(number) => {
            let n = number.as_f64().unwrap();
            if schema["minimum"].as_f64().is_some_and(|least| n < least)
                || schema["maximum"].as_f64().is_some_and(|most| n > most)
            {
                return fail("in the range");
            }
        }
        Value::Array(list) => {
            if list.len() as u64 > schema["maxItems"].as_u64().unwrap_or(u64::MAX) {
                return fail("short enough");
            }
            list.iter().try_for_each(|item| validate(item, &schema["items"]))?;
        }
        Value::Object(map) => {
            for name in schema["required"].as_array().into_iter().flatten() {
                if !map.contains_key(name.as_str().unwrap()) {
                    return fail("complete");
                }
            }
            for (name, item) in map {
                match schema["properties"].get(name) {
                    Some(schema) => validate(item, schema)?,
                    None if schema["additionalProperties"] == false => return fail("closed"),
                    None => {}
                }
            }
        }
        Value::Null | Value::Bool(_) => {}
    }
    Ok(())
}
