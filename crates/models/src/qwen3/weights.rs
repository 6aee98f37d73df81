//! Qwen3's tensors beyond a decoder's: what they are called, how large they are, and how they reach a backend.

use ctxserve_backend::{Backend, Mlp, Role};
use ctxserve_checkpoint::{Checkpoint, Shape, Want};

use super::Config;
use crate::decoder::{Attention, Decoder, HostAttention, in_block};
use crate::weights::{Linear, Reader};
use crate::{Costs, LoadError, LoadProgress};

const NORM: &str = "post_attention_layernorm.weight";
const GATE: &str = "mlp.gate_proj";
const UP: &str = "mlp.up_proj";
const DOWN: &str = "mlp.down_proj";

/// The weights of one block.
pub(super) struct Block<B: Backend> {
    pub(super) attention: Attention<B>,
    pub(super) mlp: Mlp<B>,
}

/// All weights.
pub(super) type Weights<B> = Decoder<B, Block<B>>;

/// Every tensor that the model is made of; the checkpoint must hold these and no others.
pub(super) fn wants(config: &Config) -> Vec<Want> {
    let Config { hidden, inner, .. } = *config;
    config.frame().wants(|layer, wants| {
        wants.push(Want { name: in_block(layer, NORM), shape: Shape::Vector { len: hidden } });
        for (name, rows, cols) in [(GATE, inner, hidden), (UP, inner, hidden), (DOWN, hidden, inner)] {
            let name = format!("{}.weight", in_block(layer, name));
            wants.push(Want { name, shape: Shape::Matrix { rows, cols } });
        }
    })
}

/// The weights by how a step uses them.
pub(super) fn costs(config: &Config, checkpoint: &Checkpoint) -> Result<Costs, LoadError> {
    let costs = config.frame().costs(checkpoint, wants(config))?;
    Ok(Costs { inner: config.inner, ..costs })
}

/// What a [`Block`] is made of.
struct HostBlock {
    attention: HostAttention,
    norm: Vec<f32>,
    gate_up: Linear,
    down: Linear,
}

/// Loads everything, one block at a time, while the next is read.
pub(super) fn load<B: Backend>(
    config: &Config,
    checkpoint: &Checkpoint,
    backend: &mut B,
    progress: &mut dyn FnMut(LoadProgress),
) -> Result<Weights<B>, LoadError> {
    let spec = config.attention();
    config.frame().load(
        checkpoint,
        backend,
        progress,
        |layer, reader| read_block(config, layer, reader),
        |_, block, backend| {
            Ok(Block {
                attention: block.attention.load(backend, &spec)?,
                mlp: Mlp {
                    norm: backend.load_vector(block.norm)?,
                    gate_up: block.gate_up.load(backend, Role::GateUp)?,
                    down: block.down.load(backend, Role::Down)?,
                    norm_eps: config.norm_eps,
                },
            })
        },
    )
}

fn read_block(config: &Config, layer: usize, reader: &Reader<'_>) -> Result<HostBlock, LoadError> {
    let Config { hidden, inner, .. } = *config;
    let name = |name| in_block(layer, name);
    Ok(HostBlock {
        attention: config.frame().read_attention(layer, reader)?,
        norm: reader.vector(&name(NORM), hidden)?,
        gate_up: reader.fused(&[(name(GATE), inner), (name(UP), inner)], hidden, false)?,
        down: reader.linear(&name(DOWN), [hidden, inner], false)?,
    })
}
