//! What decoders in Hugging Face's layout have in common: an embedding, blocks that begin with attention, a norm and a
//! head; how their weights are called, counted and loaded.

use ctxserve_backend::{AttentionInput, AttentionSpec, Backend, Batch, DeviceError, HeadNorms, Role};
use ctxserve_checkpoint::{Checkpoint, Shape, Want};

use crate::fields::Fields;
use crate::weights::{Linear, Progress, Reader, ahead};
use crate::{ConfigError, Costs, LoadError, LoadProgress, limits as most};

const EMBEDDING: &str = "model.embed_tokens";
const FINAL_NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head";
const BLOCKS: &str = "model.layers.";
const INPUT_NORM: &str = "input_layernorm.weight";
const OUTPUT: &str = "self_attn.o_proj";
const HEAD_NORMS: [&str; 2] = ["self_attn.q_norm.weight", "self_attn.k_norm.weight"];
/// Part of the names of experts' tensors.
const EXPERTS: &str = ".mlp.experts.";

/// The sizes that decide names and shapes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    pub(crate) layers: usize,
    pub(crate) hidden: usize,
    pub(crate) vocab: usize,
    pub(crate) heads: Heads,
    /// Whether query and key heads have norms.
    pub(crate) head_norms: bool,
    /// Whether attention's projections are biased.
    pub(crate) biased: bool,
    /// Whether the embedding is the head too.
    pub(crate) tied: bool,
}

/// The heads of a layer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heads {
    pub(crate) query: usize,
    pub(crate) kv: usize,
    pub(crate) dim: usize,
}

/// All weights; `K` are those of a block.
pub(crate) struct Decoder<B: Backend, K> {
    /// `[vocab, hidden]`.
    pub(crate) embedding: B::Matrix,
    pub(crate) blocks: Vec<K>,
    /// `[hidden]`.
    pub(crate) norm: B::Vector,
    /// `[vocab, hidden]`; `None` where the embedding serves.
    pub(crate) head: Option<B::Matrix>,
}

/// Attention's weights in host memory.
pub(crate) struct HostAttention {
    norm: Vec<f32>,
    qkv: Linear,
    head_norms: Option<[Vec<f32>; 2]>,
    output: Linear,
}

/// Attention's weights.
pub(crate) struct Attention<B: Backend> {
    pub(crate) input: AttentionInput<B>,
    /// `[hidden, heads * head_dim]`.
    pub(crate) output: B::Matrix,
}

/// Weights in host memory, in the parts that are read and loaded one after the other.
enum Part<H> {
    Embedding(Linear),
    Block(Box<H>),
    Last { norm: Vec<f32>, head: Option<Linear> },
}

/// The name of a tensor or module of a block.
pub(crate) fn in_block(layer: usize, name: &str) -> String {
    format!("{BLOCKS}{layer}.{name}")
}

/// What is left to do in a layer once its keys and values are in the cache.
pub(crate) enum Rest {
    /// All of it.
    Rows,
    /// Only logits need more, and not of every row.
    LogitRows,
    /// Nothing: inside a prompt.
    Nothing,
}

impl Rest {
    /// Of layer `layer` of `layers`: after the last one nothing reads a row but its logits.
    pub(crate) fn of(layer: usize, layers: usize, batch: &Batch) -> Self {
        let last = layer + 1 == layers;
        match batch.logit_rows().count() {
            0 if last => Self::Nothing,
            count if last && count < batch.tokens.len() => Self::LogitRows,
            _ => Self::Rows,
        }
    }
}

impl Heads {
    /// Reads and checks; heads have `dim` elements where the file does not say.
    pub(crate) fn read(fields: &Fields<'_>, dim: usize) -> Result<Self, ConfigError> {
        let query = fields.need_int("num_attention_heads", 1..=most::HEADS)?;
        let kv = fields.need_int("num_key_value_heads", 1..=most::HEADS)?;
        if !query.is_multiple_of(kv) {
            let what = format!("must divide num_attention_heads: {kv} against {query}");
            return Err(fields.error("num_key_value_heads", what));
        }
        let dim = fields.int("head_dim", 2..=most::HEAD_DIM)?.unwrap_or(dim);
        if !dim.is_multiple_of(2) {
            return Err(fields.error("head_dim", format!("must be even, got {dim}")));
        }
        Ok(Self { query, kv, dim })
    }
}

impl Frame {
    fn q_width(&self) -> usize {
        self.heads.query * self.heads.dim
    }

    /// The rows of attention's projections of the residual stream: q, then k, then v.
    fn qkv(&self, layer: usize) -> [(String, usize); 3] {
        let kv_width = self.heads.kv * self.heads.dim;
        let named = |name, rows| (in_block(layer, name), rows);
        [
            named("self_attn.q_proj", self.q_width()),
            named("self_attn.k_proj", kv_width),
            named("self_attn.v_proj", kv_width),
        ]
    }

    /// Every tensor that the model is made of; `block` adds those of a block beyond attention.
    pub(crate) fn wants(&self, mut block: impl FnMut(usize, &mut Vec<Want>)) -> Vec<Want> {
        let Self { hidden, vocab, .. } = *self;
        let table = Shape::Matrix { rows: vocab, cols: hidden };
        let mut wants = vec![Want { name: format!("{EMBEDDING}.weight"), shape: table }];
        for layer in 0..self.layers {
            self.want_attention(layer, &mut wants);
            block(layer, &mut wants);
        }
        wants.push(Want { name: FINAL_NORM.to_owned(), shape: Shape::Vector { len: hidden } });
        if !self.tied {
            wants.push(Want { name: format!("{HEAD}.weight"), shape: table });
        }
        wants
    }

    fn want_attention(&self, layer: usize, wants: &mut Vec<Want>) {
        let mut want = |name: String, shape| wants.push(Want { name, shape });
        want(in_block(layer, INPUT_NORM), Shape::Vector { len: self.hidden });
        let output = (in_block(layer, OUTPUT), self.hidden);
        let cols = [self.hidden, self.hidden, self.hidden, self.q_width()];
        for ((linear, rows), cols) in self.qkv(layer).into_iter().chain([output]).zip(cols) {
            want(format!("{linear}.weight"), Shape::Matrix { rows, cols });
            if self.biased {
                want(format!("{linear}.bias"), Shape::Vector { len: rows });
            }
        }
        for norm in HEAD_NORMS.into_iter().filter(|_| self.head_norms) {
            want(in_block(layer, norm), Shape::Vector { len: self.heads.dim });
        }
    }

    /// The weights by how a step uses them, but for what the family knows of its experts; `expert_bytes` counts all of them
    /// together.
    pub(crate) fn costs(&self, checkpoint: &Checkpoint, wants: Vec<Want>) -> Result<Costs, LoadError> {
        let (experts, mut shared): (Vec<Want>, Vec<Want>) =
            wants.into_iter().partition(|want| want.name.contains(EXPERTS));
        let parameters = |want: &Want| match want.shape {
            Shape::Matrix { rows, cols } => rows * cols,
            Shape::Vector { .. } | Shape::Experts { .. } => 0,
        };
        let in_blocks = shared.iter().filter(|want| want.name.starts_with(BLOCKS));
        let shared_parameters: usize = in_blocks.map(parameters).sum();
        shared.retain(|want| self.tied || !want.name.starts_with(EMBEDDING));
        Ok(Costs {
            shared_bytes: checkpoint.stored_bytes(&shared)?,
            expert_bytes: checkpoint.stored_bytes(&experts)?,
            shared_parameters: shared_parameters as u64,
            head_parameters: (self.vocab * self.hidden) as u64,
            query_width: self.q_width(),
            hidden: self.hidden,
            ..Costs::default()
        })
    }

    /// Loads everything, one block at a time, while the next is read.
    pub(crate) fn load<B: Backend, H: Send, K>(
        &self,
        checkpoint: &Checkpoint,
        backend: &mut B,
        progress: &mut dyn FnMut(LoadProgress),
        read_block: impl Fn(usize, &Reader<'_>) -> Result<H, LoadError> + Sync,
        mut load_block: impl FnMut(usize, H, &mut B) -> Result<K, DeviceError>,
    ) -> Result<Decoder<B, K>, LoadError> {
        let (layers, reader) = (self.layers, Reader::new(checkpoint, backend));
        let mut progress = Progress::new(checkpoint, layers + 2, progress);
        let (mut embedding, mut blocks, mut last) = (None, Vec::with_capacity(layers), None);
        let read = |part: usize| match part.checked_sub(1) {
            Some(layer) if layer < layers => Ok(Part::Block(Box::new(read_block(layer, &reader)?))),
            ends => self.read_ends(ends.is_none(), &reader),
        };
        let take = |part| {
            match part {
                Part::Embedding(table) => {
                    embedding = Some(table.load(backend, Role::Embedding { head: self.tied })?);
                }
                Part::Block(block) => blocks.push(load_block(blocks.len(), *block, backend)?),
                Part::Last { norm, head } => {
                    let norm = backend.load_vector(norm)?;
                    last = Some((norm, head.map(|head| head.load(backend, Role::Head)).transpose()?));
                }
            }
            progress.finished();
            Ok(())
        };
        ahead(layers + 2, read, take)?;
        let (Some(embedding), Some((norm, head))) = (embedding, last) else {
            return Err(DeviceError::new("load", "a part was never read").into());
        };
        Ok(Decoder { embedding, blocks, norm, head })
    }

    /// Reads the embedding, or what follows the blocks.
    fn read_ends<H>(&self, first: bool, reader: &Reader<'_>) -> Result<Part<H>, LoadError> {
        let table = [self.vocab, self.hidden];
        Ok(if first {
            Part::Embedding(reader.linear(EMBEDDING, table, false)?)
        } else {
            Part::Last {
                norm: reader.vector(FINAL_NORM, self.hidden)?,
                head: if self.tied { None } else { Some(reader.linear(HEAD, table, false)?) },
            }
        })
    }

    /// Reads attention's weights.
    pub(crate) fn read_attention(
        &self,
        layer: usize,
        reader: &Reader<'_>,
    ) -> Result<HostAttention, LoadError> {
        let head_norm = |name| reader.vector(&in_block(layer, name), self.heads.dim);
        let [q, k] = HEAD_NORMS;
        Ok(HostAttention {
            norm: reader.vector(&in_block(layer, INPUT_NORM), self.hidden)?,
            qkv: reader.fused(&self.qkv(layer), self.hidden, self.biased)?,
            head_norms: if self.head_norms { Some([head_norm(q)?, head_norm(k)?]) } else { None },
            output: reader.linear(&in_block(layer, OUTPUT), [self.hidden, self.q_width()], self.biased)?,
        })
    }
}

impl HostAttention {
    /// Gives them to a backend.
    pub(crate) fn load<B: Backend>(
        self,
        backend: &mut B,
        spec: &AttentionSpec,
    ) -> Result<Attention<B>, DeviceError> {
        let norm = backend.load_vector(self.norm)?;
        let qkv = self.qkv.load(backend, Role::Qkv(spec))?;
        let head_norms = match self.head_norms {
            Some([q, k]) => Some(HeadNorms { q: backend.load_vector(q)?, k: backend.load_vector(k)? }),
            None => None,
        };
        let input = AttentionInput { norm, qkv, head_norms };
        Ok(Attention { input, output: self.output.load(backend, Role::Output(spec))? })
    }
}
