//! Lane loops in safe Rust: the fallback, and NEON by way of the compiler's vectoriser on AArch64.

use crate::decode::{E2M1, e4m3};
use crate::packed::{AffineGroup, BLOCK, HALVES, Line, PANEL, Panel};
use crate::quantised::QuantRow;

type Lanes = [f32; PANEL];

/// Fused where the target fuses; elsewhere fusing would be a library call.
#[inline(always)]
fn fma(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_feature = "fma", target_arch = "aarch64")) { a.mul_add(b, c) } else { a * b + c }
}

#[inline(always)]
fn add(sum: &mut Lanes, weights: Lanes, x: f32) {
    for (sum, w) in sum.iter_mut().zip(weights) {
        *sum = fma(w, x, *sum);
    }
}

/// Scale byte to `2^(scale - 127)`; the smallest is read as zero.
fn power(scale: u8) -> f32 {
    f32::from_bits(u32::from(scale) << 23)
}

/// Adds one panel times tokens, exact.
pub(super) fn f32_panel(panel: Panel<'_>, x: &[&[f32]], from: usize, out: &mut [f32]) {
    for (x, out) in x.iter().zip(out.chunks_exact_mut(PANEL)) {
        let x = &x[from..];
        let mut sum = [0.0; PANEL];
        sum.copy_from_slice(out);
        match panel {
            Panel::F32(lines) => {
                for (line, &x) in lines.iter().zip(x) {
                    add(&mut sum, line.0.map(f32::from_bits), x);
                }
            }
            Panel::Bf16(lines) => {
                for (line, x) in lines.iter().zip(x.chunks_exact(2)) {
                    add(&mut sum, line.0.map(|pair| f32::from_bits(pair << 16)), x[0]);
                    add(&mut sum, line.0.map(|pair| f32::from_bits(pair & 0xffff_0000)), x[1]);
                }
            }
            Panel::Int8(..) => sum = [f32::NAN; PANEL],
            _ => coded(panel, |k, weights| add(&mut sum, weights, x[k])),
        }
        out.copy_from_slice(&sum);
    }
}

/// Calls `each` with every input of a panel of codes, in order, and its weights.
#[inline(always)]
fn coded(panel: Panel<'_>, mut each: impl FnMut(usize, Lanes)) {
    let code = |line: &Line, lane: usize, bits: usize, k: usize| {
        (line.0[lane] >> (bits * (k % (32 / bits))) & ((1 << bits) - 1)) as usize
    };
    let fp4 = |lines: &[Line], k: usize, scale: Lanes| -> Lanes {
        std::array::from_fn(|lane| E2M1[code(&lines[k / 8], lane, 4, k)] * scale[lane])
    };
    let affine = |lines: &[Line], k: usize, bits: usize, group: &AffineGroup| -> Lanes {
        let code = |lane| code(&lines[k * bits / 32], lane, bits, k) as f32;
        std::array::from_fn(|lane| fma(code(lane), group.scales[lane], group.offsets[lane]))
    };
    for block in 0..panel.blocks() {
        for half in 0..HALVES {
            let start = block * BLOCK + half * (BLOCK / HALVES);
            let inputs = start..start + BLOCK / HALVES;
            match panel {
                Panel::Mxfp4(lines, scales) => {
                    let scale = scales[block].map(power);
                    inputs.for_each(|k| each(k, fp4(lines, k, scale)));
                }
                Panel::Nvfp4(lines, scales, factors) => {
                    let scale = half_scale(&scales[HALVES * block + half], factors);
                    inputs.for_each(|k| each(k, fp4(lines, k, scale)));
                }
                Panel::Affine4(all) => {
                    inputs.for_each(|k| each(k, affine(all.lines, k, 4, all.group(block))));
                }
                Panel::Affine8(all) => {
                    inputs.for_each(|k| each(k, affine(all.lines, k, 8, all.group(block))));
                }
                Panel::F32(_) | Panel::Bf16(_) | Panel::Int8(..) => {}
            }
        }
    }
}

/// NVFP4's scale of half a block.
#[inline(always)]
fn half_scale(scales: &[u8; PANEL], factors: &[f32; PANEL]) -> Lanes {
    std::array::from_fn(|lane| e4m3(scales[lane]) * factors[lane])
}

pub(super) fn decode(panel: Panel<'_>, out: &mut [Line]) {
    coded(panel, |k, weights| out[k].0 = weights.map(f32::to_bits));
}

/// E2M1 codes doubled, as integers.
const DOUBLED: [i32; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Adds the integer products of FP4 lines, codes doubled.
fn fp4_dot(lines: &[Line], codes: &[i8], dot: &mut [i32; PANEL]) {
    for (line, codes) in lines.iter().zip(codes.chunks_exact(8)) {
        for (dot, eight) in dot.iter_mut().zip(line.0) {
            for (at, &code) in codes.iter().enumerate() {
                // Even inputs come first among the codes: low nibbles, then high ones.
                let shift = 8 * (at % 4) + 4 * (at / 4);
                *dot += DOUBLED[(eight >> shift & 15) as usize] * i32::from(code);
            }
        }
    }
}

/// Adds one panel times quantised tokens.
pub(super) fn int8_panel(panel: Panel<'_>, x: &[QuantRow<'_>], out: &mut [f32]) {
    for (x, out) in x.iter().zip(out.chunks_exact_mut(PANEL)) {
        let mut sum = [0.0; PANEL];
        sum.copy_from_slice(out);
        for (block, (codes, &x_scale)) in x.codes.chunks_exact(BLOCK).zip(x.scales).enumerate() {
            debug_assert_eq!(codes.iter().map(|&code| i32::from(code)).sum::<i32>(), x.sum(block));
            let mut dot = [0_i32; PANEL];
            let w_scale: Lanes = match panel {
                Panel::Mxfp4(lines, scales) => {
                    let lines = &lines[block * (BLOCK / 8)..][..BLOCK / 8];
                    fp4_dot(lines, codes, &mut dot);
                    scales[block].map(|scale| power(scale.saturating_sub(1)))
                }
                Panel::Nvfp4(lines, scales, factors) => {
                    let (codes, last) = codes.split_at(BLOCK / 2);
                    let (lines, last_lines) = lines[block * (BLOCK / 8)..][..BLOCK / 8].split_at(BLOCK / 16);
                    fp4_dot(lines, codes, &mut dot);
                    let scale = half_scale(&scales[HALVES * block], factors);
                    for ((sum, dot), scale) in sum.iter_mut().zip(dot).zip(scale) {
                        *sum = fma(dot as f32, 0.5 * scale * x_scale, *sum);
                    }
                    dot = [0; PANEL];
                    fp4_dot(last_lines, last, &mut dot);
                    half_scale(&scales[HALVES * block + 1], factors).map(|scale| 0.5 * scale)
                }
                Panel::Int8(lines, scales) => {
                    let lines = &lines[block * (BLOCK / 4)..][..BLOCK / 4];
                    for (line, codes) in lines.iter().zip(codes.chunks_exact(4)) {
                        for (dot, four) in dot.iter_mut().zip(line.0) {
                            for (weight, &code) in four.to_le_bytes().into_iter().zip(codes) {
                                *dot += i32::from(weight.cast_signed()) * i32::from(code);
                            }
                        }
                    }
                    scales[block].map(f32::from)
                }
                _ => [f32::NAN; PANEL],
            };
            for ((sum, dot), w_scale) in sum.iter_mut().zip(dot).zip(w_scale) {
                *sum = fma(dot as f32, w_scale * x_scale, *sum);
            }
        }
        out.copy_from_slice(&sum);
    }
}
