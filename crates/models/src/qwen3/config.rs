//! `config.json` of Qwen3, which nobody vouches for: every number is checked before anything is sized by it.

use ctxserve_backend::{AttentionSpec, KvGroup, KvSpec};
use serde_json::Value;

use crate::decoder::{Frame, Heads};
use crate::fields::Fields;
use crate::rotary::{self, Unsaid};
use crate::{ConfigError, LoadOptions, Rope, limits as most};

/// The base differs between models of one size, so a file without it is not guessed at. The rest is transformers'.
const UNSAID: Unsaid = Unsaid { theta: None, yarn: false, truncate: true };
/// Elements of a head where the file does not say: not the hidden size over the heads.
const HEAD_DIM: usize = 128;

/// What a Qwen3 model is.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Transformer blocks.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the dense layer between its products.
    pub inner: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// RMSNorm epsilon, of heads too.
    pub norm_eps: f32,
    /// Rotary parameters.
    pub rope: Rope,
    /// Whether q, k, v and o are biased.
    pub attention_bias: bool,
    /// Whether the embedding is the head too.
    pub tied: bool,
    /// Most positions.
    pub max_context: usize,
}

impl Config {
    /// Reads and checks.
    ///
    /// # Errors
    /// The first field that is missing, out of range, at odds with another, or asks for what is not there.
    pub fn read(config: &Value) -> Result<Self, ConfigError> {
        let fields = Fields::root(config)?;
        let layers = fields.need_int("num_hidden_layers", 1..=most::LAYERS)?;
        let heads = Heads::read(&fields, HEAD_DIM)?;
        if fields.text("hidden_act")?.is_some_and(|name| name != "silu") {
            return Err(fields.error("hidden_act", "must be silu"));
        }
        if fields.flag("use_sliding_window")?.unwrap_or(false) {
            return Err(fields.error("use_sliding_window", "must be false: every layer sees all positions"));
        }
        full_attention(&fields, layers)?;
        let rope = rotary::read(&fields, UNSAID)?;
        Ok(Self {
            layers,
            hidden: fields.need_int("hidden_size", 1..=most::WIDTH)?,
            inner: fields.need_int("intermediate_size", 1..=most::WIDTH)?,
            vocab: fields.need_int("vocab_size", 1..=most::VOCAB)?,
            heads: heads.query,
            kv_heads: heads.kv,
            head_dim: heads.dim,
            norm_eps: fields.number("rms_norm_eps", 1e-12..=1.0)?.unwrap_or(1e-6) as f32,
            attention_bias: fields.flag("attention_bias")?.unwrap_or(false),
            tied: fields.flag("tie_word_embeddings")?.unwrap_or(false),
            max_context: max_context(&fields, &rope)?,
            rope,
        })
    }

    pub(super) fn frame(&self) -> Frame {
        Frame {
            layers: self.layers,
            hidden: self.hidden,
            vocab: self.vocab,
            heads: Heads { query: self.heads, kv: self.kv_heads, dim: self.head_dim },
            head_norms: true,
            biased: self.attention_bias,
            tied: self.tied,
        }
    }

    /// How any layer attends.
    pub fn attention(&self) -> AttentionSpec {
        AttentionSpec {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            window: None,
            norm_eps: self.norm_eps,
        }
    }

    /// The KV cache: one group of all layers.
    pub fn kv_spec(&self, options: &LoadOptions) -> KvSpec {
        let layers = (0..self.layers).collect();
        let groups = vec![KvGroup { window: None, layers, dtype: options.kv_dtype }];
        KvSpec { page_size: options.page_size, kv_heads: self.kv_heads, head_dim: self.head_dim, groups }
    }
}

/// `layer_types`, where it is there, must name full attention everywhere.
fn full_attention(fields: &Fields<'_>, layers: usize) -> Result<(), ConfigError> {
    const NAME: &str = "layer_types";
    let Some(value) = fields.get(NAME) else { return Ok(()) };
    let list = value.as_array().ok_or_else(|| fields.error(NAME, "must be a list"))?;
    if list.len() != layers {
        return Err(fields.error(NAME, format!("has {} entries for {layers} layers", list.len())));
    }
    if list.iter().any(|entry| entry.as_str() != Some("full_attention")) {
        return Err(fields.error(NAME, "entries must be full_attention"));
    }
    Ok(())
}

/// `max_position_embeddings`, or what YaRN extends to: files keep the former as it was before.
fn max_context(fields: &Fields<'_>, rope: &Rope) -> Result<usize, ConfigError> {
    let stated = fields.need_int("max_position_embeddings", 1..=most::POSITIONS)?;
    let extended = rope.yarn.map_or(0.0, |yarn| yarn.original_positions * yarn.factor);
    Ok(stated.max(extended.min(most::POSITIONS as f64) as usize))
}
