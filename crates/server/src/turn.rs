//! The seam of the routes that answer in a conversation: each makes a [`Turn`] of its own wire types, and what is generated
//! from it is the same for all.

use std::sync::Arc;

use ctxserve_chat::guide::CallRule;
use ctxserve_chat::{Conversation, Message, ParserOptions, RenderError, Rendered};
use ctxserve_core::{Guide, TokenId};

use crate::error::ApiError;
use crate::generate::choice::{Choice, ChoiceOptions};
use crate::generate::run::{Generation, Job};
use crate::generate::scribe::Scribe;
use crate::generate::stop::StopMatcher;
use crate::http::guard::{Caller, Tenant};
use crate::record::Accepted;
use crate::state::ServerState;
use crate::validate::guide;
use crate::validate::history::few;
use crate::validate::options::{Options, room};
use crate::validate::tools::ToolChoice;

/// How a route spells the places of a request that errors name.
pub(crate) trait Places {
    /// The field that the prompt is made of.
    fn prompt(&self) -> &'static str;

    /// Where message `index` of the conversation came from.
    fn message(&self, index: usize) -> String;

    /// Where the schema of function `index` of the conversation came from.
    fn schema(&self, index: usize) -> String;

    /// How ids of calls begin.
    fn call_prefix(&self) -> &'static str {
        "call_"
    }

    /// `error` says that a prompt of `prompt` tokens leaves no room for an answer; a route may say it in its own words.
    fn too_long(&self, state: &ServerState, prompt: usize, error: ApiError) -> ApiError {
        let _ = (state, prompt);
        error
    }
}

/// A checked request for the next turn of a conversation.
pub(crate) struct Turn<'a> {
    pub(crate) conversation: Conversation,
    pub(crate) options: Options,
    pub(crate) choice: ToolChoice,
    /// Whether arguments must be valid for the schema, for each function of the conversation.
    pub(crate) strict: Vec<bool>,
    /// What the text for the user has to be.
    pub(crate) content: Option<guide::Content>,
    /// End after the first call.
    pub(crate) one_call: bool,
    /// Leave reasoning out of the answer.
    pub(crate) hide_reasoning: bool,
    pub(crate) places: &'a dyn Places,
}

/// A turn, rendered and ready to be generated.
pub(crate) struct Prepared {
    pub(crate) options: Options,
    pub(crate) prompt: Arc<[TokenId]>,
    pub(crate) max_tokens: usize,
    /// How answers are read.
    parser: ParserOptions,
    /// What answers may be.
    guide: Option<Guide>,
    one_call: bool,
    hide_reasoning: bool,
    prompt_param: &'static str,
    call_prefix: &'static str,
    tenant: Tenant,
}

impl Turn<'_> {
    /// Renders the prompt and compiles what the answer is held to. Slow: run it on [`crate::http::body::blocking`].
    ///
    /// # Errors
    /// 400 naming the part of the request, 503 while too many grammars are being compiled.
    pub(crate) fn prepare(mut self, state: &ServerState, tenant: Tenant) -> Result<Prepared, ApiError> {
        let format = state.format();
        let prompt_param = self.places.prompt();
        let rendered = self.render(state, tenant)?;
        let is_turn = |message: &&Message| matches!(message, Message::Assistant { .. });
        let turns = self.conversation.messages.iter().filter(is_turn).count();
        state.metrics().history(rendered.replayed, turns);
        let prompt: Arc<[TokenId]> = rendered.ids.into();
        let callable = self.conversation.tools.iter().filter(|tool| self.choice.includes(&tool.name));
        let names: Vec<String> = callable.map(|tool| tool.name.clone()).collect();
        let parser = ParserOptions {
            calls: self.choice.rule != CallRule::Forbidden,
            tools: Some(names.into()),
            thinking: format.leaves_thinking_open(&prompt),
        };
        let default = state.config().default_max_tokens;
        let room = room(state, &self.options, default, prompt.len(), prompt_param);
        let max_tokens = room.map_err(|error| self.places.too_long(state, prompt.len(), error))?;
        let guide = guide::chat(state, &self, &prompt)?;
        if guide.is_some() {
            // A checkpoint's end that is ordinary text would cut the text under a grammar.
            let eos = &mut self.options.rules.eos;
            *eos = eos.iter().copied().filter(|id| state.tokenizer().is_control(*id)).collect();
        }
        let call_prefix = self.places.call_prefix();
        let Turn { options, one_call, hide_reasoning, .. } = self;
        Ok(Prepared {
            options,
            prompt,
            max_tokens,
            parser,
            guide,
            one_call,
            hide_reasoning,
            prompt_param,
            call_prefix,
            tenant,
        })
    }

    /// The prompt alone. Turns that this tenant was answered with are repeated as they were.
    ///
    /// # Errors
    /// 400 for too many messages, or naming the one that the format cannot express.
    pub(crate) fn render(&mut self, state: &ServerState, tenant: Tenant) -> Result<Rendered, ApiError> {
        few(state.config(), self.conversation.messages.len(), self.places.prompt())?;
        state.turns().recall(tenant, &mut self.conversation);
        state.format().render_turns(&self.conversation, true).map_err(|error| self.unrendered(&error))
    }

    fn unrendered(&self, error: &RenderError) -> ApiError {
        match error.message.map(|index| self.places.message(index)) {
            Some(at) => ApiError::invalid(at.clone(), format!("{at}: {}", error.what)),
            None => ApiError::invalid(self.places.prompt(), error.what.clone()),
        }
    }
}

impl Prepared {
    /// Submits it. `name` is the answer's id and `route` the path, both for the log.
    ///
    /// # Errors
    /// What the engine refused, as the client should see it.
    pub(crate) fn start(
        &self,
        state: &ServerState,
        name: &str,
        route: &'static str,
        caller: Caller,
    ) -> Result<Generation, ApiError> {
        let options = &self.options;
        let accepted = Accepted {
            id: state.next_request(),
            name: name.to_owned(),
            http_id: caller.http_id,
            route,
            model: options.model.clone(),
            stream: options.stream,
            prompt_tokens: self.prompt.len(),
            max_tokens: self.max_tokens,
            choices: options.n,
            arrived: caller.arrived,
        };
        let job = Job {
            prompts: vec![Arc::clone(&self.prompt)],
            n: options.n,
            sampling: options.sampling.clone(),
            rules: options.rules.clone(),
            max_tokens: vec![self.max_tokens],
            guide: self.guide.clone(),
            salt: options.salt.clone(),
            prompt_param: self.prompt_param,
        };
        // The parser needs the control tokens that end a turn; other stop ids are no part of the message.
        let mut silent_stops = options.rules.token_ids.clone();
        silent_stops.retain(|&id| !options.include_stop && !state.tokenizer().is_special(id));
        let reading = ChoiceOptions {
            stop: StopMatcher::new(&options.stop, options.include_stop),
            rules: options.rules.clone(),
            silent_stops,
            all_logprobs: false,
            one_call: self.one_call,
            hide_reasoning: self.hide_reasoning,
        };
        Generation::start(state, &job, accepted, || {
            Choice::new(
                state.format().parser(self.parser.clone()),
                reading.clone(),
                Arc::clone(&options.stop),
            )
            .written_by(Scribe::new(state.clone(), self.tenant, self.call_prefix, &self.prompt))
        })
    }
}
