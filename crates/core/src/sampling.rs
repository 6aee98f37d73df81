//! Sampling parameters and their bounds.

use thiserror::Error;

use crate::TokenId;

/// Ceilings on numbers that come from clients. One table for every route (facts: each has been a CVE elsewhere).
pub mod limits {
    /// Most alternatives a request may ask log-probabilities for.
    pub const MAX_LOGPROBS: usize = 20;
    /// Most entries of a logit bias.
    pub const MAX_LOGIT_BIAS: usize = 1024;
    /// Most extra stop token ids.
    pub const MAX_STOP_TOKEN_IDS: usize = 128;
    /// Most stop strings.
    pub const MAX_STOP_STRINGS: usize = 16;
    /// Longest stop string, bytes.
    pub const MAX_STOP_STRING_BYTES: usize = 4096;
    /// Most choices (`n`) of one request.
    pub const MAX_N: usize = 128;
    /// Most prompts in one `/v1/completions` request.
    pub const MAX_PROMPTS: usize = 1024;
    /// Highest temperature.
    pub const MAX_TEMPERATURE: f32 = 2.0;
}

/// A parameter out of its bounds; `param` is the OpenAI field name.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{message}")]
pub struct ParamError {
    /// The field at fault.
    pub param: &'static str,
    /// What is wrong, with the value and the bound.
    pub message: String,
}

/// How the next token is picked from the logits. Order of application: bans (`min_tokens`), logit bias,
/// penalties, log-probabilities are read here, temperature, top-k, top-p, min-p, draw.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy; 1 leaves the distribution as it is.
    pub temperature: f32,
    /// Nucleus mass in (0, 1]; 1 is off.
    pub top_p: f32,
    /// Keep the k most likely; 0 is off.
    pub top_k: u32,
    /// Drop candidates below `min_p` times the best probability; 0 is off.
    pub min_p: f32,
    /// Subtracted once from every token generated so far, in [-2, 2].
    pub presence_penalty: f32,
    /// Subtracted per occurrence among generated tokens, in [-2, 2].
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1 is off (CTRL, arXiv 1909.05858).
    pub repetition_penalty: f32,
    /// Added to the logits of single tokens, in [-100, 100].
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Fixes the random stream of this sequence; `None` draws one.
    pub seed: Option<u64>,
    /// Alternatives to report per position; `Some(0)` reports the sampled token alone.
    pub logprobs: Option<usize>,
    /// No stop id is sampled before this many tokens.
    pub min_tokens: usize,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: None,
            logprobs: None,
            min_tokens: 0,
        }
    }
}

impl SamplingParams {
    /// Greedy decoding with everything else off.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Whether the draw is an arg-max.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Whether logits depend on earlier tokens.
    pub fn has_penalties(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0 || self.repetition_penalty != 1.0
    }

    /// Checks every bound. `vocab` is the logits width, which may exceed the tokenizer's length.
    ///
    /// # Errors
    /// The first field out of bounds.
    pub fn validate(&self, vocab: usize) -> Result<(), ParamError> {
        let fail = |param, message| Err(ParamError { param, message });
        let range = |param, value: f32, low: f32, high: f32| {
            if (low..=high).contains(&value) {
                Ok(())
            } else {
                Err(ParamError {
                    param,
                    message: format!("{param} must be between {low} and {high}, got {value}"),
                })
            }
        };
        range("temperature", self.temperature, 0.0, limits::MAX_TEMPERATURE)?;
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return fail("top_p", format!("top_p must be in (0, 1], got {}", self.top_p));
        }
        range("min_p", self.min_p, 0.0, 1.0)?;
        range("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty <= 10.0) {
            let got = self.repetition_penalty;
            return fail("repetition_penalty", format!("repetition_penalty must be in (0, 10], got {got}"));
        }
        if self.logit_bias.len() > limits::MAX_LOGIT_BIAS {
            let (got, most) = (self.logit_bias.len(), limits::MAX_LOGIT_BIAS);
            return fail("logit_bias", format!("logit_bias has {got} entries, at most {most} are allowed"));
        }
        for &(id, bias) in &self.logit_bias {
            if id as usize >= vocab {
                return fail(
                    "logit_bias",
                    format!("logit_bias names token {id}, the vocabulary has {vocab}"),
                );
            }
            range("logit_bias", bias, -100.0, 100.0)?;
        }
        if self.logprobs.is_some_and(|n| n > limits::MAX_LOGPROBS) {
            let most = limits::MAX_LOGPROBS;
            return fail("top_logprobs", format!("top_logprobs must be at most {most}"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_and_greedy_are_valid() {
        assert_eq!(SamplingParams::default().validate(10), Ok(()));
        assert!(SamplingParams::greedy().is_greedy());
    }

    #[test]
    fn every_bound_names_its_field() {
        let base = SamplingParams::default;
        let cases = [
            ("temperature", SamplingParams { temperature: 2.1, ..base() }),
            ("temperature", SamplingParams { temperature: f32::NAN, ..base() }),
            ("top_p", SamplingParams { top_p: 0.0, ..base() }),
            ("top_p", SamplingParams { top_p: f32::NAN, ..base() }),
            ("min_p", SamplingParams { min_p: -0.1, ..base() }),
            ("presence_penalty", SamplingParams { presence_penalty: 3.0, ..base() }),
            ("frequency_penalty", SamplingParams { frequency_penalty: f32::INFINITY, ..base() }),
            ("repetition_penalty", SamplingParams { repetition_penalty: 0.0, ..base() }),
            ("logit_bias", SamplingParams { logit_bias: vec![(10, 1.0)], ..base() }),
            ("logit_bias", SamplingParams { logit_bias: vec![(9, 101.0)], ..base() }),
            ("top_logprobs", SamplingParams { logprobs: Some(limits::MAX_LOGPROBS + 1), ..base() }),
        ];
        for (field, params) in cases {
            assert_eq!(params.validate(10).unwrap_err().param, field, "{params:?}");
        }
    }
}
