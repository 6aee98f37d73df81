//! NEON, which every AArch64 has: a panel is four vectors of four rows. Products of int8 go through widening
//! multiplies, which need no extension either.

use std::arch::aarch64::*;
use std::array::from_fn;

use half::bf16;

use super::{E4M3_EXPONENT, Fp4, NO_FACTORS, Row, exp2, parts};
use crate::packed::{Affine, BLOCK, Line, PANEL, Panel};
use crate::quantised::QuantRow;

/// The 16 rows of a panel.
type Rows = [float32x4_t; 4];

/// E2M1 codes doubled.
const DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Adds `$kernel`'s products to `$out` over register blocks of at most four tokens.
macro_rules! token_blocks {
    ($kernel:path, $panel:expr, $from:expr, $x:expr, $out:expr) => {
        for (x, out) in $x.chunks(4).zip($out.chunks_mut(4 * PANEL)) {
            match *x {
                [a] => store(&$kernel($panel, [a].map(|x| x.skip($from)), restore(out)), out),
                [a, b] => store(&$kernel($panel, [a, b].map(|x| x.skip($from)), restore(out)), out),
                [a, b, c] => store(&$kernel($panel, [a, b, c].map(|x| x.skip($from)), restore(out)), out),
                [a, b, c, d] => {
                    store(&$kernel($panel, [a, b, c, d].map(|x| x.skip($from)), restore(out)), out)
                }
                _ => {}
            }
        }
    };
}

/// Adds one panel times tokens, exact.
#[target_feature(enable = "neon")]
pub(super) fn f32_panel(panel: Panel<'_>, x: &[&[f32]], from: usize, out: &mut [f32]) {
    match panel {
        Panel::F32(lines) => token_blocks!(float, lines, from, x, out),
        Panel::Bf16(lines) => token_blocks!(half_float, lines, from, x, out),
        Panel::Mxfp4(lines, scales) => {
            token_blocks!(fp4::<false, _>, (lines, scales, NO_FACTORS), from, x, out)
        }
        Panel::Nvfp4(lines, scales, factors) => {
            token_blocks!(fp4::<true, _>, (lines, scales, factors), from, x, out)
        }
        Panel::Affine4(all) => token_blocks!(affine::<4, _>, all, from, x, out),
        Panel::Affine8(all) => token_blocks!(affine::<8, _>, all, from, x, out),
        Panel::Int8(..) => out.fill(f32::NAN),
    }
}

/// Adds one panel times quantised tokens.
#[target_feature(enable = "neon")]
pub(super) fn int8_panel(panel: Panel<'_>, x: &[QuantRow<'_>], out: &mut [f32]) {
    match panel {
        Panel::Mxfp4(lines, scales) => {
            token_blocks!(fp4_int8::<false, _>, (lines, scales, NO_FACTORS), 0, x, out)
        }
        Panel::Nvfp4(lines, scales, factors) => {
            token_blocks!(fp4_int8::<true, _>, (lines, scales, factors), 0, x, out)
        }
        Panel::Int8(lines, scales) => token_blocks!(int8, (lines, scales), 0, x, out),
        _ => out.fill(f32::NAN),
    }
}

#[target_feature(enable = "neon")]
fn store<const T: usize>(sums: &[Rows; T], out: &mut [f32]) {
    for (sum, out) in sums.iter().flatten().zip(out.chunks_exact_mut(4)) {
        // SAFETY: `out` is a chunk of 4 floats.
        unsafe { vst1q_f32(out.as_mut_ptr(), *sum) };
    }
}

#[target_feature(enable = "neon")]
fn load(line: &Line) -> [uint32x4_t; 4] {
    // SAFETY: a line is 16 dwords, read four at a time.
    from_fn(|part| unsafe { vld1q_u32(line.0.as_ptr().add(4 * part)) })
}

#[target_feature(enable = "neon")]
fn restore<const T: usize>(out: &[f32]) -> [Rows; T] {
    let mut sums = [[vdupq_n_f32(0.0); 4]; T];
    for (sum, out) in sums.iter_mut().flatten().zip(out.chunks_exact(4)) {
        // SAFETY: `out` is a chunk of 4 floats.
        *sum = unsafe { vld1q_f32(out.as_ptr()) };
    }
    sums
}

#[target_feature(enable = "neon")]
fn add<const T: usize>(sums: &mut [Rows; T], w: Rows, x: &[&[f32]; T], k: usize) {
    for (sum, x) in sums.iter_mut().zip(x) {
        for (sum, w) in sum.iter_mut().zip(w) {
            *sum = vfmaq_n_f32(*sum, w, x[k]);
        }
    }
}

#[target_feature(enable = "neon")]
fn float<const T: usize>(lines: &[Line], x: [&[f32]; T], mut sums: [Rows; T]) -> [Rows; T] {
    for (k, line) in lines.iter().enumerate() {
        add(&mut sums, load(line).map(|w| vreinterpretq_f32_u32(w)), &x, k);
    }
    sums
}

#[target_feature(enable = "neon")]
fn half_float<const T: usize>(lines: &[Line], x: [&[f32]; T], mut sums: [Rows; T]) -> [Rows; T] {
    let upper = vdupq_n_u32(0xffff_0000);
    for (at, line) in lines.iter().enumerate() {
        let pairs = load(line);
        add(&mut sums, pairs.map(|w| vreinterpretq_f32_u32(vshlq_n_u32::<16>(w))), &x, 2 * at);
        add(&mut sums, pairs.map(|w| vreinterpretq_f32_u32(vandq_u32(w, upper))), &x, 2 * at + 1);
    }
    sums
}

/// `2^(scale - 127 - down)` per row; powers below `2^(1 - 127)` become zero.
#[target_feature(enable = "neon")]
fn powers(scales: &[u8; PANEL], down: u8) -> Rows {
    from_fn(|part| {
        let of = |lane: usize| u32::from(scales[4 * part + lane].saturating_sub(down)) << 23;
        let bits: [u32; 4] = from_fn(of);
        // SAFETY: 16 bytes are read from an array of 4 dwords.
        vreinterpretq_f32_u32(unsafe { vld1q_u32(bits.as_ptr()) })
    })
}

/// `scale * factor * 2^exponent` per row of half a block of NVFP4.
#[target_feature(enable = "neon")]
fn half_scale(scales: &[u8; PANEL], factors: &[f32; PANEL], exponent: i32) -> Rows {
    let (power, factors) = (exp2(E4M3_EXPONENT + exponent), floats(factors));
    from_fn(|part| {
        let of = |lane: usize| {
            let byte = u32::from(scales[4 * part + lane]);
            (byte & 0x7f) << 20 | (byte & 0x80) << 24
        };
        let bits: [u32; 4] = from_fn(of);
        // SAFETY: 16 bytes are read from an array of 4 dwords.
        let scale = vreinterpretq_f32_u32(unsafe { vld1q_u32(bits.as_ptr()) });
        vmulq_f32(vmulq_n_f32(scale, power), factors[part])
    })
}

/// A float per row.
#[target_feature(enable = "neon")]
fn floats(values: &[f32; PANEL]) -> Rows {
    // SAFETY: an array of 16 floats, read four at a time.
    from_fn(|part| unsafe { vld1q_f32(values.as_ptr().add(4 * part)) })
}

#[target_feature(enable = "neon")]
fn table() -> int8x16_t {
    // SAFETY: 16 bytes are read from an array of 16.
    unsafe { vld1q_s8(DOUBLED.as_ptr()) }
}

/// Table entries of the low and of the high nibbles of each byte.
#[target_feature(enable = "neon")]
fn nibbles(table: int8x16_t, codes: uint32x4_t) -> [int8x16_t; 2] {
    let codes = vreinterpretq_u8_u32(codes);
    [vandq_u8(codes, vdupq_n_u8(15)), vshrq_n_u8::<4>(codes)].map(|index| vqtbl1q_s8(table, index))
}

/// Doubled codes are read from the top byte of a dword: one halving and 24 doublings too many.
const DOWN: u8 = 25;

#[target_feature(enable = "neon")]
fn fp4<const NVFP4: bool, const T: usize>(
    (lines, scales, factors): Fp4<'_>,
    x: [&[f32]; T],
    mut sums: [Rows; T],
) -> [Rows; T] {
    let table = table();
    let top = vdupq_n_s32(0xff00_0000_u32.cast_signed());
    for (part, lines) in lines.chunks_exact(BLOCK / 8 / parts(NVFP4)).enumerate() {
        let scale = if NVFP4 {
            half_scale(&scales[part], factors, -i32::from(DOWN))
        } else {
            powers(&scales[part], DOWN)
        };
        let first = part * (BLOCK / parts(NVFP4));
        for (at, line) in lines.iter().enumerate() {
            let codes = load(line).map(|codes| nibbles(table, codes));
            for k in 0..8 {
                // Byte `k / 2` of each dword, of the low or the high nibbles, moved to the top.
                let shift = vdupq_n_s32(24 - 8 * (k as i32 / 2));
                let w = from_fn(|rows| {
                    let bytes = vshlq_s32(vreinterpretq_s32_s8(codes[rows][k % 2]), shift);
                    vmulq_f32(vcvtq_f32_s32(vandq_s32(bytes, top)), scale[rows])
                });
                add(&mut sums, w, &x, first + 8 * at + k);
            }
        }
    }
    sums
}

#[target_feature(enable = "neon")]
fn affine<const BITS: i32, const T: usize>(
    panel: Affine<'_>,
    x: [&[f32]; T],
    mut sums: [Rows; T],
) -> [Rows; T] {
    let (mask, per_line) = (vdupq_n_u32((1 << BITS) - 1), (32 / BITS) as usize);
    for (block, lines) in panel.lines.chunks_exact(BLOCK / per_line).enumerate() {
        let group = panel.group(block);
        let (scale, offset) = (floats(&group.scales), floats(&group.offsets));
        for (at, line) in lines.iter().enumerate() {
            let mut codes = load(line);
            for k in 0..per_line {
                let w = from_fn(|rows| {
                    let code = vcvtq_f32_u32(vandq_u32(codes[rows], mask));
                    vfmaq_f32(offset[rows], code, scale[rows])
                });
                add(&mut sums, w, &x, block * BLOCK + at * per_line + k);
                codes = codes.map(|codes| vshrq_n_u32::<BITS>(codes));
            }
        }
    }
    sums
}

/// Four codes of a token, repeated for two rows.
#[target_feature(enable = "neon")]
fn four(x: &QuantRow<'_>, dword: usize) -> int8x8_t {
    let codes = &x.codes[4 * dword..4 * dword + 4];
    let bits = i32::from_le_bytes(from_fn(|at| codes[at].to_le_bytes()[0]));
    vreinterpret_s8_s32(vdup_n_s32(bits))
}

/// Adds a block's integer products, scaled by row and token.
#[target_feature(enable = "neon")]
fn scale_add(sum: &mut Rows, dots: [int32x4_t; 4], rows: Rows, token: f32) {
    for part in 0..4 {
        let scale = vmulq_n_f32(rows[part], token);
        sum[part] = vfmaq_f32(sum[part], vcvtq_f32_s32(dots[part]), scale);
    }
}

#[target_feature(enable = "neon")]
fn fp4_int8<const NVFP4: bool, const T: usize>(
    (lines, scales, factors): Fp4<'_>,
    x: [QuantRow<'_>; T],
    mut sums: [Rows; T],
) -> [Rows; T] {
    let table = table();
    let per_part = BLOCK / 8 / parts(NVFP4);
    for (at_part, lines) in lines.chunks_exact(per_part).enumerate() {
        let mut dots = [[vdupq_n_s32(0); 4]; T];
        for part in 0..4 {
            // Rows 0 and 1, rows 2 and 3 of the part; eight products of at most 12 * 127 fit an i16.
            let mut wide = [[vdupq_n_s16(0); 2]; T];
            for (at, line) in lines.iter().enumerate() {
                for (parity, w) in nibbles(table, load(line)[part]).into_iter().enumerate() {
                    for (wide, x) in wide.iter_mut().zip(&x) {
                        let x = four(x, 2 * (at_part * per_part + at) + parity);
                        wide[0] = vmlal_s8(wide[0], vget_low_s8(w), x);
                        wide[1] = vmlal_s8(wide[1], vget_high_s8(w), x);
                    }
                }
            }
            for (dots, wide) in dots.iter_mut().zip(wide) {
                dots[part] = vpaddq_s32(vpaddlq_s16(wide[0]), vpaddlq_s16(wide[1]));
            }
        }
        // Doubled codes: the scale is halved.
        let rows =
            if NVFP4 { half_scale(&scales[at_part], factors, -1) } else { powers(&scales[at_part], 1) };
        for ((sum, dots), x) in sums.iter_mut().zip(dots).zip(&x) {
            scale_add(sum, dots, rows, x.scales[at_part / parts(NVFP4)]);
        }
    }
    sums
}

#[target_feature(enable = "neon")]
fn int8<const T: usize>(
    (lines, scales): (&[Line], &[[bf16; PANEL]]),
    x: [QuantRow<'_>; T],
    mut sums: [Rows; T],
) -> [Rows; T] {
    for (block, lines) in lines.chunks_exact(BLOCK / 4).enumerate() {
        let mut dots = [[vdupq_n_s32(0); 4]; T];
        for part in 0..4 {
            let mut wide = [[vdupq_n_s32(0); 2]; T];
            for (at, line) in lines.iter().enumerate() {
                let w = vreinterpretq_s8_u32(load(line)[part]);
                for (wide, x) in wide.iter_mut().zip(&x) {
                    let x = four(x, block * (BLOCK / 4) + at);
                    wide[0] = vpadalq_s16(wide[0], vmull_s8(vget_low_s8(w), x));
                    wide[1] = vpadalq_s16(wide[1], vmull_s8(vget_high_s8(w), x));
                }
            }
            for (dots, wide) in dots.iter_mut().zip(wide) {
                dots[part] = vpaddq_s32(wide[0], wide[1]);
            }
        }
        let rows = from_fn(|part| {
            let values: [f32; 4] = from_fn(|lane| scales[block][4 * part + lane].to_f32());
            // SAFETY: 16 bytes are read from an array of 4 floats.
            unsafe { vld1q_f32(values.as_ptr()) }
        });
        for ((sum, dots), x) in sums.iter_mut().zip(dots).zip(&x) {
            scale_add(sum, dots, rows, x.scales[block]);
        }
    }
    sums
}
