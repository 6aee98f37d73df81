//! Arguments of the chat template: a request's over the operator's.

use ctxserve_chat::{ChatFormat, ReasoningEffort};
use serde_json::{Map, Value};

use crate::config::ServerConfig;

/// What may be given to a template, and what was.
#[derive(Clone, Copy)]
pub(crate) struct TemplateArguments<'a> {
    /// Names that the template reads, beyond effort and thinking.
    accepted: &'a [String],
    /// The operator's.
    defaults: &'a Map<String, Value>,
    /// The request's.
    given: Option<&'a Map<String, Value>>,
}

/// What arguments say. Nothing of the renderer can be reached through them: effort and thinking have fields of their own, and
/// other names are those that the template reads as variables of its own.
#[derive(Debug, Default)]
pub(crate) struct Told {
    pub(crate) effort: Option<ReasoningEffort>,
    pub(crate) thinking: Option<bool>,
    pub(crate) others: Map<String, Value>,
}

impl<'a> TemplateArguments<'a> {
    pub(crate) fn new(
        config: &'a ServerConfig,
        format: &'a dyn ChatFormat,
        given: Option<&'a Map<String, Value>>,
    ) -> Self {
        Self { accepted: format.template_arguments(), defaults: &config.default_template_arguments, given }
    }

    /// Reads them. A name that a request has hides the operator's, and null is as if it had not been given.
    ///
    /// # Errors
    /// What is wrong, and whether the name is known.
    pub(crate) fn read(self) -> Result<Told, (String, bool)> {
        let given = self.given.into_iter().flatten();
        let hidden = |name: &String| self.given.is_some_and(|given| given.contains_key(name));
        let defaults = self.defaults.iter().filter(|(name, _)| !hidden(name));
        let mut told = Told::default();
        let mut silent = false;
        for (name, value) in given.chain(defaults) {
            match (name.as_str(), value) {
                ("reasoning_effort" | "enable_thinking", Value::Null) => {}
                ("reasoning_effort", Value::String(text)) => {
                    told.effort = Some(level(text).map_err(|what| (what.to_owned(), true))?);
                }
                ("enable_thinking", Value::Bool(on)) => {
                    told.thinking = Some(*on);
                    silent = !on;
                }
                ("reasoning_effort" | "enable_thinking", _) => {
                    return Err((format!("'{name}' has a value of the wrong kind"), true));
                }
                _ if self.accepted.contains(name) => {
                    if !value.is_null() {
                        told.others.insert(name.clone(), value.clone());
                    }
                }
                _ => {
                    let name: String = name.chars().take(64).collect();
                    return Err((format!("'{name}' is not an accepted template argument"), false));
                }
            }
        }
        if silent {
            told.effort = told.effort.or(Some(ReasoningEffort::None));
        }
        Ok(told)
    }
}

/// Reads a level of effort.
pub(crate) fn level(text: &str) -> Result<ReasoningEffort, &'static str> {
    let known = "reasoning effort must be none, minimal, low, medium, high, xhigh or max";
    ReasoningEffort::parse(text).ok_or(known)
}
