//! The three spellings of rotary parameters.
//!
//! `rope_theta` + `rope_scaling` (transformers 4), `rope_parameters` (transformers 5) and OpenAI's flat
//! `rope_scaling_factor`, `rope_ntk_alpha`, `rope_ntk_beta` may stand in one file; what they say must agree.

use std::ops::RangeInclusive;

use crate::fields::Fields;
use crate::{ConfigError, Yarn};

const THETA: RangeInclusive<f64> = 1.001..=1e15;
const FACTOR: RangeInclusive<f64> = 1.0..=1e6;
const TURNS: RangeInclusive<f64> = 1e-6..=1e6;
const POSITIONS: RangeInclusive<f64> = 1.0..=1e9;

/// Base and extension.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies, above 1.
    pub theta: f64,
    /// `None` is plain RoPE.
    pub yarn: Option<Yarn>,
}

/// What a family means where its file is silent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unsaid {
    /// The base; `None` where it must be said.
    pub(crate) theta: Option<f64>,
    /// Whether a file that says nothing of scaling means YaRN from 4,096 to 131,072 positions.
    pub(crate) yarn: bool,
    /// [`Yarn::truncate`].
    pub(crate) truncate: bool,
}

/// Reads whatever spelling the file uses.
pub(crate) fn read(root: &Fields<'_>, unsaid: Unsaid) -> Result<Rope, ConfigError> {
    let nested: Vec<Fields<'_>> = ["rope_parameters", "rope_scaling"]
        .into_iter()
        .filter_map(|name| root.object(name).transpose())
        .collect::<Result<_, _>>()?;
    let reader = Reader { nested: &nested, root, unsaid };
    let theta = reader.agreed("rope_theta", "rope_theta", THETA)?.or(unsaid.theta);
    let theta = theta.ok_or_else(|| root.error("rope_theta", "is missing"))?;
    if reader.agreed("partial_rotary_factor", "partial_rotary_factor", 0.0..=1.0)?.unwrap_or(1.0) != 1.0 {
        return Err(root.error("partial_rotary_factor", "must be 1: heads rotate whole"));
    }
    let flat = root.get("rope_scaling_factor").is_some();
    let plain = match reader.kind()? {
        Some(kind) => kind == Kind::Plain,
        None => !flat && (!unsaid.yarn || root.is_null("rope_scaling")),
    };
    if plain {
        return Ok(Rope { theta, yarn: None });
    }
    Ok(Rope { theta, yarn: Some(reader.yarn()?) })
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Plain,
    Yarn,
}

/// The nested objects, where there are any, and the whole configuration.
struct Reader<'a, 'f> {
    nested: &'a [Fields<'f>],
    root: &'a Fields<'f>,
    unsaid: Unsaid,
}

impl Reader<'_, '_> {
    /// A number under its nested name in any of the objects or its flat name in the root.
    fn agreed(
        &self,
        nested: &str,
        flat: &str,
        range: RangeInclusive<f64>,
    ) -> Result<Option<f64>, ConfigError> {
        let mut found = None;
        let places = self.nested.iter().map(|fields| (fields, nested)).chain([(self.root, flat)]);
        for (fields, name) in places {
            let Some(value) = fields.number(name, range.clone())? else { continue };
            if found.is_some_and(|other| other != value) {
                return Err(fields.error(name, format!("is {value}, which another spelling contradicts")));
            }
            found = Some(value);
        }
        Ok(found)
    }

    /// What the nested objects call themselves; `None` without any.
    fn kind(&self) -> Result<Option<Kind>, ConfigError> {
        let mut found = None;
        for fields in self.nested {
            if fields.get("full_attention").is_some() || fields.get("sliding_attention").is_some() {
                return Err(fields.error("full_attention", "parameters per kind of layer are not supported"));
            }
            let kind = match fields.text("rope_type")?.or(fields.text("type")?) {
                Some("yarn") => Kind::Yarn,
                Some("default") => Kind::Plain,
                Some(other) => {
                    let other: String = other.chars().take(80).collect();
                    return Err(fields.error("rope_type", format!("must be yarn or default, got {other:?}")));
                }
                None if fields.get("factor").is_some() => return Err(fields.error("rope_type", "is missing")),
                None => Kind::Plain,
            };
            if found.is_some_and(|other| other != kind) {
                return Err(fields.error("rope_type", "another spelling contradicts it"));
            }
            found = Some(kind);
        }
        Ok(found)
    }

    fn yarn(&self) -> Result<Yarn, ConfigError> {
        let factor = self.agreed("factor", "rope_scaling_factor", FACTOR)?;
        let factor = match (factor, self.nested.first()) {
            (Some(factor), _) => factor,
            (None, Some(fields)) => return Err(fields.error("factor", "is missing")),
            (None, None) => 32.0,
        };
        let beta_fast = self.agreed("beta_fast", "rope_ntk_beta", TURNS)?.unwrap_or(32.0);
        let beta_slow = self.agreed("beta_slow", "rope_ntk_alpha", TURNS)?.unwrap_or(1.0);
        if beta_fast <= beta_slow {
            let what = format!("must exceed beta_slow: {beta_fast} against {beta_slow}");
            return Err(self.root.error("beta_fast", what));
        }
        const ORIGINAL: &str = "original_max_position_embeddings";
        let original = match self.agreed(ORIGINAL, ORIGINAL, POSITIONS)? {
            Some(positions) => positions,
            // OpenAI's name for it. Hugging Face's files repeat it without reading it, so it only fills a gap.
            None => match self.root.number("initial_context_length", POSITIONS)? {
                Some(positions) => positions,
                None if self.nested.is_empty() => 4096.0,
                None => self.root.number("max_position_embeddings", POSITIONS)?.unwrap_or(4096.0),
            },
        };
        let flag = |name| self.nested.iter().find_map(|fields| fields.flag(name).transpose()).transpose();
        Ok(Yarn {
            factor,
            beta_fast,
            beta_slow,
            original_positions: original,
            truncate: flag("truncate")?.unwrap_or(self.unsaid.truncate),
            attention_factor: self.attention_factor(factor)?,
        })
    }

    fn attention_factor(&self, factor: f64) -> Result<f64, ConfigError> {
        const RANGE: RangeInclusive<f64> = 0.0..=1e3;
        if let Some(stated) = self.agreed("attention_factor", "attention_factor", 1e-3..=1e3)? {
            return Ok(stated);
        }
        let mscale = self.agreed("mscale", "mscale", RANGE)?.unwrap_or(0.0);
        let all_dim = self.agreed("mscale_all_dim", "mscale_all_dim", RANGE)?.unwrap_or(0.0);
        let of = |weight| Yarn::default_attention_factor(factor, weight);
        Ok(if mscale > 0.0 && all_dim > 0.0 { of(mscale) / of(all_dim) } else { of(1.0) })
    }
}
