//! AVX-512 with VNNI: a panel is one vector of sixteen rows.

#![allow(clippy::needless_range_loop, reason = "panels, scales and tokens are walked in step")]

use std::arch::x86_64::*;

use half::bf16;

use super::{E4M3_EXPONENT, Fp4, NO_FACTORS, Row, exp2, parts};
use crate::packed::{Affine, BLOCK, HALVES, Line, PANEL, Panel};
use crate::quantised::QuantRow;

/// E2M1 values times `2^25`, the factor that [`DOWN`] takes away: the same products as on AVX2.
const SCALED: [f32; 16] = {
    const ONE: f32 = 33_554_432.0;
    let half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let mut table = [0.0; 16];
    let mut code = 0;
    while code < 8 {
        table[code] = half[code] * ONE;
        table[code + 8] = -half[code] * ONE;
        code += 1;
    }
    table
};
const DOWN: u8 = 25;

/// E2M1 codes doubled plus [`OFFSET`], unsigned as `vpdpbusd` wants its first operand.
const SHIFTED: [i8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];
const OFFSET: i32 = 12;

/// Adds `$kernel`'s products to `$out` over register blocks of at most `$most` tokens, all about as large: a lone
/// token at the end would cost as much as a full block.
macro_rules! token_blocks {
    ($kernel:path, $panel:expr, $from:expr, $x:expr, $out:expr, $most:literal: $($n:literal)+) => {{
        let size = $x.len().div_ceil($x.len().div_ceil($most).max(1)).max(1);
        for (x, out) in $x.chunks(size).zip($out.chunks_mut(size * PANEL)) {
            match x.len() {
                $($n => {
                    let rows = std::array::from_fn::<_, $n, _>(|t| x[t].skip($from));
                    store(&$kernel([$panel], rows, restore(out)), out);
                })+
                _ => {}
            }
        }
    }};
}

/// Adds one panel times tokens, exact.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
pub(super) fn f32_panel(panel: Panel<'_>, x: &[&[f32]], from: usize, out: &mut [f32]) {
    match panel {
        Panel::F32(lines) => token_blocks!(float, lines, from, x, out, 12: 1 2 3 4 5 6 7 8 9 10 11 12),
        Panel::Bf16(lines) => token_blocks!(half_float, lines, from, x, out, 12: 1 2 3 4 5 6 7 8 9 10 11 12),
        Panel::Mxfp4(lines, scales) => {
            token_blocks!(fp4::<false, _, _>, (lines, scales, NO_FACTORS), from, x, out, 12: 1 2 3 4 5 6 7 8 9 10 11 12);
        }
        Panel::Nvfp4(lines, scales, factors) => {
            token_blocks!(fp4::<true, _, _>, (lines, scales, factors), from, x, out, 12: 1 2 3 4 5 6 7 8 9 10 11 12);
        }
        Panel::Affine4(all) => {
            token_blocks!(affine::<4, _, _>, all, from, x, out, 12: 1 2 3 4 5 6 7 8 9 10 11 12);
        }
        Panel::Affine8(all) => {
            token_blocks!(affine::<8, _, _>, all, from, x, out, 12: 1 2 3 4 5 6 7 8 9 10 11 12);
        }
        Panel::Int8(..) => out.fill(f32::NAN),
    }
}

/// Adds two panels times one token, exact.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
pub(super) fn f32_pair(panels: [Panel<'_>; 2], x: &[f32], out: &mut [f32]) {
    match panels {
        [Panel::F32(a), Panel::F32(b)] => store(&float([a, b], [x], restore(out)), out),
        [Panel::Bf16(a), Panel::Bf16(b)] => store(&half_float([a, b], [x], restore(out)), out),
        [Panel::Mxfp4(a, s), Panel::Mxfp4(b, r)] => {
            store(&fp4::<false, _, _>([(a, s, NO_FACTORS), (b, r, NO_FACTORS)], [x], restore(out)), out);
        }
        [Panel::Nvfp4(a, s, f), Panel::Nvfp4(b, r, g)] => {
            store(&fp4::<true, _, _>([(a, s, f), (b, r, g)], [x], restore(out)), out);
        }
        [Panel::Affine4(a), Panel::Affine4(b)] => store(&affine::<4, _, _>([a, b], [x], restore(out)), out),
        [Panel::Affine8(a), Panel::Affine8(b)] => store(&affine::<8, _, _>([a, b], [x], restore(out)), out),
        _ => out.fill(f32::NAN),
    }
}

/// Adds one panel times quantised tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
pub(super) fn int8_panel(panel: Panel<'_>, x: &[QuantRow<'_>], out: &mut [f32]) {
    match panel {
        Panel::Mxfp4(lines, scales) => {
            token_blocks!(fp4_int8::<false, _>, (lines, scales, NO_FACTORS), 0, x, out, 8: 1 2 3 4 5 6 7 8);
        }
        Panel::Nvfp4(lines, scales, factors) => {
            token_blocks!(fp4_int8::<true, _>, (lines, scales, factors), 0, x, out, 8: 1 2 3 4 5 6 7 8);
        }
        Panel::Int8(lines, scales) => token_blocks!(int8, (lines, scales), 0, x, out, 8: 1 2 3 4 5 6 7 8),
        _ => out.fill(f32::NAN),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
fn restore<const G: usize, const T: usize>(out: &[f32]) -> [[__m512; T]; G] {
    let mut sums = [[_mm512_setzero_ps(); T]; G];
    for (sum, out) in sums.iter_mut().flatten().zip(out.chunks_exact(PANEL)) {
        // SAFETY: `out` is a chunk of 16 floats.
        *sum = unsafe { _mm512_loadu_ps(out.as_ptr()) };
    }
    sums
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
fn store<const G: usize, const T: usize>(sums: &[[__m512; T]; G], out: &mut [f32]) {
    for (&sum, out) in sums.iter().flatten().zip(out.chunks_exact_mut(PANEL)) {
        // SAFETY: `out` is a chunk of 16 floats.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) };
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
#[inline]
fn load(line: &Line) -> __m512i {
    // SAFETY: a line is 64 bytes, aligned to 64.
    unsafe { _mm512_load_si512(line.0.as_ptr().cast()) }
}

/// Lines of this many blocks, tokens checked to be as long: what the unchecked reads below rely on.
fn check<const G: usize>(lines: [usize; G], per_block: usize, tokens: impl Iterator<Item = usize>) -> usize {
    let blocks = lines[0] / per_block;
    assert!(lines.iter().all(|&n| n == blocks * per_block), "panels differ in length");
    for len in tokens {
        assert!(len >= blocks * BLOCK, "a token is shorter than its panel");
    }
    blocks
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
#[inline]
fn add<const T: usize>(sums: &mut [__m512; T], w: __m512, x: &[&[f32]; T], k: usize) {
    for (sum, x) in sums.iter_mut().zip(x) {
        // SAFETY: callers stay below the length that `check` asserted for every token.
        let x = _mm512_set1_ps(unsafe { *x.get_unchecked(k) });
        *sum = _mm512_fmadd_ps(w, x, *sum);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
fn float<const G: usize, const T: usize>(
    panels: [&[Line]; G],
    x: [&[f32]; T],
    mut sums: [[__m512; T]; G],
) -> [[__m512; T]; G] {
    let blocks = check(panels.map(<[_]>::len), BLOCK, x.iter().map(|x| x.len()));
    for k in 0..blocks * BLOCK {
        for g in 0..G {
            add(&mut sums[g], _mm512_castsi512_ps(load(&panels[g][k])), &x, k);
        }
    }
    sums
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
fn half_float<const G: usize, const T: usize>(
    panels: [&[Line]; G],
    x: [&[f32]; T],
    mut sums: [[__m512; T]; G],
) -> [[__m512; T]; G] {
    let blocks = check(panels.map(<[_]>::len), BLOCK / 2, x.iter().map(|x| x.len()));
    let upper = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
    for line in 0..blocks * (BLOCK / 2) {
        for g in 0..G {
            let pairs = load(&panels[g][line]);
            add(&mut sums[g], _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pairs)), &x, 2 * line);
            add(&mut sums[g], _mm512_castsi512_ps(_mm512_and_si512(pairs, upper)), &x, 2 * line + 1);
        }
    }
    sums
}

/// `2^(scale - 127 - down)` per row; powers below `2^(1 - 127)` become zero.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
#[inline]
fn powers(scales: &[u8; PANEL], down: u8) -> __m512 {
    // SAFETY: 16 bytes are read from an array of 16.
    let bytes = unsafe { _mm_loadu_si128(scales.as_ptr().cast()) };
    let bytes = _mm_subs_epu8(bytes, _mm_set1_epi8(down.cast_signed()));
    _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_cvtepu8_epi32(bytes)))
}

/// `scale * factor * 2^exponent` per row of half a block of NVFP4.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
#[inline]
fn half_scale(scales: &[u8; PANEL], factors: &[f32; PANEL], exponent: i32) -> __m512 {
    // SAFETY: 16 bytes are read from an array of 16.
    let bytes = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(scales.as_ptr().cast()) });
    let magnitude = _mm512_slli_epi32::<20>(_mm512_and_si512(bytes, _mm512_set1_epi32(0x7f)));
    let sign = _mm512_slli_epi32::<24>(_mm512_and_si512(bytes, _mm512_set1_epi32(0x80)));
    let scale = _mm512_castsi512_ps(_mm512_or_si512(magnitude, sign));
    let power = _mm512_set1_ps(exp2(E4M3_EXPONENT + exponent));
    _mm512_mul_ps(_mm512_mul_ps(scale, power), floats(factors))
}

/// A float per row.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
#[inline]
fn floats(values: &[f32; PANEL]) -> __m512 {
    // SAFETY: 64 bytes are read from an array of 16 floats.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

/// The scales of part `at`, `2^`[`DOWN`] times too small.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
#[inline]
fn scale<const NVFP4: bool>((_, scales, factors): Fp4<'_>, at: usize) -> __m512 {
    if NVFP4 { half_scale(&scales[at], factors, -i32::from(DOWN)) } else { powers(&scales[at], DOWN) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
fn fp4<const NVFP4: bool, const G: usize, const T: usize>(
    panels: [Fp4<'_>; G],
    x: [&[f32]; T],
    mut sums: [[__m512; T]; G],
) -> [[__m512; T]; G] {
    let blocks = check(panels.map(|p| p.0.len()), BLOCK / 8, x.iter().map(|x| x.len()));
    // SAFETY: 64 bytes are read from an array of 16 floats.
    let table = unsafe { _mm512_loadu_ps(SCALED.as_ptr()) };
    let lines = BLOCK / 8 / parts(NVFP4);
    for at in 0..blocks * parts(NVFP4) {
        let scales: [__m512; G] = std::array::from_fn(|g| scale::<NVFP4>(panels[g], at));
        for line in at * lines..(at + 1) * lines {
            for g in 0..G {
                let mut codes = load(&panels[g].0[line]);
                for k in 8 * line..8 * line + 8 {
                    // The permutation reads the low four bits of each dword.
                    let w = _mm512_mul_ps(_mm512_permutexvar_ps(codes, table), scales[g]);
                    add(&mut sums[g], w, &x, k);
                    codes = _mm512_srli_epi32::<4>(codes);
                }
            }
        }
    }
    sums
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
fn affine<const BITS: u32, const G: usize, const T: usize>(
    panels: [Affine<'_>; G],
    x: [&[f32]; T],
    mut sums: [[__m512; T]; G],
) -> [[__m512; T]; G] {
    let lines = BLOCK * BITS as usize / 32;
    let blocks = check(panels.map(|p| p.lines.len()), lines, x.iter().map(|x| x.len()));
    let (mask, per_line) = (_mm512_set1_epi32((1 << BITS) - 1), (32 / BITS) as usize);
    for block in 0..blocks {
        let groups = panels.map(|panel| {
            let group = panel.group(block);
            (floats(&group.scales), floats(&group.offsets))
        });
        for line in block * lines..(block + 1) * lines {
            for g in 0..G {
                let (scale, offset) = groups[g];
                let mut codes = load(&panels[g].lines[line]);
                for k in line * per_line..(line + 1) * per_line {
                    let code = _mm512_cvtepi32_ps(_mm512_and_si512(codes, mask));
                    add(&mut sums[g], _mm512_fmadd_ps(code, scale, offset), &x, k);
                    codes = _mm512_srli_epi32::<BITS>(codes);
                }
            }
        }
    }
    sums
}

/// Four codes of a token, broadcast to every row.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
#[inline]
fn four(x: &QuantRow<'_>, dword: usize) -> __m512i {
    // SAFETY: `check` asserted that the row has the panel's length, and `dword` counts within it.
    _mm512_set1_epi32(unsafe { x.codes.as_ptr().cast::<i32>().add(dword).read_unaligned() })
}

/// Adds a block's integer products, scaled by row and token.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
#[inline]
fn scale_add(sum: &mut __m512, dots: __m512i, rows: __m512, token: f32) {
    let scale = _mm512_mul_ps(rows, _mm512_set1_ps(token));
    *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots), scale, *sum);
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
fn fp4_int8<const NVFP4: bool, const T: usize>(
    [(lines, scales, factors)]: [Fp4<'_>; 1],
    x: [QuantRow<'_>; T],
    [mut sums]: [[__m512; T]; 1],
) -> [[__m512; T]; 1] {
    let blocks = check([lines.len()], BLOCK / 8, x.iter().map(|x| x.codes.len()));
    // SAFETY: 16 bytes are read from an array of 16.
    let table = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(SHIFTED.as_ptr().cast()) });
    let mask = _mm512_set1_epi8(15);
    let (halves, per_part) = (HALVES / parts(NVFP4), BLOCK / 8 / parts(NVFP4));
    for part in 0..blocks * parts(NVFP4) {
        let mut dots: [__m512i; T] = std::array::from_fn(|t| {
            let sum: i32 = x[t].sums[part * halves..(part + 1) * halves].iter().sum();
            _mm512_set1_epi32(-OFFSET * sum)
        });
        for line in part * per_part..(part + 1) * per_part {
            let codes = load(&lines[line]);
            let low = _mm512_shuffle_epi8(table, _mm512_and_si512(codes, mask));
            let high = _mm512_and_si512(_mm512_srli_epi16::<4>(codes), mask);
            let high = _mm512_shuffle_epi8(table, high);
            for (dots, x) in dots.iter_mut().zip(&x) {
                *dots = _mm512_dpbusd_epi32(*dots, low, four(x, 2 * line));
                *dots = _mm512_dpbusd_epi32(*dots, high, four(x, 2 * line + 1));
            }
        }
        // Doubled codes: the scale is halved.
        let rows = if NVFP4 { half_scale(&scales[part], factors, -1) } else { powers(&scales[part], 1) };
        for ((sum, dots), x) in sums.iter_mut().zip(dots).zip(&x) {
            scale_add(sum, dots, rows, x.scales[part / parts(NVFP4)]);
        }
    }
    [sums]
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
fn int8<const T: usize>(
    [(lines, scales)]: [(&[Line], &[[bf16; PANEL]]); 1],
    x: [QuantRow<'_>; T],
    [mut sums]: [[__m512; T]; 1],
) -> [[__m512; T]; 1] {
    let blocks = check([lines.len()], BLOCK / 4, x.iter().map(|x| x.codes.len()));
    let sign = _mm512_set1_epi8(i8::MIN);
    for block in 0..blocks {
        // Flipping the sign bit adds 128 to a weight.
        let mut dots: [__m512i; T] = std::array::from_fn(|t| _mm512_set1_epi32(-128 * x[t].sum(block)));
        for line in block * (BLOCK / 4)..(block + 1) * (BLOCK / 4) {
            let w = _mm512_xor_si512(load(&lines[line]), sign);
            for (dots, x) in dots.iter_mut().zip(&x) {
                *dots = _mm512_dpbusd_epi32(*dots, w, four(x, line));
            }
        }
        // SAFETY: 32 bytes are read from an array of 16 two-byte values.
        let bits = unsafe { _mm256_loadu_si256(scales[block].as_ptr().cast()) };
        let rows = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)));
        for ((sum, dots), x) in sums.iter_mut().zip(dots).zip(&x) {
            scale_add(sum, dots, rows, x.scales[block]);
        }
    }
    [sums]
}
