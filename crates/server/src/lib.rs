//! The OpenAI HTTP API on axum, and Anthropic's Messages API.
//!
//! A request's way: `http` reads the body and checks the key, `wire` turns JSON into types, `validate` turns types
//! into parameters, `turn` makes a running generation of a conversation, `generate` follows the engine's events and makes
//! pieces of an answer, `api` puts those into the shape of a route, whole or streamed. No other crate sees a wire type.
//!
//! Where OpenAI and vLLM leave room or we differ:
//!
//! - Unknown fields are ignored; fields that are known and not served (`wire::refused`) are a 400 that names them.
//! - `tool_choice` `required` and named, `strict` functions, `response_format`, `structured_outputs` (and the `guided_*` of
//!   older vLLM) are enforced by constrained decoding: in arguments and in the text for the user, never in reasoning.
//!   A schema with keywords that cannot be enforced is refused if it is `strict`; else those keywords are left out.
//!   Text beside a forced call may come before it where the format has a place for it (Harmony's preambles). A call of
//!   a named function ends the answer.
//! - Calls are delivered whether or not `tools` were declared, unless `tool_choice` is `none`: then their text is
//!   content. `parallel_tool_calls: false` ends an answer after its first call.
//! - `max_tokens` beyond the context is cut to it; only a prompt that leaves no room is refused.
//! - Choice `i` of a prompt draws from `seed + i`, so it equals a request of its own with that seed.
//! - Stop strings see the text for the user alone, never reasoning or arguments. Of several matches the first to
//!   end wins, then the longest.
//! - Log-probabilities cover the tokens of the visible text in chat, every token up to the end of the text in
//!   completions, whose `tokens` line up with `token_ids`. Text parts of a message are joined without a separator.
//! - Effort is `reasoning_effort`, else `reasoning.effort`, else `chat_template_kwargs.reasoning_effort`: none, minimal, low, medium,
//!   high, xhigh or max. Harmony knows three levels: the first three are its low, the last three its high, and it has no
//!   way not to think. hermes thinks unless it is `none`, and its template gets the level as it was sent.
//!   `reasoning.exclude` and `include_reasoning: false` leave reasoning out of answers; it is generated and counted.
//! - Reasoning of earlier turns is read as `reasoning_content`, `reasoning`, `reasoning_details`, `thinking_blocks` or parts of
//!   the content, the first that is not empty. Inside a tool loop, reasoning that a client left out comes back where the
//!   ids of the calls are those of a turn that its key was answered with.
//! - `chat_template_kwargs` takes `reasoning_effort`, `enable_thinking` (false is effort `none`) and variables that the model's
//!   own template reads, nothing else.
//! - `/v1/responses` shares all of that. Its own answers are taken back as input in every form that clients give them; items and tools
//!   of hosted kinds are passed over with a line in the log. A function is `strict` only if it says so. Items of the assistant in a
//!   row are one turn if there is a call among them. A message is of the `commentary` phase if more follows it, known when it
//!   is complete. `encrypted_content` is given when asked for.
//! - `/v1/completions` neither renders nor parses a chat: control tokens are skipped in its text unless
//!   `skip_special_tokens` is false, and `token_ids` has them all.
//!
//! `/v1/messages` is Anthropic's API over the same prompts, guides, limits and answers. Where that one leaves room or we differ:
//!
//! - Thinking is shown unless `thinking` is `disabled`, which also asks the model for the least of it. `enabled` maps
//!   `budget_tokens` to an effort: low up to 4,096, medium up to 16,384, high above; it bounds nothing. `adaptive` is the model's
//!   default. `output_config.effort` goes before the budget. With `display: "omitted"` the signature carries the text, so that it
//!   comes back. Signatures prove nothing and any is accepted; `redacted_thinking` of other services is left out.
//! - A call's `input` is the model's bytes if they are a JSON object, else `{"INVALID_JSON": "the text"}`, which is taken back as
//!   that text. Streams send it in one piece when the call is complete; a tool with `eager_input_streaming` has its arguments
//!   passed on as they come, whatever they are.
//! - Tools of a type other than `custom` are skipped and logged. Images, documents and other blocks are a 400, as is a last
//!   message of the assistant's to be continued (`count_tokens` counts it). Blocks of text are joined without a separator.
//! - A tool result with `is_error` begins with `Error: `. Claude Code's billing line, new in each request, is left out of `system`.
//! - `cache_control`, `metadata`, `service_tier` and what else steers Anthropic's service are accepted and do nothing.

mod api;
mod config;
mod error;
mod generate;
mod http;
mod kept;
pub mod limits;
mod metrics;
mod openapi;
mod record;
mod router;
mod state;
mod store;
mod turn;
mod turns;
mod validate;
mod wire;

pub use config::{PromptDate, ReasoningNames, ServerConfig};
pub use error::ApiError;
pub use http::keys::ApiKeys;
pub use http::origin::{Browsers, BrowsersError};
pub use http::serve::serve;
pub use router::router;
pub use state::{ServerError, ServerState};
pub use validate::conversation_from_json;
