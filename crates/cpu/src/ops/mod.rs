//! One op, one file: its plain loops and its fast half.

mod attention;
mod attention_input;
mod attention_output;
mod embed;
mod experts;
mod logits;
mod mlp;
mod norm;
mod sample;

pub(crate) use attention::attention;
pub(crate) use attention_input::attention_input;
pub(crate) use attention_output::attention_output;
pub(crate) use embed::embed;
pub use experts::CpuExperts;
pub(crate) use experts::experts;
pub(crate) use logits::logits;
pub(crate) use mlp::mlp;
pub(crate) use norm::{rms_norm, rms_norm_in_place};
pub(crate) use sample::sample;
pub use sample::{sample_row, uniform};
