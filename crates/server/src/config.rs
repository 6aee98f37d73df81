//! What an operator may set.

use std::time::Duration;

use ctxserve_chat::ChatFormat;
use ctxserve_core::{SamplingParams, TokenId};
use serde_json::{Map, Value};

use crate::http::keys::ApiKeys;
use crate::http::origin::Browsers;
use crate::limits::Limits;
use crate::state::{ServerError, unix_seconds};
use crate::validate::arguments::TemplateArguments;

/// The date that formats may put into the prompt.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum PromptDate {
    /// The current day, UTC.
    #[default]
    Today,
    /// Always this `YYYY-MM-DD`, for reproducible prompts.
    Fixed(String),
    /// None.
    Omitted,
}

impl PromptDate {
    /// `YYYY-MM-DD`, now.
    pub fn date(&self) -> Option<String> {
        match self {
            Self::Today => Some(civil_date(unix_seconds() / 86_400)),
            Self::Fixed(date) => Some(date.clone()),
            Self::Omitted => None,
        }
    }
}

/// By which names chat answers show reasoning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ReasoningNames {
    /// `reasoning` and `reasoning_content`.
    #[default]
    Both,
    /// `reasoning` alone.
    Reasoning,
    /// `reasoning_content` alone.
    ReasoningContent,
}

impl ReasoningNames {
    /// What goes into `reasoning` and into `reasoning_content`.
    pub(crate) fn of(self, text: Option<String>) -> (Option<String>, Option<String>) {
        match self {
            Self::Both => (text.clone(), text),
            Self::Reasoning => (text, None),
            Self::ReasoningContent => (None, text),
        }
    }
}

/// Settings of the HTTP server. Everything has a default.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Names that requests may use for the model; the first is the default and the metrics label. Not empty.
    pub served_model_names: Vec<String>,
    /// `root` of `/v1/models`: where the weights came from.
    pub model_root: String,
    /// When not empty, every route but the health probes needs one of them.
    pub api_keys: ApiKeys,
    /// Leave `/metrics` open although keys are set.
    pub metrics_without_key: bool,
    /// Sampling where a request is silent (the checkpoint's generation config or a profile).
    pub default_sampling: SamplingParams,
    /// `max_tokens` of a chat request that sets none; `None` is the rest of the context.
    pub default_max_tokens: Option<usize>,
    /// Arguments of the chat template where a request is silent.
    pub default_template_arguments: Map<String, Value>,
    /// End-of-turn ids of the checkpoint; those of the chat format are added.
    pub eos: Vec<TokenId>,
    /// Accept `tools` with the implied `tool_choice: "auto"`.
    pub enable_auto_tool_choice: bool,
    /// By which names chat answers show reasoning.
    pub reasoning_names: ReasoningNames,
    /// Keep reasoning of turns before the last final answer in prompts.
    pub keep_reasoning: bool,
    /// Date in prompts.
    pub prompt_date: PromptDate,
    /// Ceilings on what clients may send.
    pub limits: Limits,
    /// What web pages may do, and which names the server goes by.
    pub browsers: Browsers,
    /// Longest silence of a stream before a comment is sent.
    pub keep_alive: Duration,
    /// `/health` turns 503 when work is pending and the engine has not finished a step for this long.
    pub stall_timeout: Duration,
    /// How long running requests may take to finish after shutdown began.
    pub drain_timeout: Duration,
    /// How long aborted requests may take to leave the engine, longer than any step: a device that hangs never lets them go.
    pub abort_timeout: Duration,
    /// `system_fingerprint` of responses.
    pub system_fingerprint: String,
}

impl ServerConfig {
    /// Whether the settings make sense, and go with a chat format.
    ///
    /// # Errors
    /// [`ServerError::TemplateArguments`] and [`ServerError::Browsers`].
    pub fn check(&self, format: &dyn ChatFormat) -> Result<(), ServerError> {
        self.browsers.check()?;
        let defaults = TemplateArguments::new(self, format, None).read();
        defaults.map(drop).map_err(|(what, _)| ServerError::TemplateArguments(what))
    }
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            served_model_names: vec!["default".to_owned()],
            model_root: String::new(),
            api_keys: ApiKeys::default(),
            metrics_without_key: false,
            default_sampling: SamplingParams::default(),
            default_max_tokens: None,
            default_template_arguments: Map::new(),
            eos: Vec::new(),
            enable_auto_tool_choice: true,
            reasoning_names: ReasoningNames::Both,
            keep_reasoning: false,
            prompt_date: PromptDate::Today,
            limits: Limits::default(),
            browsers: Browsers::default(),
            keep_alive: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(120),
            drain_timeout: Duration::from_secs(30),
            abort_timeout: Duration::from_secs(10),
            system_fingerprint: concat!("ctxserve-", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}

/// The Gregorian date of a day counted from 1970-01-01, by eras of 400 years that begin on 1 March.
fn civil_date(days: u64) -> String {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let cases = [
            (0, "1970-01-01"),
            (59, "1970-03-01"),
            (11_016, "2000-02-29"),
            (11_017, "2000-03-01"),
            (19_723, "2024-01-01"),
            (20_585, "2026-05-12"),
        ];
        for (days, date) in cases {
            assert_eq!(civil_date(days), date);
        }
    }
}
