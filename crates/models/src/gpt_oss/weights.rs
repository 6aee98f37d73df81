//! gpt-oss's tensors beyond a decoder's: what they are called, how large they are, and how they reach a backend.

use ctxserve_backend::{Backend, DeviceError, ExpertWeights, Moe, Role};
use ctxserve_checkpoint::{Checkpoint, Shape, Want};

use super::Config;
use crate::decoder::{Attention, Decoder, HostAttention, in_block};
use crate::weights::{Linear, Reader};
use crate::{Costs, LoadError, LoadProgress};

/// The weights of one block.
pub(super) struct Block<B: Backend> {
    pub(super) attention: Attention<B>,
    /// One logit per query head.
    pub(super) sinks: B::Vector,
    pub(super) moe: Moe<B>,
}

/// All weights.
pub(super) type Weights<B> = Decoder<B, Block<B>>;

/// Every tensor that the model is made of; the checkpoint must hold these and no others.
pub(super) fn wants(config: &Config) -> Vec<Want> {
    let Config { hidden, inner, experts, .. } = *config;
    let vector = |len| Shape::Vector { len };
    config.frame().wants(|layer, wants| {
        let mut want = |name, shape| wants.push(Want { name: in_block(layer, name), shape });
        want("self_attn.sinks", vector(config.heads));
        want("post_attention_layernorm.weight", vector(hidden));
        want("mlp.router.weight", Shape::Matrix { rows: experts, cols: hidden });
        want("mlp.router.bias", vector(experts));
        want("mlp.experts.gate_up_proj", Shape::Experts { experts, rows: 2 * inner, cols: hidden });
        want("mlp.experts.gate_up_proj_bias", vector(experts * 2 * inner));
        want("mlp.experts.down_proj", Shape::Experts { experts, rows: hidden, cols: inner });
        want("mlp.experts.down_proj_bias", vector(experts * hidden));
    })
}

/// The weights by how a step uses them.
pub(super) fn costs(config: &Config, checkpoint: &Checkpoint) -> Result<Costs, LoadError> {
    let costs = config.frame().costs(checkpoint, wants(config))?;
    let stacks = (config.experts * config.layers()) as u64;
    Ok(Costs {
        expert_bytes: costs.expert_bytes / stacks,
        experts: config.experts,
        top_k: config.top_k,
        expert_parameters: (3 * config.inner * config.hidden) as u64,
        inner: config.inner,
        ..costs
    })
}

/// What a [`Block`] is made of.
struct HostBlock {
    experts: ExpertWeights,
    attention: HostAttention,
    sinks: Vec<f32>,
    norm: Vec<f32>,
    router: Linear,
}

/// Loads everything, one block at a time, while the next is read.
pub(super) fn load<B: Backend>(
    config: &Config,
    checkpoint: &Checkpoint,
    backend: &mut B,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Weights<B>, LoadError> {
    config.frame().load(
        checkpoint,
        backend,
        progress,
        |layer, reader| read_block(config, layer, reader),
        |layer, block, backend| load_block(config, layer, block, backend),
    )
}

fn read_block(config: &Config, layer: usize, reader: &Reader<'_>) -> Result<HostBlock, LoadError> {
    let Config { hidden, inner, experts, .. } = *config;
    let name = |name| in_block(layer, name);
    Ok(HostBlock {
        experts: ExpertWeights {
            gate_up: reader.experts(&name("mlp.experts.gate_up_proj"), experts, [2 * inner, hidden])?,
            down: reader.experts(&name("mlp.experts.down_proj"), experts, [hidden, inner])?,
            gate_up_bias: reader.vector(&name("mlp.experts.gate_up_proj_bias"), experts * 2 * inner)?,
            down_bias: reader.vector(&name("mlp.experts.down_proj_bias"), experts * hidden)?,
        },
        attention: config.frame().read_attention(layer, reader)?,
        sinks: reader.vector(&name("self_attn.sinks"), config.heads)?,
        norm: reader.vector(&name("post_attention_layernorm.weight"), hidden)?,
        router: reader.linear(&name("mlp.router"), [experts, hidden], true)?,
    })
}

fn load_block<B: Backend>(
    config: &Config,
    layer: usize,
    block: HostBlock,
    backend: &mut B,
) -> Result<Block<B>, DeviceError> {
    let spec = config.expert_spec();
    let experts = backend.load_experts(block.experts, &spec)?;
    Ok(Block {
        attention: block.attention.load(backend, &config.attention(layer))?,
        sinks: backend.load_vector(block.sinks)?,
        moe: Moe {
            norm: backend.load_vector(block.norm)?,
            router: block.router.load(backend, Role::Router)?,
            experts,
            spec,
        },
    })
}
