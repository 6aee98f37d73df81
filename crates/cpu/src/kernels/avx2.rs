//! AVX2 and FMA: a panel is two vectors of eight rows.

#![allow(clippy::needless_range_loop, reason = "panels, scales and tokens are walked in step")]

use std::arch::x86_64::*;

use half::bf16;

use super::{E4M3_EXPONENT, Fp4, NO_FACTORS, Row, exp2, parts};
use crate::packed::{Affine, BLOCK, HALVES, Line, PANEL, Panel};
use crate::quantised::QuantRow;

/// The 16 rows of a panel.
type Rows = [__m256; 2];

/// E2M1 codes doubled.
const DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];
/// The same plus [`OFFSET`], unsigned as `maddubs` wants its first operand.
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

/// Adds one panel times tokens, exact: 12 of 16 registers accumulate.
#[target_feature(enable = "avx2,fma")]
pub(super) fn f32_panel(panel: Panel<'_>, x: &[&[f32]], from: usize, out: &mut [f32]) {
    match panel {
        Panel::F32(lines) => token_blocks!(float, lines, from, x, out, 6: 1 2 3 4 5 6),
        Panel::Bf16(lines) => token_blocks!(half_float, lines, from, x, out, 6: 1 2 3 4 5 6),
        Panel::Mxfp4(lines, scales) => {
            token_blocks!(fp4::<false, _, _>, (lines, scales, NO_FACTORS), from, x, out, 6: 1 2 3 4 5 6);
        }
        Panel::Nvfp4(lines, scales, factors) => {
            token_blocks!(fp4::<true, _, _>, (lines, scales, factors), from, x, out, 6: 1 2 3 4 5 6);
        }
        Panel::Affine4(all) => token_blocks!(affine::<4, _, _>, all, from, x, out, 6: 1 2 3 4 5 6),
        Panel::Affine8(all) => token_blocks!(affine::<8, _, _>, all, from, x, out, 6: 1 2 3 4 5 6),
        Panel::Int8(..) => out.fill(f32::NAN),
    }
}

/// Adds two panels times one token, exact.
#[target_feature(enable = "avx2,fma")]
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
#[target_feature(enable = "avx2,fma")]
pub(super) fn int8_panel(panel: Panel<'_>, x: &[QuantRow<'_>], out: &mut [f32]) {
    match panel {
        Panel::Mxfp4(lines, scales) => {
            token_blocks!(fp4_int8::<false, _>, (lines, scales, NO_FACTORS), 0, x, out, 4: 1 2 3 4);
        }
        Panel::Nvfp4(lines, scales, factors) => {
            token_blocks!(fp4_int8::<true, _>, (lines, scales, factors), 0, x, out, 4: 1 2 3 4);
        }
        Panel::Int8(lines, scales) => token_blocks!(int8, (lines, scales), 0, x, out, 4: 1 2 3 4),
        _ => out.fill(f32::NAN),
    }
}

#[target_feature(enable = "avx2,fma")]
fn restore<const G: usize, const T: usize>(out: &[f32]) -> [[Rows; T]; G] {
    let mut sums = [[[_mm256_setzero_ps(); 2]; T]; G];
    for (sum, out) in sums.iter_mut().flatten().zip(out.chunks_exact(PANEL)) {
        // SAFETY: `out` is a chunk of 16 floats.
        *sum = unsafe { [_mm256_loadu_ps(out.as_ptr()), _mm256_loadu_ps(out.as_ptr().add(8))] };
    }
    sums
}

#[target_feature(enable = "avx2,fma")]
fn store<const G: usize, const T: usize>(sums: &[[Rows; T]; G], out: &mut [f32]) {
    for (sum, out) in sums.iter().flatten().zip(out.chunks_exact_mut(PANEL)) {
        // SAFETY: `out` is a chunk of 16 floats.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), sum[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), sum[1]);
        }
    }
}

#[target_feature(enable = "avx2,fma")]
#[inline]
fn load(line: &Line) -> [__m256i; 2] {
    let at = line.0.as_ptr().cast::<__m256i>();
    // SAFETY: a line is 64 bytes, aligned to 64.
    unsafe { [_mm256_load_si256(at), _mm256_load_si256(at.add(1))] }
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

#[target_feature(enable = "avx2,fma")]
#[inline]
fn add<const T: usize>(sums: &mut [Rows; T], w: Rows, x: &[&[f32]; T], k: usize) {
    for (sum, x) in sums.iter_mut().zip(x) {
        // SAFETY: callers stay below the length that `check` asserted for every token.
        let x = _mm256_set1_ps(unsafe { *x.get_unchecked(k) });
        sum[0] = _mm256_fmadd_ps(w[0], x, sum[0]);
        sum[1] = _mm256_fmadd_ps(w[1], x, sum[1]);
    }
}

#[target_feature(enable = "avx2,fma")]
fn float<const G: usize, const T: usize>(
    panels: [&[Line]; G],
    x: [&[f32]; T],
    mut sums: [[Rows; T]; G],
) -> [[Rows; T]; G] {
    let blocks = check(panels.map(<[_]>::len), BLOCK, x.iter().map(|x| x.len()));
    for k in 0..blocks * BLOCK {
        for g in 0..G {
            let w = load(&panels[g][k]).map(|w| _mm256_castsi256_ps(w));
            add(&mut sums[g], w, &x, k);
        }
    }
    sums
}

#[target_feature(enable = "avx2,fma")]
fn half_float<const G: usize, const T: usize>(
    panels: [&[Line]; G],
    x: [&[f32]; T],
    mut sums: [[Rows; T]; G],
) -> [[Rows; T]; G] {
    let blocks = check(panels.map(<[_]>::len), BLOCK / 2, x.iter().map(|x| x.len()));
    let upper = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
    for line in 0..blocks * (BLOCK / 2) {
        for g in 0..G {
            let pairs = load(&panels[g][line]);
            let even = pairs.map(|w| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(w)));
            add(&mut sums[g], even, &x, 2 * line);
            let odd = pairs.map(|w| _mm256_castsi256_ps(_mm256_and_si256(w, upper)));
            add(&mut sums[g], odd, &x, 2 * line + 1);
        }
    }
    sums
}

/// `2^(scale - 127 - down)` per row; powers below `2^(1 - 127)` become zero.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn powers(scales: &[u8; PANEL], down: u8) -> Rows {
    // SAFETY: 16 bytes are read from an array of 16.
    let bytes = unsafe { _mm_loadu_si128(scales.as_ptr().cast()) };
    let bytes = _mm_subs_epu8(bytes, _mm_set1_epi8(down.cast_signed()));
    [bytes, _mm_srli_si128::<8>(bytes)]
        .map(|bytes| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_cvtepu8_epi32(bytes))))
}

/// `scale * factor * 2^exponent` per row of half a block of NVFP4.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn half_scale(scales: &[u8; PANEL], factors: &[f32; PANEL], exponent: i32) -> Rows {
    // SAFETY: 16 bytes are read from an array of 16.
    let bytes = unsafe { _mm_loadu_si128(scales.as_ptr().cast()) };
    let power = _mm256_set1_ps(exp2(E4M3_EXPONENT + exponent));
    let value = |bytes, factors| {
        let bytes = _mm256_cvtepu8_epi32(bytes);
        let magnitude = _mm256_slli_epi32::<20>(_mm256_and_si256(bytes, _mm256_set1_epi32(0x7f)));
        let sign = _mm256_slli_epi32::<24>(_mm256_and_si256(bytes, _mm256_set1_epi32(0x80)));
        let scale = _mm256_castsi256_ps(_mm256_or_si256(magnitude, sign));
        _mm256_mul_ps(_mm256_mul_ps(scale, power), factors)
    };
    let factors = floats(factors);
    [value(bytes, factors[0]), value(_mm_srli_si128::<8>(bytes), factors[1])]
}

/// A float per row.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn floats(values: &[f32; PANEL]) -> Rows {
    // SAFETY: 32 bytes are read twice from an array of 16 floats.
    unsafe { [_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values.as_ptr().add(8))] }
}

#[target_feature(enable = "avx2,fma")]
#[inline]
fn table(values: &[i8; 16]) -> __m256i {
    // SAFETY: 16 bytes are read from an array of 16.
    _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(values.as_ptr().cast()) })
}

/// Table entries of the low and of the high nibbles of each byte.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn nibbles(table: __m256i, codes: __m256i) -> [__m256i; 2] {
    let mask = _mm256_set1_epi8(15);
    let high = _mm256_and_si256(_mm256_srli_epi16::<4>(codes), mask);
    [_mm256_shuffle_epi8(table, _mm256_and_si256(codes, mask)), _mm256_shuffle_epi8(table, high)]
}

/// Byte `BYTE` of each dword, as a float times `2^24`, times `scale`. `LEFT = 24 - 8 * BYTE`.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn byte_to_float<const LEFT: i32>(bytes: [__m256i; 2], scale: Rows) -> Rows {
    let top = _mm256_set1_epi32(0xff00_0000_u32.cast_signed());
    let one = |bytes, scale| {
        let value = _mm256_and_si256(_mm256_slli_epi32::<LEFT>(bytes), top);
        _mm256_mul_ps(_mm256_cvtepi32_ps(value), scale)
    };
    [one(bytes[0], scale[0]), one(bytes[1], scale[1])]
}

/// Doubled codes are read from the top byte of a dword: one halving and 24 doublings too many.
const DOWN: u8 = 25;

/// The scales of part `at`, for doubled codes in the top byte.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn scale<const NVFP4: bool>((_, scales, factors): Fp4<'_>, at: usize) -> Rows {
    if NVFP4 { half_scale(&scales[at], factors, -i32::from(DOWN)) } else { powers(&scales[at], DOWN) }
}

#[target_feature(enable = "avx2,fma")]
fn fp4<const NVFP4: bool, const G: usize, const T: usize>(
    panels: [Fp4<'_>; G],
    x: [&[f32]; T],
    mut sums: [[Rows; T]; G],
) -> [[Rows; T]; G] {
    let blocks = check(panels.map(|p| p.0.len()), BLOCK / 8, x.iter().map(|x| x.len()));
    let table = table(&DOUBLED);
    let lines = BLOCK / 8 / parts(NVFP4);
    for at in 0..blocks * parts(NVFP4) {
        let scales: [Rows; G] = std::array::from_fn(|g| scale::<NVFP4>(panels[g], at));
        for line in at * lines..(at + 1) * lines {
            let k = 8 * line;
            for g in 0..G {
                let [a, b] = load(&panels[g].0[line]).map(|codes| nibbles(table, codes));
                let (low, high, scale, sums) = ([a[0], b[0]], [a[1], b[1]], scales[g], &mut sums[g]);
                add(sums, byte_to_float::<24>(low, scale), &x, k);
                add(sums, byte_to_float::<24>(high, scale), &x, k + 1);
                add(sums, byte_to_float::<16>(low, scale), &x, k + 2);
                add(sums, byte_to_float::<16>(high, scale), &x, k + 3);
                add(sums, byte_to_float::<8>(low, scale), &x, k + 4);
                add(sums, byte_to_float::<8>(high, scale), &x, k + 5);
                add(sums, byte_to_float::<0>(low, scale), &x, k + 6);
                add(sums, byte_to_float::<0>(high, scale), &x, k + 7);
            }
        }
    }
    sums
}

/// Weights of the next `32 / BITS` inputs of affine rows, lowest bits first, given to `each`.
macro_rules! affine_line {
    ($line:expr, $group:expr, |$k:ident, $w:ident| $each:expr) => {{
        let (scale, offset) = $group;
        let mask = _mm256_set1_epi32((1 << BITS) - 1);
        let mut codes = load($line);
        for $k in 0..(32 / BITS) as usize {
            let value = |at: usize| {
                let code = _mm256_cvtepi32_ps(_mm256_and_si256(codes[at], mask));
                _mm256_fmadd_ps(code, scale[at], offset[at])
            };
            let $w = [value(0), value(1)];
            $each;
            codes = codes.map(|codes| _mm256_srli_epi32::<BITS>(codes));
        }
    }};
}

#[target_feature(enable = "avx2,fma")]
fn affine<const BITS: i32, const G: usize, const T: usize>(
    panels: [Affine<'_>; G],
    x: [&[f32]; T],
    mut sums: [[Rows; T]; G],
) -> [[Rows; T]; G] {
    let lines = BLOCK * BITS as usize / 32;
    let blocks = check(panels.map(|p| p.lines.len()), lines, x.iter().map(|x| x.len()));
    for block in 0..blocks {
        let groups = panels.map(|panel| {
            let group = panel.group(block);
            (floats(&group.scales), floats(&group.offsets))
        });
        for line in block * lines..(block + 1) * lines {
            for g in 0..G {
                affine_line!(&panels[g].lines[line], groups[g], |k, w| {
                    add(&mut sums[g], w, &x, line * (32 / BITS) as usize + k);
                });
            }
        }
    }
    sums
}

/// A panel of codes as f32 lines: what [`fp4`] and [`affine`] multiply by, bit for bit.
#[target_feature(enable = "avx2,fma")]
pub(super) fn decode(panel: Panel<'_>, out: &mut [Line]) {
    match panel {
        Panel::Mxfp4(lines, scales) => decode_fp4::<false>((lines, scales, NO_FACTORS), out),
        Panel::Nvfp4(lines, scales, factors) => decode_fp4::<true>((lines, scales, factors), out),
        Panel::Affine4(all) => decode_affine::<4>(all, out),
        Panel::Affine8(all) => decode_affine::<8>(all, out),
        Panel::F32(_) | Panel::Bf16(_) | Panel::Int8(..) => {}
    }
}

#[target_feature(enable = "avx2,fma")]
fn decode_affine<const BITS: i32>(panel: Affine<'_>, out: &mut [Line]) {
    let per_line = (32 / BITS) as usize;
    for (index, (line, out)) in panel.lines.iter().zip(out.chunks_exact_mut(per_line)).enumerate() {
        let group = panel.group(index * per_line / BLOCK);
        affine_line!(line, (floats(&group.scales), floats(&group.offsets)), |k, w| store_line(
            w,
            &mut out[k]
        ));
    }
}

#[target_feature(enable = "avx2,fma")]
#[inline]
fn store_line(values: Rows, out: &mut Line) {
    let at = out.0.as_mut_ptr().cast::<f32>();
    // SAFETY: a line has room for 16 floats and is aligned to 64 bytes.
    unsafe {
        _mm256_store_ps(at, values[0]);
        _mm256_store_ps(at.add(8), values[1]);
    }
}

#[target_feature(enable = "avx2,fma")]
fn decode_fp4<const NVFP4: bool>(panel: Fp4<'_>, out: &mut [Line]) {
    let table = table(&DOUBLED);
    for (index, (line, out)) in panel.0.iter().zip(out.chunks_exact_mut(8)).enumerate() {
        let scale = scale::<NVFP4>(panel, index / (BLOCK / 8 / parts(NVFP4)));
        let [a, b] = load(line).map(|codes| nibbles(table, codes));
        let (low, high) = ([a[0], b[0]], [a[1], b[1]]);
        let values = [
            byte_to_float::<24>(low, scale),
            byte_to_float::<24>(high, scale),
            byte_to_float::<16>(low, scale),
            byte_to_float::<16>(high, scale),
            byte_to_float::<8>(low, scale),
            byte_to_float::<8>(high, scale),
            byte_to_float::<0>(low, scale),
            byte_to_float::<0>(high, scale),
        ];
        for (out, value) in out.iter_mut().zip(values) {
            store_line(value, out);
        }
    }
}

/// Four codes of a token, broadcast to every row.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn four(x: &QuantRow<'_>, dword: usize) -> __m256i {
    // SAFETY: `check` asserted that the row has the panel's length, and `dword` counts within it.
    _mm256_set1_epi32(unsafe { x.codes.as_ptr().cast::<i32>().add(dword).read_unaligned() })
}

/// Adds a block's integer products, scaled by row and token.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn scale_add(sum: &mut Rows, dots: [__m256i; 2], rows: Rows, token: f32) {
    let token = _mm256_set1_ps(token);
    for half in 0..2 {
        let scale = _mm256_mul_ps(rows[half], token);
        sum[half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[half]), scale, sum[half]);
    }
}

#[target_feature(enable = "avx2,fma")]
fn fp4_int8<const NVFP4: bool, const T: usize>(
    [(lines, scales, factors)]: [Fp4<'_>; 1],
    x: [QuantRow<'_>; T],
    [mut sums]: [[Rows; T]; 1],
) -> [[Rows; T]; 1] {
    let blocks = check([lines.len()], BLOCK / 8, x.iter().map(|x| x.codes.len()));
    let (table, ones) = (table(&SHIFTED), _mm256_set1_epi16(1));
    let halves = HALVES / parts(NVFP4);
    for part in 0..blocks * parts(NVFP4) {
        let inputs = part * halves..(part + 1) * halves;
        let mut dots: [[__m256i; 2]; T] = std::array::from_fn(|t| {
            let sum: i32 = x[t].sums[inputs.clone()].iter().sum();
            [_mm256_set1_epi32(-OFFSET * sum); 2]
        });
        // Half a block at a time: 4 products of at most 2 * 24 * 127 fit an i16.
        for at in inputs.map(|half| 2 * half) {
            for half in 0..2 {
                let [a, b] = nibbles(table, load(&lines[at])[half]);
                let [c, d] = nibbles(table, load(&lines[at + 1])[half]);
                for (dots, x) in dots.iter_mut().zip(&x) {
                    let first = _mm256_add_epi16(
                        _mm256_maddubs_epi16(a, four(x, 2 * at)),
                        _mm256_maddubs_epi16(b, four(x, 2 * at + 1)),
                    );
                    let second = _mm256_add_epi16(
                        _mm256_maddubs_epi16(c, four(x, 2 * at + 2)),
                        _mm256_maddubs_epi16(d, four(x, 2 * at + 3)),
                    );
                    let sum = _mm256_madd_epi16(_mm256_add_epi16(first, second), ones);
                    dots[half] = _mm256_add_epi32(dots[half], sum);
                }
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

#[target_feature(enable = "avx2,fma")]
fn int8<const T: usize>(
    [(lines, scales)]: [(&[Line], &[[bf16; PANEL]]); 1],
    x: [QuantRow<'_>; T],
    [mut sums]: [[Rows; T]; 1],
) -> [[Rows; T]; 1] {
    let blocks = check([lines.len()], BLOCK / 4, x.iter().map(|x| x.codes.len()));
    let ones = _mm256_set1_epi16(1);
    for block in 0..blocks {
        let mut dots = [[_mm256_setzero_si256(); 2]; T];
        for line in block * (BLOCK / 4)..(block + 1) * (BLOCK / 4) {
            let w = load(&lines[line]);
            let size = w.map(|w| _mm256_abs_epi8(w));
            for (dots, x) in dots.iter_mut().zip(&x) {
                let x = four(x, line);
                for half in 0..2 {
                    // |w| * sign(w) x: 2 * 127 * 127 fits an i16.
                    let products = _mm256_maddubs_epi16(size[half], _mm256_sign_epi8(x, w[half]));
                    dots[half] = _mm256_add_epi32(dots[half], _mm256_madd_epi16(products, ones));
                }
            }
        }
        // SAFETY: 32 bytes are read from an array of 16 two-byte values.
        let bits: [__m128i; 2] = unsafe {
            let at = scales[block].as_ptr().cast::<__m128i>();
            [_mm_loadu_si128(at), _mm_loadu_si128(at.add(1))]
        };
        let rows = bits.map(|b| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(b))));
        for ((sum, dots), x) in sums.iter_mut().zip(dots).zip(&x) {
            scale_add(sum, dots, rows, x.scales[block]);
        }
    }
    [sums]
}
