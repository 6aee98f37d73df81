//! What an answer with calls in `<tool_call>` tags may be.
//!
//! ```text
//! answer := thinking? newlines (content | call ("\n"? call)*) <|im_end|>
//! call   := <tool_call> "\n"? {"name": "...", "arguments": ...} "\n"? </tool_call>
//! ```
//! Thinking is free; content is free, or a text of a grammar. Free content may be followed by calls.

use std::sync::Arc;

use ctxserve_core::{Allowed, Constraint, ConstraintError, TokenId, TokenMask};
use serde_json::Value;

use super::HermesTokens;
use super::parse::{CALL, THINK, THINK_END};
use crate::Tokenizer;
use crate::guide::{
    At, CallRule, Demands, Grammar, GuideError, Guides, Part, Template, Text, Vocabulary, Watch, Words,
    argument_schema, with_options,
};

/// Calls in one answer.
const MOST_CALLS: usize = 64;

/// What the texts of [`Words`] mean.
const THINKS: usize = 0;
const CALLS: usize = 1;
const ENDS: usize = 2;
const BLANKS: usize = 3;

/// How an answer begins, as its prompt has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Thinking {
    /// Within the thinking.
    Open,
    /// Behind it.
    Over,
    /// Thinking may come.
    Possible,
}

/// What is the same for all choices of a request.
#[derive(Debug)]
struct Rules {
    vocabulary: Arc<Vocabulary>,
    ends: Arc<[TokenId]>,
    /// `</tool_call>`
    close: Arc<[TokenId]>,
    /// How an answer may begin before any thinking, and behind it.
    starts: [Words; 2],
    /// What may follow a call: another, or the end.
    after: Words,
    /// Calls of any function on offer; `None` where none may be made.
    call: Option<Arc<Template>>,
    content: Option<Arc<Template>>,
    /// Content is free text.
    free: bool,
    most_calls: usize,
    /// What may not come in thinking; in free content once there is some.
    banned_thinking: Arc<[TokenId]>,
    banned_text: Arc<[TokenId]>,
}

#[derive(Debug)]
enum State {
    /// In the thinking; whether a call's tag was spelt there.
    Thinking(Watch, bool),
    /// Before content or calls, in these [`Rules::starts`], and in the content if that may have begun instead.
    Start(usize, At, Option<Text>),
    /// In free content. `blank`: the turn may not end before something was said.
    Text {
        watch: Watch,
        blank: bool,
        first: bool,
    },
    /// In content under a grammar.
    Content(Text),
    /// In a call.
    Call(Text),
    /// Behind a call.
    After(At),
    Over,
}

/// The guide of one answer.
#[derive(Debug)]
pub(super) struct HermesGuide {
    rules: Arc<Rules>,
    state: State,
    calls: usize,
}

impl HermesGuide {
    /// At the start of an answer.
    ///
    /// # Errors
    /// A schema or grammar that cannot be used, or a tokenizer without the tags' tokens.
    pub(super) fn new(
        tokenizer: &Tokenizer,
        tokens: &HermesTokens,
        guides: &Guides,
        demands: &Demands,
        thinking: Thinking,
    ) -> Result<Self, GuideError> {
        let vocabulary = guides.words()?;
        let tag = |name: &str| {
            tokenizer.special_id(name).ok_or_else(|| {
                GuideError::unable(format!(
                    "the model's tokenizer has no token {name}, which forced calls need"
                ))
            })
        };
        let callable = demands.calls != CallRule::Forbidden && !demands.tools.is_empty();
        let call = if callable { Some(guides.template_of(&call_grammar(guides, demands)?)?) } else { None };
        let content = demands.content.as_ref().map(|grammar| guides.content(grammar)).transpose()?;
        let content = content.filter(|_| demands.calls != CallRule::Required);
        let free = content.is_none() && demands.calls != CallRule::Required;

        let mut after = Words::new();
        after.add(&[Part::Token(tokens.end)], ENDS);
        let mut starts = [Words::new(), Words::new()];
        let mut close = Vec::new();
        let mut banned_thinking = vec![tokens.start];
        banned_thinking.extend(tokens.stop_ids());
        let mut banned_text = vec![tokens.start];
        banned_text.extend(tokens.stop_ids().iter().filter(|&&id| id != tokens.end));
        if let Some(open) = tokenizer.special_id(CALL) {
            banned_thinking.push(open);
            if !callable {
                banned_text.push(open);
            }
        }
        if callable {
            let open = Part::Token(tag(CALL)?);
            close.push(tag("</tool_call>")?);
            let newline = Part::text("\n");
            after.add(std::slice::from_ref(&open), CALLS);
            after.add(&[newline.clone(), open.clone()], CALLS);
            starts.iter_mut().for_each(|words| words.add(std::slice::from_ref(&open), CALLS));
            let [_, behind] = &mut starts;
            behind.add(&[newline.clone(), open.clone()], CALLS);
            behind.add(&[newline.clone(), newline, open], CALLS);
        }
        if content.is_some() && !callable {
            // As templates write it behind the thinking. Where calls may come, that begins one of their words.
            starts[1].add(&[Part::text("\n\n")], BLANKS);
        }
        if thinking == Thinking::Possible {
            let think = tokenizer.special_id(THINK).map_or(Part::text(THINK), Part::Token);
            starts[0].add(&[think], THINKS);
        }
        let most_calls = if demands.one_call { 1 } else { MOST_CALLS };
        let rules = Rules {
            vocabulary,
            ends: [tokens.end].into(),
            close: close.into(),
            starts,
            after,
            call,
            content,
            free,
            most_calls,
            banned_thinking: banned_thinking.into(),
            banned_text: banned_text.into(),
        };
        let mut guide = Self { rules: Arc::new(rules), state: State::Over, calls: 0 };
        guide.state = match thinking {
            Thinking::Open => State::Thinking(Watch::default(), false),
            Thinking::Over => guide.start(0, false),
            Thinking::Possible => guide.start(0, false),
        };
        Ok(guide)
    }

    /// Before content or calls; `muddy`: what the thinking holds would count if nothing followed.
    fn start(&self, which: usize, muddy: bool) -> State {
        if self.rules.free {
            return State::Text { watch: Watch::default(), blank: muddy, first: which == 0 };
        }
        let content = self.rules.content.as_ref();
        State::Start(which, Words::START, content.map(|template| self.content(template)))
    }

    fn content(&self, template: &Template) -> Text {
        Text::new(template.start(), Arc::clone(&self.rules.ends))
    }

    fn call(&mut self) -> Result<(), ConstraintError> {
        let Some(call) = &self.rules.call else {
            return Err(ConstraintError::new("a call where none may be"));
        };
        self.calls += 1;
        self.state = State::Call(Text::new(call.start(), Arc::clone(&self.rules.close)));
        Ok(())
    }

    fn enter(&mut self, outcome: usize) -> Result<(), ConstraintError> {
        match outcome {
            THINKS => self.state = State::Thinking(Watch::default(), false),
            CALLS => return self.call(),
            BLANKS => {}
            _ => self.state = State::Over,
        }
        Ok(())
    }

    /// The bytes of a token as the parser reads them: also of the control tokens that spell a tag.
    fn bytes(&self, id: TokenId) -> Vec<u8> {
        let vocabulary = &self.rules.vocabulary;
        let tag = || [THINK, THINK_END, CALL].into_iter().find(|tag| vocabulary.control(tag) == Some(id));
        vocabulary
            .text(id)
            .map(<[u8]>::to_vec)
            .or_else(|| tag().map(|tag| tag.as_bytes().to_vec()))
            .unwrap_or_default()
    }

    fn accept_text(&mut self, id: TokenId) -> Result<(), ConstraintError> {
        let bytes = self.bytes(id);
        let callable = self.rules.call.is_some();
        let State::Text { watch, blank, first } = &mut self.state else { return Ok(()) };
        let tags: &[&str] = if *first { &[CALL, THINK] } else { &[CALL] };
        for byte in bytes {
            match watch.push(byte, tags) {
                Some(0) if callable => return self.call(),
                Some(1) => {
                    self.state = State::Thinking(Watch::default(), false);
                    return Ok(());
                }
                _ => {}
            }
            if !byte.is_ascii_whitespace() {
                *blank = false;
                // The tag of thinking stands first or is text; its own bytes come first too.
                *first = *first && (byte == b'<' || watch.is_open());
            }
        }
        Ok(())
    }
}

/// Any call that may be made, between its tags.
fn call_grammar(guides: &Guides, demands: &Demands) -> Result<Grammar, GuideError> {
    let (mut names, mut rules) = (Vec::new(), String::new());
    for (index, tool) in demands.tools.iter().enumerate() {
        let bound = guides.arguments(index, tool, demands.calls)?.is_some();
        let schema = if bound { argument_schema(tool) } else { serde_json::json!({"type": "object"}) };
        let head = Value::from(format!("{{\"name\": \"{}\", \"arguments\": ", tool.name));
        let schema = with_options(&schema, !tool.strict);
        rules.push_str(&format!(
            "call_{index}: {head} arguments_{index} \"}}\"\narguments_{index}: %json {schema}\n"
        ));
        names.push(format!("call_{index}"));
    }
    Ok(Grammar::Composed(format!("start: \"\\n\"? ({}) \"\\n\"?\n{rules}", names.join(" | "))))
}

impl Constraint for HermesGuide {
    fn allowed(&mut self) -> Result<Allowed, ConstraintError> {
        let rules = &*self.rules;
        let only = |mask: TokenMask| Ok(Allowed::Only(Arc::new(mask)));
        let except = |base: &Arc<[TokenId]>, more: Vec<TokenId>| {
            if more.is_empty() {
                return Ok(Allowed::Except(Arc::clone(base)));
            }
            Ok(Allowed::Except(base.iter().copied().chain(more).collect()))
        };
        match &mut self.state {
            State::Thinking(watch, _) => {
                except(&rules.banned_thinking, watch.straddling(&[THINK_END], &rules.vocabulary))
            }
            State::Start(which, at, content) => {
                let mut mask = match content {
                    Some(text) => text.mask()?,
                    None => rules.vocabulary.nothing(),
                };
                rules.starts[*which].allow(*at, &rules.vocabulary, &mut mask);
                only(mask)
            }
            State::Text { watch, blank, .. } => {
                let mut more = if rules.call.is_some() {
                    watch.straddling(&[CALL, THINK], &rules.vocabulary)
                } else {
                    Vec::new()
                };
                if *blank {
                    more.extend(rules.ends.iter());
                }
                except(&rules.banned_text, more)
            }
            State::Content(text) | State::Call(text) => only(text.mask()?),
            State::After(at) => {
                let mut mask = rules.vocabulary.nothing();
                if self.calls < rules.most_calls {
                    rules.after.allow(*at, &rules.vocabulary, &mut mask);
                } else {
                    rules.ends.iter().for_each(|&id| mask.allow(id));
                }
                only(mask)
            }
            State::Over => Ok(Allowed::Any),
        }
    }

    fn accept(&mut self, id: TokenId) -> Result<(), ConstraintError> {
        let rules = Arc::clone(&self.rules);
        match &mut self.state {
            State::Thinking(..) => {
                for byte in self.bytes(id) {
                    let State::Thinking(watch, muddy) = &mut self.state else { break };
                    let found = watch.push(byte, &[THINK_END, CALL]);
                    *muddy |= found == Some(1);
                    let muddy = *muddy;
                    if found == Some(0) {
                        self.state = self.start(1, muddy);
                    }
                }
            }
            State::Start(which, at, content) => match rules.starts[*which].step(*at, id, &rules.vocabulary) {
                Some(next) => {
                    *at = next;
                    // Newlines behind the thinking are no content yet.
                    if let Some(outcome) = rules.starts[*which].outcome(next) {
                        self.enter(outcome)?;
                    }
                }
                None => {
                    let Some(mut text) = content.take() else {
                        return Err(ConstraintError::new("neither a call nor content may begin so"));
                    };
                    self.state = if text.accept(id)? { State::Over } else { State::Content(text) };
                }
            },
            State::Text { .. } if rules.ends.contains(&id) => self.state = State::Over,
            State::Text { .. } => self.accept_text(id)?,
            State::Content(text) => {
                if text.accept(id)? {
                    self.state = State::Over;
                }
            }
            State::Call(text) => {
                if text.accept(id)? {
                    self.state = State::After(Words::START);
                }
            }
            State::After(at) => {
                let next = rules.after.step(*at, id, &rules.vocabulary);
                *at = next.ok_or_else(|| ConstraintError::new("nothing but calls may follow a call"))?;
                if let Some(outcome) = rules.after.outcome(*at) {
                    self.enter(outcome)?;
                }
            }
            State::Over => {}
        }
        Ok(())
    }

    fn is_quick(&self, id: TokenId) -> bool {
        match &self.state {
            // What ends a tag has `>` in it.
            State::Thinking(..) | State::Text { .. } => !self.bytes(id).contains(&b'>'),
            State::Over => true,
            State::Start(..) | State::Content(_) | State::Call(_) | State::After(_) => false,
        }
    }

    fn is_settled(&self) -> bool {
        match self.state {
            State::Over => true,
            State::Text { blank, first, .. } => self.rules.call.is_none() && !blank && !first,
            _ => false,
        }
    }

    fn fork(&self) -> Box<dyn Constraint> {
        let state = match &self.state {
            State::Thinking(watch, muddy) => State::Thinking(watch.clone(), *muddy),
            State::Start(which, at, text) => State::Start(*which, *at, text.as_ref().map(Text::fork)),
            State::Text { watch, blank, first } => {
                State::Text { watch: watch.clone(), blank: *blank, first: *first }
            }
            State::Content(text) => State::Content(text.fork()),
            State::Call(text) => State::Call(text.fork()),
            State::After(at) => State::After(*at),
            State::Over => State::Over,
        };
        Box::new(Self { rules: Arc::clone(&self.rules), state, calls: self.calls })
    }
}
