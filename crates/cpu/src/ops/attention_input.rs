//! Norm, QKV, norms of heads, rotary embedding, KV write.

use ctxserve_backend::{AttentionInput, AttentionSpec, Batch, DeviceError, RopeTable};

use crate::backend::CpuBackend;
use crate::kv::CpuKv;
use crate::linear::linear;
use crate::ops::{rms_norm, rms_norm_in_place};
use crate::rows::Rows;

const OP: &str = "attention_input";

/// `[rows, hidden]` to rotated queries `[rows, heads * head_dim]`; rotated keys and values go to the layer's pages.
#[allow(clippy::too_many_arguments)]
pub(crate) fn attention_input(
    backend: &CpuBackend,
    layer: usize,
    weights: &AttentionInput<CpuBackend>,
    spec: &AttentionSpec,
    rope: &RopeTable,
    x: &Rows,
    kv: &mut CpuKv,
    batch: &Batch,
) -> Result<Rows, DeviceError> {
    let dim = spec.head_dim;
    let (q_width, kv_width) = (spec.heads * dim, spec.kv_heads * dim);
    let place = check(layer, spec, rope, kv)?;
    x.expect(OP, batch.tokens.len(), weights.norm.len())?;
    let normed = rms_norm(OP, x, &weights.norm, spec.norm_eps)?;
    let mut qkv = linear(OP, backend.fast.as_ref(), &weights.qkv, &normed)?;
    qkv.expect(OP, x.rows(), q_width + 2 * kv_width)?;

    if let Some(norms) = &weights.head_norms
        && (norms.q.len() != dim || norms.k.len() != dim)
    {
        return Err(DeviceError::new(OP, "a norm of heads is not as long as a head"));
    }
    let page_size = kv.plan().spec.page_size;
    let mut queries = Rows::zeros(x.rows(), q_width);
    let mut angles = vec![(0.0, 0.0); dim / 2];
    for slice in &batch.sequences {
        for (row, position) in slice.rows.clone().zip(slice.start..) {
            rotation(rope, position, &mut angles);
            let (q, rest) = qkv.row_mut(row).split_at_mut(q_width);
            let (keys, values) = rest.split_at_mut(kv_width);
            if let Some(norms) = &weights.head_norms {
                let norm = |heads: &mut [f32], weight: &[f32]| {
                    heads.chunks_exact_mut(dim).for_each(|h| rms_norm_in_place(h, weight, spec.norm_eps));
                };
                norm(q, &norms.q);
                norm(keys, &norms.k);
            }
            q.chunks_exact_mut(dim).chain(keys.chunks_exact_mut(dim)).for_each(|h| rotate(h, &angles));
            queries.row_mut(row).copy_from_slice(q);
            let table = slice.tables.get(place.0);
            let Some(cell) = table.and_then(|table| table.locate(position, page_size)) else {
                return Err(DeviceError::new(OP, format!("position {position} has no page")));
            };
            for head in 0..spec.kv_heads {
                kv.write(place, cell, head, &keys[head * dim..][..dim], &values[head * dim..][..dim]);
            }
        }
    }
    Ok(queries)
}

/// Where the layer's pages are, once its shape agrees with the cache.
pub(crate) fn check(
    layer: usize,
    spec: &AttentionSpec,
    rope: &RopeTable,
    kv: &CpuKv,
) -> Result<(usize, usize), DeviceError> {
    let cache = &kv.plan().spec;
    if cache.kv_heads != spec.kv_heads || cache.head_dim != spec.head_dim || !spec.head_dim.is_multiple_of(2)
    {
        return Err(DeviceError::new(OP, "the layer and the KV cache differ in shape"));
    }
    if rope.inv_freq.len() != spec.head_dim / 2 {
        return Err(DeviceError::new(OP, "one frequency per pair of elements is needed"));
    }
    cache.place(layer).ok_or_else(|| DeviceError::new(OP, format!("layer {layer} has no KV group")))
}

/// Cosine and sine of each pair at `position`. The angle is rounded to f32 as in the reference, where models were
/// trained; the functions of it are not.
fn rotation(rope: &RopeTable, position: usize, angles: &mut [(f32, f32)]) {
    for (angle, &inv_freq) in angles.iter_mut().zip(&rope.inv_freq) {
        let (sin, cos) = f64::from(position as f32 * inv_freq as f32).sin_cos();
        *angle = ((cos * rope.mscale) as f32, (sin * rope.mscale) as f32);
    }
}

/// Rotates the halves of one head against each other.
fn rotate(head: &mut [f32], angles: &[(f32, f32)]) {
    let (low, high) = head.split_at_mut(angles.len());
    for ((low, high), &(cos, sin)) in low.iter_mut().zip(high).zip(angles) {
        (*low, *high) = (*low * cos - *high * sin, *high * cos + *low * sin);
    }
}
