//! What weights take in the memory of a GPU, from headers alone.
//!
//! There are kernels for experts in MXFP4 and for projections in NVFP4. All other codes become bfloat16 as they are loaded, and so do those of
//! a product that is not stored alike in all its parts, of a biased one, and of an output projection of heads that are padded.

use std::collections::{HashMap, HashSet};

use ctxserve_checkpoint::{Checkpoint, CheckpointError, Shape, Want};
use ctxserve_core::Encoding;

use crate::decoder::Frame;

/// Heads are padded to a multiple of so many elements.
const PANEL: usize = 64;

/// Weights that are multiplied as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Product<'a> {
    /// Of the block with this prefix: queries, keys and values; the output; gate and up, or down; the experts.
    Qkv(&'a str),
    Output(&'a str),
    GateUp(&'a str),
    Down(&'a str),
    Experts(&'a str),
    /// Embedding, head, router.
    Other(&'a str),
}

impl<'a> Product<'a> {
    fn of(name: &'a str) -> Self {
        type Make<'a> = fn(&'a str) -> Product<'a>;
        let ends: [(&str, Make<'a>); 9] = [
            ("self_attn.q_proj.weight", Self::Qkv),
            ("self_attn.k_proj.weight", Self::Qkv),
            ("self_attn.v_proj.weight", Self::Qkv),
            ("self_attn.o_proj.weight", Self::Output),
            ("mlp.gate_proj.weight", Self::GateUp),
            ("mlp.up_proj.weight", Self::GateUp),
            ("mlp.down_proj.weight", Self::Down),
            ("mlp.experts.gate_up_proj", Self::Experts),
            ("mlp.experts.down_proj", Self::Experts),
        ];
        let found = ends.into_iter().find_map(|(end, make)| Some(make(name.strip_suffix(end)?)));
        found.unwrap_or(Self::Other(name))
    }

    /// The encoding in which it is multiplied as it is stored.
    fn packed(self, head_dim: usize) -> Option<Encoding> {
        match self {
            Self::Experts(_) => Some(Encoding::Mxfp4),
            Self::Output(_) if !head_dim.is_multiple_of(PANEL) => None,
            Self::Qkv(_) | Self::Output(_) | Self::GateUp(_) | Self::Down(_) => Some(Encoding::Nvfp4),
            Self::Other(_) => None,
        }
    }
}

impl Frame {
    /// Bytes of all `wants`, which are the whole model.
    pub(crate) fn gpu_bytes(&self, checkpoint: &Checkpoint, wants: &[Want]) -> Result<u64, CheckpointError> {
        let dim = self.heads.dim;
        let names: HashSet<&str> = wants.iter().map(|want| want.name.as_str()).collect();
        let mut stay = HashMap::new();
        for want in wants.iter().filter(|want| !matches!(want.shape, Shape::Vector { .. })) {
            let product = Product::of(&want.name);
            // Biases of experts are no obstacle; they are called otherwise.
            let biased = want.name.strip_suffix(".weight").map(|module| format!("{module}.bias"));
            let stays = product.packed(dim) == Some(checkpoint.encoding(want)?)
                && !biased.is_some_and(|bias| names.contains(bias.as_str()));
            *stay.entry(product).or_insert(true) &= stays;
        }
        wants.iter().try_fold(0, |sum, want| {
            let product = Product::of(&want.name);
            let elements = match want.shape {
                Shape::Vector { len } => return Ok(sum + 4 * len as u64),
                Shape::Matrix { rows, cols } => rows as u64 * cols as u64,
                Shape::Experts { experts, rows, cols } => experts as u64 * rows as u64 * cols as u64,
            };
            let bytes = match stay.get(&product) {
                Some(true) => checkpoint.stored_bytes(std::slice::from_ref(want))?,
                _ => 2 * elements,
            };
            let padded = match product {
                Product::Qkv(_) | Product::Output(_) => {
                    bytes * dim.next_multiple_of(PANEL) as u64 / dim.max(1) as u64
                }
                _ => bytes,
            };
            Ok(sum + padded)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_that_are_multiplied_as_one_are_told_by_name() {
        let of = |leaf| Product::of(leaf);
        assert_eq!(of("model.layers.3.self_attn.k_proj.weight"), Product::Qkv("model.layers.3."));
        assert_eq!(of("model.layers.3.mlp.up_proj.weight"), Product::GateUp("model.layers.3."));
        assert_eq!(of("model.layers.12.mlp.experts.down_proj"), Product::Experts("model.layers.12."));
        assert_eq!(of("lm_head.weight").packed(128), None);
        assert_eq!(of("model.layers.0.mlp.router.weight").packed(64), None);
        let output = of("model.layers.0.self_attn.o_proj.weight");
        assert_eq!((output.packed(128), output.packed(96)), (Some(Encoding::Nvfp4), None));
    }
}
