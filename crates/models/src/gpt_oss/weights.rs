//! gpt-oss's tensors: what they are called, how large they are, and how they reach a backend.

use ctxserve_backend::{AttentionInput, Backend, DeviceError, ExpertWeights, Moe, Role};
use ctxserve_checkpoint::{Checkpoint, Shape, Want};

use super::Config;
use crate::weights::{Linear, Progress, Reader, ahead};
use crate::{Costs, LoadError, LoadProgress};

const EMBEDDING: &str = "model.embed_tokens";
const FINAL_NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head";
const BLOCKS: &str = "model.layers.";

/// The weights of one block.
pub(super) struct Block<B: Backend> {
    pub(super) input: AttentionInput<B>,
    /// One logit per query head.
    pub(super) sinks: B::Vector,
    /// `[hidden, heads * head_dim]`.
    pub(super) output: B::Matrix,
    pub(super) moe: Moe<B>,
}

/// All weights.
pub(super) struct Weights<B: Backend> {
    /// `[vocab, hidden]`.
    pub(super) embedding: B::Matrix,
    pub(super) blocks: Vec<Block<B>>,
    /// `[hidden]`.
    pub(super) norm: B::Vector,
    /// `[vocab, hidden]`; `None` where the embedding serves.
    pub(super) head: Option<B::Matrix>,
}

fn in_block(layer: usize, name: &str) -> String {
    format!("{BLOCKS}{layer}.{name}")
}

/// The rows of an attention's projections of the residual stream: q, then k, then v.
fn qkv(config: &Config, layer: usize) -> [(String, usize); 3] {
    let named = |name, rows| (in_block(layer, name), rows);
    [
        named("self_attn.q_proj", config.q_width()),
        named("self_attn.k_proj", config.kv_width()),
        named("self_attn.v_proj", config.kv_width()),
    ]
}

/// Every tensor that the model is made of; the checkpoint must hold these and no others.
pub(super) fn wants(config: &Config) -> Vec<Want> {
    let mut wants = Vec::new();
    let mut want = |name: String, shape| wants.push(Want { name, shape });
    let vector = |len| Shape::Vector { len };
    let Config { hidden, inner, vocab, experts, .. } = *config;
    want(format!("{EMBEDDING}.weight"), Shape::Matrix { rows: vocab, cols: hidden });
    for layer in 0..config.layers() {
        let name = |name| in_block(layer, name);
        want(name("input_layernorm.weight"), vector(hidden));
        want(name("post_attention_layernorm.weight"), vector(hidden));
        want(name("self_attn.sinks"), vector(config.heads));
        let output = (name("self_attn.o_proj"), hidden);
        let cols = [hidden, hidden, hidden, config.q_width()];
        for ((linear, rows), cols) in qkv(config, layer).into_iter().chain([output]).zip(cols) {
            want(format!("{linear}.weight"), Shape::Matrix { rows, cols });
            if config.attention_bias {
                want(format!("{linear}.bias"), vector(rows));
            }
        }
        want(name("mlp.router.weight"), Shape::Matrix { rows: experts, cols: hidden });
        want(name("mlp.router.bias"), vector(experts));
        want(name("mlp.experts.gate_up_proj"), Shape::Experts { experts, rows: 2 * inner, cols: hidden });
        want(name("mlp.experts.gate_up_proj_bias"), vector(experts * 2 * inner));
        want(name("mlp.experts.down_proj"), Shape::Experts { experts, rows: hidden, cols: inner });
        want(name("mlp.experts.down_proj_bias"), vector(experts * hidden));
    }
    want(FINAL_NORM.to_owned(), vector(hidden));
    if !config.tied {
        want(format!("{HEAD}.weight"), Shape::Matrix { rows: vocab, cols: hidden });
    }
    wants
}

/// The weights by how a step uses them.
pub(super) fn costs(config: &Config, checkpoint: &Checkpoint) -> Result<Costs, LoadError> {
    let (experts, mut shared): (Vec<Want>, Vec<Want>) =
        wants(config).into_iter().partition(|want| want.name.contains(".mlp.experts."));
    let parameters = |want: &Want| match want.shape {
        Shape::Matrix { rows, cols } => rows * cols,
        Shape::Vector { .. } | Shape::Experts { .. } => 0,
    };
    let in_blocks = shared.iter().filter(|want| want.name.starts_with(BLOCKS));
    let shared_parameters: usize = in_blocks.map(parameters).sum();
    shared.retain(|want| config.tied || !want.name.starts_with(EMBEDDING));
    let stacks = (config.experts * config.layers()) as u64;
    Ok(Costs {
        shared_bytes: checkpoint.stored_bytes(&shared)?,
        expert_bytes: checkpoint.stored_bytes(&experts)? / stacks,
        experts: config.experts,
        top_k: config.top_k,
        shared_parameters: shared_parameters as u64,
        expert_parameters: (3 * config.inner * config.hidden) as u64,
        head_parameters: (config.vocab * config.hidden) as u64,
        query_width: config.q_width(),
        hidden: config.hidden,
        inner: config.inner,
    })
}

/// Weights in host memory, in the parts that are read and loaded one after the other.
enum Part {
    Embedding(Linear),
    Block(Box<HostBlock>),
    Last { norm: Vec<f32>, head: Option<Linear> },
}

/// What a [`Block`] is made of.
struct HostBlock {
    experts: ExpertWeights,
    input_norm: Vec<f32>,
    qkv: Linear,
    sinks: Vec<f32>,
    output: Linear,
    moe_norm: Vec<f32>,
    router: Linear,
}

/// Loads everything, one block at a time, while the next is read.
pub(super) fn load<B: Backend>(
    config: &Config,
    checkpoint: &Checkpoint,
    backend: &mut B,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Weights<B>, LoadError> {
    let (layers, reader) = (config.layers(), Reader::new(checkpoint, backend));
    let mut progress = Progress::new(checkpoint, layers + 2, progress);
    let (mut embedding, mut blocks, mut last) = (None, Vec::with_capacity(layers), None);
    let take = |part| {
        match part {
            Part::Embedding(table) => {
                embedding = Some(table.load(backend, Role::Embedding { head: config.tied })?);
            }
            Part::Block(block) => blocks.push(load_block(config, blocks.len(), *block, backend)?),
            Part::Last { norm, head } => {
                let norm = backend.load_vector(norm)?;
                last = Some((norm, head.map(|head| head.load(backend, Role::Head)).transpose()?));
            }
        }
        progress.finished();
        Ok(())
    };
    ahead(layers + 2, |part| read(config, part, &reader), take)?;
    let (Some(embedding), Some((norm, head))) = (embedding, last) else {
        return Err(DeviceError::new("load", "a part was never read").into());
    };
    Ok(Weights { embedding, blocks, norm, head })
}

/// Reads the embedding, then each block, then what follows them.
fn read(config: &Config, part: usize, reader: &Reader<'_>) -> Result<Part, LoadError> {
    let table = [config.vocab, config.hidden];
    Ok(match part.checked_sub(1) {
        None => Part::Embedding(reader.linear(EMBEDDING, table, false)?),
        Some(layer) if layer < config.layers() => Part::Block(Box::new(read_block(config, layer, reader)?)),
        Some(_) => Part::Last {
            norm: reader.vector(FINAL_NORM, config.hidden)?,
            head: if config.tied { None } else { Some(reader.linear(HEAD, table, false)?) },
        },
    })
}

fn read_block(config: &Config, layer: usize, reader: &Reader<'_>) -> Result<HostBlock, LoadError> {
    let Config { hidden, inner, experts, attention_bias, .. } = *config;
    let name = |name| in_block(layer, name);
    Ok(HostBlock {
        experts: ExpertWeights {
            gate_up: reader.experts(&name("mlp.experts.gate_up_proj"), experts, [2 * inner, hidden])?,
            down: reader.experts(&name("mlp.experts.down_proj"), experts, [hidden, inner])?,
            gate_up_bias: reader.vector(&name("mlp.experts.gate_up_proj_bias"), experts * 2 * inner)?,
            down_bias: reader.vector(&name("mlp.experts.down_proj_bias"), experts * hidden)?,
        },
        input_norm: reader.vector(&name("input_layernorm.weight"), hidden)?,
        qkv: reader.fused(&qkv(config, layer), hidden, attention_bias)?,
        sinks: reader.vector(&name("self_attn.sinks"), config.heads)?,
        output: reader.linear(&name("self_attn.o_proj"), [hidden, config.q_width()], attention_bias)?,
        moe_norm: reader.vector(&name("post_attention_layernorm.weight"), hidden)?,
        router: reader.linear(&name("mlp.router"), [experts, hidden], true)?,
    })
}

fn load_block<B: Backend>(
    config: &Config,
    layer: usize,
    block: HostBlock,
    backend: &mut B,
) -> Result<Block<B>, DeviceError> {
    let (spec, attention) = (config.expert_spec(), config.attention(layer));
    let experts = backend.load_experts(block.experts, &spec)?;
    Ok(Block {
        input: AttentionInput {
            norm: backend.load_vector(block.input_norm)?,
            qkv: block.qkv.load(backend, Role::Qkv(&attention))?,
            head_norms: None,
        },
        sinks: backend.load_vector(block.sinks)?,
        output: block.output.load(backend, Role::Output(&attention))?,
        moe: Moe {
            norm: backend.load_vector(block.moe_norm)?,
            router: block.router.load(backend, Role::Router)?,
            experts,
            spec,
        },
    })
}
