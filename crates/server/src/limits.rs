//! Ceilings on what clients may send: one table for every route, every flag and the documentation.
//!
//! A row gives a field of [`Limits`], the flag that sets it, its default and the range that the rest of the program can bear.
//! Numbers that a device or a format fixes (logits' width, context) are not here: they are read from the engine.

use std::time::Duration;

use ctxserve_chat::guide::GuideLimits;
use ctxserve_core::limits as core;

/// What a limit counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Things.
    Count,
    /// Bytes.
    Bytes,
    /// Seconds.
    Seconds,
}

/// A value for a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amount {
    /// Things or bytes.
    Number(usize),
    /// A time.
    Time(Duration),
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    /// The flag, without dashes in front.
    pub flag: &'static str,
    /// What it counts.
    pub unit: Unit,
    /// Where nobody sets it.
    pub default: usize,
    /// Lowest value that may be set.
    pub least: usize,
    /// Highest value that may be set.
    pub most: usize,
    /// What it bounds, and what a request beyond it gets.
    pub help: &'static str,
    set: fn(&mut Limits, Amount),
}

macro_rules! of_unit {
    (type Seconds) => {
        Duration
    };
    (type $other:ident) => {
        usize
    };
    (default Seconds, $value:expr) => {
        Duration::from_secs($value as u64)
    };
    (default $other:ident, $value:expr) => {
        $value
    };
    (set Seconds, $field:ident) => {
        |limits, amount| {
            if let Amount::Time(time) = amount {
                limits.$field = time;
            }
        }
    };
    (set $other:ident, $field:ident) => {
        |limits, amount| {
            if let Amount::Number(number) = amount {
                limits.$field = number;
            }
        }
    };
}

macro_rules! limits {
    ($($field:ident, $flag:literal: $unit:ident = $default:expr, $least:expr => $most:expr, $help:literal;)+) => {
        /// Ceilings of a server; see [`TABLE`] for what each is.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct Limits {
            $(#[doc = $help] pub $field: of_unit!(type $unit),)+
        }

        impl Default for Limits {
            fn default() -> Self {
                Self { $($field: of_unit!(default $unit, $default),)+ }
            }
        }

        /// Every limit.
        pub const TABLE: [Limit; [$($flag),+].len()] = [
            $(Limit {
                flag: $flag,
                unit: Unit::$unit,
                default: $default,
                least: $least,
                most: $most,
                help: $help,
                set: of_unit!(set $unit, $field),
            },)+
        ];
    };
}

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
const GUIDES: GuideLimits = GuideLimits::DEFAULT;

limits! {
    max_connections, "max-connections": Count = 4096, 1 => 1_000_000,
        "Most connections at once; others wait to be accepted";
    max_headers, "max-headers": Count = 256, 16 => 4096, "Most headers of a request, else 431";
    max_header_bytes, "max-header-bytes": Bytes = MIB, 8 * KIB => 16 * MIB, "Largest head of a request, else 431";
    header_timeout, "header-timeout": Seconds = 30, 1 => 3600,
        "Longest time for the head of a request; then the connection is closed";
    max_body_bytes, "max-body-bytes": Bytes = 32 * MIB, KIB => 1024 * MIB, "Largest body of a request, else 413";
    body_timeout, "body-timeout": Seconds = 60, 1 => 3600, "Longest time for the body of a request, else 408";
    max_json_depth, "max-json-depth": Count = 100, 16 => 120, "Deepest nesting of a body, in fields unknown too, else 400";
    request_timeout, "request-timeout": Seconds = 21_600, 1 => 604_800,
        "Longest time for an answer, waiting included; then it ends with an error";
    max_n, "max-n": Count = core::MAX_N, 1 => 1024, "Most choices of a prompt (n)";
    max_prompts, "max-prompts": Count = core::MAX_PROMPTS, 1 => 16_384, "Most prompts of a request to /v1/completions";
    max_sequences, "max-request-sequences": Count = 1024, 1 => 16_384, "Most choices of a request, over all its prompts";
    max_messages, "max-messages": Count = 16_384, 1 => 65_536, "Most messages of a conversation";
    max_tools, "max-tools": Count = 1024, 1 => 16_384, "Most tools of a request";
    max_stop_strings, "max-stop-strings": Count = core::MAX_STOP_STRINGS, 0 => 256, "Most stop strings";
    max_stop_bytes, "max-stop-bytes": Bytes = core::MAX_STOP_STRING_BYTES, 1 => 64 * KIB, "Longest stop string";
    max_stop_token_ids, "max-stop-token-ids": Count = core::MAX_STOP_TOKEN_IDS, 0 => 1024, "Most stop token ids";
    max_logit_bias, "max-logit-bias": Count = core::MAX_LOGIT_BIAS, 0 => core::MAX_LOGIT_BIAS, "Most entries of logit_bias";
    max_logprobs, "max-logprobs": Count = core::MAX_LOGPROBS, 0 => core::MAX_LOGPROBS,
        "Most alternatives that log-probabilities are given for";
    max_schema_bytes, "max-schema-bytes": Bytes = GUIDES.schema_bytes, 1 => 16 * MIB,
        "Largest JSON Schema that an answer may be held to";
    max_schema_depth, "max-schema-depth": Count = GUIDES.schema_depth, 1 => 100, "Deepest such schema";
    max_grammar_bytes, "max-grammar-bytes": Bytes = GUIDES.text_bytes, 1 => MIB,
        "Longest regular expression, grammar or list of choices";
    grammar_timeout, "grammar-timeout": Seconds = 5, 1 => 60, "Longest time that compiling one of these may take";
    max_stored_responses, "max-stored-responses": Count = 4096, 0 => 1_000_000, "Most responses of /v1/responses that are kept; 0 keeps none";
    max_stored_response_bytes, "max-stored-response-bytes": Bytes = 256 * MIB, 0 => 64 * 1024 * MIB, "Most bytes that they take";
    max_turn_bytes, "max-turn-bytes": Bytes = 64 * MIB, 0 => 64 * 1024 * MIB,
        "Most bytes of the model's own turns kept, so that prompts repeat them token for token; 0 keeps none";
}

impl Limits {
    /// Sets the limit of a row; an amount of another unit changes nothing.
    pub fn set(&mut self, limit: &Limit, amount: Amount) {
        (limit.set)(self, amount);
    }

    /// Those that bound grammars.
    pub(crate) fn guides(&self) -> GuideLimits {
        GuideLimits {
            schema_bytes: self.max_schema_bytes,
            schema_depth: self.max_schema_depth,
            text_bytes: self.max_grammar_bytes,
            compile_time: self.grammar_timeout,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_is_in_its_range() {
        for limit in &TABLE {
            assert!((limit.least..=limit.most).contains(&limit.default), "{}", limit.flag);
            assert!(!limit.help.ends_with('.'), "{}", limit.flag);
        }
        assert_eq!(Limits::default().guides(), GuideLimits::DEFAULT);
    }

    #[test]
    fn each_row_sets_a_field_of_its_own() {
        for limit in &TABLE {
            let amount = match limit.unit {
                Unit::Seconds => Amount::Time(Duration::from_millis(1)),
                Unit::Count | Unit::Bytes => Amount::Number(usize::MAX),
            };
            let mut limits = Limits::default();
            limits.set(limit, amount);
            assert_ne!(limits, Limits::default(), "{}", limit.flag);
            let again = TABLE.iter().filter(|other| {
                let mut both = limits.clone();
                both.set(other, amount);
                both == limits && other.unit == limit.unit
            });
            assert_eq!(again.map(|other| other.flag).collect::<Vec<_>>(), [limit.flag]);
        }
    }
}
