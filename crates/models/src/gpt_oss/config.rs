//! `config.json` of gpt-oss, which nobody vouches for: every number is checked before anything is sized by it.

use ctxserve_backend::{AttentionSpec, ExpertSpec, KvDtype, KvGroup, KvSpec};
use serde_json::Value;

use crate::decoder::{Frame, Heads};
use crate::fields::Fields;
use crate::rotary::{self, Unsaid};
use crate::{ConfigError, LoadOptions, Rope, limits as most};

/// What a gpt-oss model is.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of an expert between its two products.
    pub inner: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Keys a layer's query sees, itself included; `None` is full causal attention. One entry a layer.
    pub windows: Vec<Option<usize>>,
    /// Experts per layer.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Sigmoid gain of the experts' activation.
    pub alpha: f32,
    /// Clamp of the experts' activation.
    pub limit: f32,
    /// RMSNorm epsilon.
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

/// Some implementations round YaRN's bounds when the file is silent; these models were trained without.
const UNSAID: Unsaid = Unsaid { theta: Some(150_000.0), yarn: true, truncate: false };

impl Config {
    /// Reads and checks.
    ///
    /// # Errors
    /// The first field that is missing, out of range or at odds with another.
    pub fn read(config: &Value) -> Result<Self, ConfigError> {
        let fields = Fields::root(config)?;
        let layers = fields.need_int("num_hidden_layers", 1..=most::LAYERS)?;
        let width = |name| fields.need_int(name, 1..=most::WIDTH);
        let (hidden, inner) = (width("hidden_size")?, width("intermediate_size")?);
        let heads = Heads::read(&fields, 64)?;
        let experts = fields.need_int_alias(["num_local_experts", "num_experts"], 1..=most::EXPERTS)?;
        let top_k = fields.need_int_alias(["num_experts_per_tok", "experts_per_token"], 1..=most::EXPERTS)?;
        if top_k > experts {
            let what = format!("must not exceed the number of experts: {top_k} against {experts}");
            return Err(fields.error("num_experts_per_tok", what));
        }
        // The name is misleading: the experts' activation is the clamped SwiGLU whatever the file calls it.
        if fields.text("hidden_act")?.is_some_and(|name| name != "silu" && name != "swiglu") {
            return Err(fields.error("hidden_act", "must be silu"));
        }
        let rope = rotary::read(&fields, UNSAID)?;
        Ok(Self {
            hidden,
            inner,
            vocab: fields.need_int("vocab_size", 1..=most::VOCAB)?,
            heads: heads.query,
            kv_heads: heads.kv,
            head_dim: heads.dim,
            windows: windows(&fields, layers)?,
            experts,
            top_k,
            alpha: fields.number("swiglu_alpha", 1e-3..=1e3)?.unwrap_or(1.702) as f32,
            limit: fields.number("swiglu_limit", 1e-3..=1e6)?.unwrap_or(7.0) as f32,
            norm_eps: fields.number("rms_norm_eps", 1e-12..=1.0)?.unwrap_or(1e-5) as f32,
            attention_bias: fields.flag("attention_bias")?.unwrap_or(true),
            tied: fields.flag("tie_word_embeddings")?.unwrap_or(false),
            max_context: max_context(&fields, &rope)?,
            rope,
        })
    }

    /// Transformer blocks.
    pub fn layers(&self) -> usize {
        self.windows.len()
    }

    pub(super) fn frame(&self) -> Frame {
        Frame {
            layers: self.layers(),
            hidden: self.hidden,
            vocab: self.vocab,
            heads: Heads { query: self.heads, kv: self.kv_heads, dim: self.head_dim },
            head_norms: false,
            biased: self.attention_bias,
            tied: self.tied,
        }
    }

    /// How a layer attends.
    pub fn attention(&self, layer: usize) -> AttentionSpec {
        AttentionSpec {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: 1.0 / (self.head_dim as f32).sqrt(),
            window: self.windows[layer],
            norm_eps: self.norm_eps,
        }
    }

    /// The experts of any layer.
    pub fn expert_spec(&self) -> ExpertSpec {
        ExpertSpec {
            experts: self.experts,
            top_k: self.top_k,
            hidden: self.hidden,
            inner: self.inner,
            alpha: self.alpha,
            limit: self.limit,
            norm_eps: self.norm_eps,
        }
    }

    /// The KV cache: a group for the sliding layers and one for the full ones, without those that have none. Sliding
    /// layers hold a window of positions however long the context is, so fp8 would save next to nothing there: they
    /// keep bfloat16.
    pub fn kv_spec(&self, options: &LoadOptions) -> KvSpec {
        let sliding = self.windows.iter().copied().find(Option::is_some).flatten();
        let group = |window: Option<usize>| {
            let layers: Vec<usize> = (0..self.layers()).filter(|&l| self.windows[l] == window).collect();
            let dtype = match options.kv_dtype {
                KvDtype::Fp8E4m3 if window.is_some() => KvDtype::Bf16,
                dtype => dtype,
            };
            KvGroup { window, layers, dtype }
        };
        let mut groups = vec![group(None)];
        if sliding.is_some() {
            groups.insert(0, group(sliding));
        }
        groups.retain(|group| !group.layers.is_empty());
        KvSpec { page_size: options.page_size, kv_heads: self.kv_heads, head_dim: self.head_dim, groups }
    }
}

/// `layer_types`, or alternating from a sliding layer on.
fn windows(fields: &Fields<'_>, layers: usize) -> Result<Vec<Option<usize>>, ConfigError> {
    const NAME: &str = "layer_types";
    let sliding = match fields.get(NAME) {
        None => (0..layers).map(|layer| layer % 2 == 0).collect::<Vec<_>>(),
        Some(value) => {
            let list = value.as_array().ok_or_else(|| fields.error(NAME, "must be a list"))?;
            if list.len() != layers {
                let what = format!("has {} entries for {layers} layers", list.len());
                return Err(fields.error(NAME, what));
            }
            let kind = |entry: &Value| match entry.as_str() {
                Some("sliding_attention") => Ok(true),
                Some("full_attention") => Ok(false),
                _ => Err(fields.error(NAME, "entries must be sliding_attention or full_attention")),
            };
            list.iter().map(kind).collect::<Result<_, _>>()?
        }
    };
    if !sliding.contains(&true) {
        return Ok(vec![None; layers]);
    }
    if fields.is_null("sliding_window") {
        return Err(fields.error("sliding_window", "is null, but there are sliding layers"));
    }
    let window = fields.int("sliding_window", 1..=most::POSITIONS)?.unwrap_or(128);
    Ok(sliding.into_iter().map(|sliding| sliding.then_some(window)).collect())
}

/// `max_position_embeddings`, or what the rotary parameters extend to.
fn max_context(fields: &Fields<'_>, rope: &Rope) -> Result<usize, ConfigError> {
    const NAME: &str = "max_position_embeddings";
    if let Some(stated) = fields.int(NAME, 1..=most::POSITIONS)? {
        return Ok(stated);
    }
    let extended = rope.yarn.map(|yarn| yarn.original_positions * yarn.factor);
    match extended {
        Some(positions) if positions <= most::POSITIONS as f64 => Ok(positions as usize),
        _ => Err(fields.error(NAME, "is missing")),
    }
}
