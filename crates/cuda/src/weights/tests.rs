use ctxserve_backend::{AttentionSpec, ExpertSpec, ExpertWeights};

use super::*;

/// Values that differ from one another in a pattern that no chunk repeats.
fn values(count: usize) -> Vec<f32> {
    (0..count).map(|at| (at.wrapping_mul(2_654_435_761) >> 7 & 0xff) as f32 / 16.0 - 8.0).collect()
}

fn bf16_matrix(rows: usize, cols: usize) -> Matrix {
    let elements = values(rows * cols).into_iter().map(bf16::from_f32).collect();
    Matrix::new(rows, cols, Elements::Bf16(elements)).unwrap()
}

fn mxfp4_matrix(rows: usize, cols: usize) -> Matrix {
    let codes = (0..rows * cols / 2).map(|at| (at.wrapping_mul(2_654_435_761) >> 9) as u8).collect();
    let scales = (0..rows * cols / 32).map(|at| (100 + at.wrapping_mul(40_503) % 50) as u8).collect();
    Matrix::new(rows, cols, Elements::Mxfp4 { codes, scales }).unwrap()
}

/// Bits of everything that a packer with this chunk makes.
fn packed(device: &Device, chunk: usize, finished: bool) -> Vec<Vec<u8>> {
    let mut packer =
        Packer { chunk, finished, ..Packer::new(device, MoeGemm::load(device).unwrap(), false).unwrap() };
    let attention =
        AttentionSpec { heads: 4, kv_heads: 2, head_dim: 40, scale: 1.0, window: None, norm_eps: 1e-5 };
    let spec =
        ExpertSpec { experts: 5, top_k: 2, hidden: 96, inner: 160, alpha: 1.702, limit: 7.0, norm_eps: 1e-5 };
    let mut bits: Vec<Vec<u8>> = Vec::new();
    let matrices = [
        (bf16_matrix(320, 96), Role::Qkv(&attention)),
        (bf16_matrix(96, 160), Role::Output(&attention)),
        (bf16_matrix(1003, 96), Role::Head),
        (bf16_matrix(1003, 128), Role::Head),
        (Matrix::new(77, 96, Elements::F32(values(77 * 96))).unwrap(), Role::Head),
        (mxfp4_matrix(77, 96), Role::Head),
        (bf16_matrix(1003, 128), Role::Embedding { head: true }),
        (bf16_matrix(1003, 96), Role::Embedding { head: true }),
        (bf16_matrix(1003, 96), Role::Embedding { head: false }),
    ];
    for (matrix, role) in matrices {
        let bias = values(matrix.rows());
        let loaded = packer.matrix(device, matrix, Some(bias), role).unwrap();
        for part in [loaded.plain, loaded.panels].into_iter().flatten() {
            bits.push(bytemuck::cast_slice(&part.read(0, part.len()).unwrap()).to_vec());
        }
        bits.push(bytemuck::cast_slice(&loaded.bias.read(0, loaded.bias.len()).unwrap()).to_vec());
    }
    let stacks: [fn(usize, usize) -> Matrix; 2] = [mxfp4_matrix, bf16_matrix];
    for stack in stacks {
        let weights = ExpertWeights {
            gate_up: stack(5 * 320, 96),
            gate_up_bias: values(5 * 320),
            down: stack(5 * 96, 160),
            down_bias: values(5 * 96),
        };
        let loaded = packer.experts(device, weights, &spec).unwrap();
        match &loaded.stacks {
            Stacks::Mxfp4 { gate_up, down, .. } => {
                bits.extend([gate_up, down].map(|part| part.read(0, part.len()).unwrap()));
            }
            Stacks::Bf16 { gate_up, down } => bits.extend(
                [gate_up, down].map(|part| bytemuck::cast_slice(&part.read(0, part.len()).unwrap()).to_vec()),
            ),
        }
        for part in [&loaded.gate_up_bias, &loaded.down_bias] {
            bits.push(bytemuck::cast_slice(&part.read(0, part.len()).unwrap()).to_vec());
        }
    }
    bits
}

#[test]
fn weights_packed_in_chunks_are_those_packed_at_once() {
    if let Some(why) = crate::unavailable(0) {
        assert!(std::env::var_os("CTXSERVE_REQUIRE_GPU").is_none(), "{why}");
        eprintln!("skipped: {why}");
        return;
    }
    let device = Device::open(0).unwrap();
    let whole = packed(&device, CHUNK, false);
    assert!(whole.iter().all(|bits| bits.iter().any(|&byte| byte != 0)));
    // A row at a time, an odd number of rows, experts in pairs.
    for chunk in [1, 7 * 192, 40_000] {
        for finished in [false, true] {
            assert!(
                packed(&device, chunk, finished) == whole,
                "chunks of {chunk} bytes, finished {finished}"
            );
        }
    }
}
