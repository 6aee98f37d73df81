//! Lane loops in safe Rust: the fallback, and NEON by way of the compiler's vectoriser on AArch64.

use crate::decode::E2M1;
use crate::packed::{BLOCK, Line, PANEL, Panel};
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
            Panel::Mxfp4(lines, scales) => {
                let blocks = lines.chunks_exact(BLOCK / 8).zip(scales).zip(x.chunks_exact(BLOCK));
                for ((lines, scales), x) in blocks {
                    for (line, x) in lines.iter().zip(x.chunks_exact(8)) {
                        for (k, &x) in x.iter().enumerate() {
                            add(&mut sum, weights(line, k, scales), x);
                        }
                    }
                }
            }
            Panel::Int8(..) => sum = [f32::NAN; PANEL],
        }
        out.copy_from_slice(&sum);
    }
}

#[inline(always)]
fn weights(line: &Line, k: usize, scales: &[u8; PANEL]) -> Lanes {
    std::array::from_fn(|lane| E2M1[(line.0[lane] >> (4 * k) & 15) as usize] * power(scales[lane]))
}

pub(super) fn decode(panel: Panel<'_>, out: &mut [Line]) {
    let Panel::Mxfp4(lines, scales) = panel else { return };
    for (index, out) in out.iter_mut().enumerate() {
        out.0 = weights(&lines[index / 8], index % 8, &scales[index / BLOCK]).map(f32::to_bits);
    }
}

/// E2M1 codes doubled, as integers.
const DOUBLED: [i32; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Adds one panel times quantised tokens.
pub(super) fn int8_panel(panel: Panel<'_>, x: &[QuantRow<'_>], out: &mut [f32]) {
    for (x, out) in x.iter().zip(out.chunks_exact_mut(PANEL)) {
        let mut sum = [0.0; PANEL];
        sum.copy_from_slice(out);
        for (block, (codes, &x_scale)) in x.codes.chunks_exact(BLOCK).zip(x.scales).enumerate() {
            debug_assert_eq!(codes.iter().map(|&code| i32::from(code)).sum::<i32>(), x.sums[block]);
            let mut dot = [0_i32; PANEL];
            let w_scale: Lanes = match panel {
                Panel::Mxfp4(lines, scales) => {
                    let lines = &lines[block * (BLOCK / 8)..][..BLOCK / 8];
                    for (line, codes) in lines.iter().zip(codes.chunks_exact(8)) {
                        for (dot, eight) in dot.iter_mut().zip(line.0) {
                            for (at, &code) in codes.iter().enumerate() {
                                // Even inputs come first among the codes: low nibbles, then high ones.
                                let shift = 8 * (at % 4) + 4 * (at / 4);
                                *dot += DOUBLED[(eight >> shift & 15) as usize] * i32::from(code);
                            }
                        }
                    }
                    scales[block].map(|scale| power(scale.saturating_sub(1)))
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
                Panel::F32(_) | Panel::Bf16(_) => [f32::NAN; PANEL],
            };
            for ((sum, dot), w_scale) in sum.iter_mut().zip(dot).zip(w_scale) {
                *sum = fma(dot as f32, w_scale * x_scale, *sum);
            }
        }
        out.copy_from_slice(&sum);
    }
}
