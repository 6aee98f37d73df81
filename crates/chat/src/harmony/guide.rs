//! What an answer in Harmony may be.
//!
//! ```text
//! answer  := message* last          header of a call := to? <|channel|>commentary to? type? <|message|>
//! message := <|channel|>analysis<|message|> text <|end|> <|start|>assistant
//!          | <|channel|>commentary<|message|> text <|end|> <|start|>assistant
//! last    := <|channel|>final<|message|> content <|return|>  |  call <|message|> arguments <|call|>
//! ```

use std::sync::Arc;

use ctxserve_core::{Allowed, Constraint, ConstraintError, TokenId};

use super::HarmonyTokens;
use crate::guide::{At, CallRule, Demands, GuideError, Guides, Part, Template, Text, Vocabulary, Words};

/// Messages of reasoning and preambles before the last message has to come.
const ASIDES: usize = 8;

/// What a header's message is, by the numbers of its [`Words`]: from [`CALLS`] on calls of the functions.
const ASIDE: usize = 0;
const FINAL: usize = 1;
const CALLS: usize = 2;

/// What is the same for all choices of a request.
#[derive(Debug)]
struct Rules {
    vocabulary: Arc<Vocabulary>,
    tokens: HarmonyTokens,
    /// Headers of the first message, of one behind others, and of one that has to be the last.
    headers: [Words; 3],
    content: Option<Arc<Template>>,
    /// Of each function, the grammar of its arguments.
    arguments: Vec<Option<Arc<Template>>>,
    /// What may not come in the text of an aside, of an answer, of arguments.
    banned: [Arc<[TokenId]>; 3],
}

#[derive(Debug)]
enum State {
    /// In a header, of these [`Rules::headers`].
    Header(usize, At),
    /// In reasoning or a preamble.
    Aside,
    /// In the last message: free text, without what is banned.
    Free(Arc<[TokenId]>),
    /// In the last message, under a grammar.
    Bound(Text),
    Over,
}

/// The guide of one answer.
#[derive(Debug)]
pub(super) struct HarmonyGuide {
    rules: Arc<Rules>,
    state: State,
    asides: usize,
}

impl HarmonyGuide {
    /// At the start of an answer to a prompt that ends in `<|start|>assistant`.
    ///
    /// # Errors
    /// A schema or grammar that cannot be used.
    pub(super) fn new(
        tokens: &HarmonyTokens,
        guides: &Guides,
        demands: &Demands,
    ) -> Result<Self, GuideError> {
        let arguments = demands.tools.iter().enumerate();
        let arguments = arguments.map(|(at, tool)| guides.arguments(at, tool, demands.calls));
        let arguments = if demands.calls == CallRule::Forbidden {
            Vec::new()
        } else {
            arguments.collect::<Result<_, _>>()?
        };
        let content = demands.content.as_ref().map(|grammar| guides.content(grammar)).transpose()?;
        let all = [
            tokens.start,
            tokens.end,
            tokens.message,
            tokens.channel,
            tokens.constrain,
            tokens.ret,
            tokens.call,
        ];
        let but = |kept: TokenId| {
            all.iter().chain(&tokens.endoftext).copied().filter(|&id| id != kept).collect::<Arc<[TokenId]>>()
        };
        let banned = [but(tokens.end), but(tokens.ret), but(tokens.call)];
        let headers = [
            headers(tokens, demands, false, true),
            headers(tokens, demands, true, true),
            headers(tokens, demands, true, false),
        ];
        let vocabulary = guides.words()?;
        let rules = Rules { vocabulary, tokens: tokens.clone(), headers, content, arguments, banned };
        Ok(Self { rules: Arc::new(rules), state: State::Header(0, Words::START), asides: 0 })
    }

    /// The text behind a header.
    fn open(&self, outcome: usize) -> State {
        let rules = &*self.rules;
        let [_, answer, arguments] = &rules.banned;
        let (template, banned, end) = match outcome {
            ASIDE => return State::Aside,
            FINAL => (rules.content.as_ref(), answer, rules.tokens.ret),
            call => {
                (rules.arguments.get(call - CALLS).and_then(Option::as_ref), arguments, rules.tokens.call)
            }
        };
        match template {
            Some(template) => State::Bound(Text::new(template.start(), [end].into())),
            None => State::Free(Arc::clone(banned)),
        }
    }
}

/// The headers that may come; `between` others, and `asides` among them.
fn headers(tokens: &HarmonyTokens, demands: &Demands, between: bool, asides: bool) -> Words {
    let mut words = Words::new();
    let (channel, message) = (Part::Token(tokens.channel), Part::Token(tokens.message));
    let mut add = |parts: &[Part], outcome| {
        let start = [Part::Token(tokens.start), Part::text("assistant")];
        let all: Vec<Part> = start.iter().filter(|_| between).chain(parts).cloned().collect();
        words.add(&all, outcome);
    };
    if asides {
        add(&[channel.clone(), Part::text("analysis"), message.clone()], ASIDE);
    }
    // A preamble is text for the user: none where that has to follow a grammar.
    if asides && demands.content.is_none() && demands.calls != CallRule::Forbidden {
        add(&[channel.clone(), Part::text("commentary"), message.clone()], ASIDE);
    }
    if demands.calls != CallRule::Required {
        add(&[channel.clone(), Part::text("final"), message.clone()], FINAL);
    }
    if demands.calls == CallRule::Forbidden {
        return words;
    }
    let constrain = Part::Token(tokens.constrain);
    let types = [
        vec![],
        vec![Part::text(" json")],
        vec![Part::text(" "), constrain.clone(), Part::text("json")],
        vec![constrain, Part::text("json")],
    ];
    for (index, tool) in demands.tools.iter().enumerate() {
        let to = Part::text(format!(" to=functions.{}", tool.name));
        let commentary = Part::text("commentary");
        let forms = [[to.clone(), channel.clone(), commentary.clone()], [channel.clone(), commentary, to]];
        for form in &forms {
            for kind in &types {
                let parts: Vec<Part> = form.iter().chain(kind).chain([&message]).cloned().collect();
                add(&parts, CALLS + index);
            }
        }
    }
    words
}

impl Constraint for HarmonyGuide {
    fn allowed(&mut self) -> Result<Allowed, ConstraintError> {
        let rules = &self.rules;
        Ok(match &mut self.state {
            State::Header(which, at) => {
                let mut mask = rules.vocabulary.nothing();
                rules.headers[*which].allow(*at, &rules.vocabulary, &mut mask);
                Allowed::Only(Arc::new(mask))
            }
            State::Aside => Allowed::Except(Arc::clone(&rules.banned[0])),
            State::Free(banned) => Allowed::Except(Arc::clone(banned)),
            State::Bound(text) => Allowed::Only(Arc::new(text.mask()?)),
            State::Over => Allowed::Any,
        })
    }

    fn accept(&mut self, id: TokenId) -> Result<(), ConstraintError> {
        let rules = &self.rules;
        match &mut self.state {
            State::Header(which, at) => {
                let words = &rules.headers[*which];
                let next = words.step(*at, id, &rules.vocabulary);
                *at = next.ok_or_else(|| ConstraintError::new("the header is not legal"))?;
                if let Some(outcome) = words.outcome(*at) {
                    self.state = self.open(outcome);
                }
            }
            State::Aside if id == rules.tokens.end => {
                self.asides += 1;
                let which = if self.asides < ASIDES { 1 } else { 2 };
                self.state = State::Header(which, Words::START);
            }
            State::Bound(text) => {
                if text.accept(id)? {
                    self.state = State::Over;
                }
            }
            State::Aside | State::Free(_) | State::Over => {}
        }
        Ok(())
    }

    fn is_quick(&self, id: TokenId) -> bool {
        match &self.state {
            State::Aside => id != self.rules.tokens.end,
            State::Free(_) | State::Over => true,
            State::Header(..) | State::Bound(_) => false,
        }
    }

    fn is_settled(&self) -> bool {
        matches!(self.state, State::Free(_) | State::Over)
    }

    fn fork(&self) -> Box<dyn Constraint> {
        let state = match &self.state {
            State::Header(which, at) => State::Header(*which, *at),
            State::Aside => State::Aside,
            State::Free(banned) => State::Free(Arc::clone(banned)),
            State::Bound(text) => State::Bound(text.fork()),
            State::Over => State::Over,
        };
        Box::new(Self { rules: Arc::clone(&self.rules), state, asides: self.asides })
    }
}
