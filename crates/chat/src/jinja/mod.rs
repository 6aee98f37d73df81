//! Chat templates: Jinja as Hugging Face runs it, bounded in time and memory, with the clients' text marked so that it
//! cannot become control tokens.

mod date;
mod json;
mod marks;
mod sums;
mod template;

pub(crate) use json::{Json, parse as parse_json};
pub(crate) use marks::{Marks, Seen};
pub(crate) use template::{Failure, Template};
