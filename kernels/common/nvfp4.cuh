// Dense weights in strips of NVFP4 (README.md): sizes, codes and block scales to operands in bf16.
//
// A code becomes the bf16 number code * 2^-126 (code 1 is subnormal), a scale the bf16 number scale * 2^119; their product has at most six
// significant bits and is code * scale * 2^-7 exactly, from 2^-17 to 21. A sum of products is therefore 2^-7 of the true one: multiply it
// by NV_UNIT and by the factor of its row, once, at the end.
#pragma once
#include "common/common.cuh"

constexpr int NV_TILE_COLS = 64;     // columns of a tile: four blocks of 16
constexpr int NV_TILE_CODES = 512;   // bytes of a tile's codes
constexpr int NV_TILE_SCALES = 64;   // bytes of a tile's scales
constexpr float NV_UNIT = 128.0f;

// Bytes of a strip of 16 rows and `tiles` * 64 columns; its scales start at `tiles` * NV_TILE_CODES.
DEVICE size_t nv_strip_bytes(int tiles) { return static_cast<size_t>(tiles) * (NV_TILE_CODES + NV_TILE_SCALES); }

constexpr uint32_t NV_BITS = 0x81c081c0u;  // where a code's sign, exponent and mantissa are in two bf16 numbers

// A word of a strip, the eight codes of one row and 32 columns that a lane owns, as bf16 times 2^126: columns {2t, 2t + 1}, {2t + 8,
// 2t + 9}, {2t + 16, 2t + 17}, {2t + 24, 2t + 25}. Of row g, pairs 0 and 1 are operands a0 and a2 of the first m16n8k16, pairs 2 and
// 3 of the second; of row g + 8 they are a1 and a3.
DEVICE void fp4_to_bf16(uint32_t w, uint32_t (&pairs)[4]) {
    pairs[0] = w & NV_BITS;
    pairs[1] = (w << 6) & NV_BITS;
    pairs[2] = __funnelshift_l(w, w, 12) & NV_BITS;
    pairs[3] = ((w << 2) ^ (w >> 6)) & NV_BITS;
}

// The bits that `code` has in either half of a pair.
DEVICE uint32_t fp4_bits(uint32_t code) { return (code & 8) << 12 | (code & 7) << 6; }

// The word of these pairs: the inverse of the above.
DEVICE uint32_t fp4_word(const uint32_t (&pairs)[4]) {
    uint32_t w = pairs[0] | pairs[1] >> 6 | __funnelshift_r(pairs[2], pairs[2], 12);
    // What pair 3 needs of the bits that are left; of a chain of four each depends on the one above it.
    const uint32_t rest = pairs[3] ^ (((w << 2) ^ (w >> 6)) & NV_BITS);
    uint32_t chain = (rest >> 2) & 0x20202020u;
    chain ^= chain >> 8;
    chain ^= chain >> 16;
    return w | chain | ((rest << 6) & 0x40004000u) | ((rest >> 2) & 0x00100010u);
}

// The byte of an e4m3 scale, without its sign: five bits of exponent (13 is 2^-9, 30 is 2^8) and three of mantissa. Of 0 it is any: codes are 0.
DEVICE uint32_t nv_scale_byte(uint32_t e4m3) {
    const uint32_t rest = e4m3 & 0x7f;
    if (rest >= 8) return rest + (15 << 3);  // exponent field 1 is 2^-6
    if (rest == 0) return 13 << 3;
    const uint32_t zeros = rest >= 4 ? 1 : rest >= 2 ? 2 : 3;
    return (16 - zeros) << 3 | ((rest << zeros) & 7);
}

// Four scale bytes as bf16 times 2^-119: bytes 0 and 2, bytes 1 and 3.
DEVICE void nv_scales(uint32_t w, uint32_t& even, uint32_t& odd) {
    even = ((w << 4) & 0x0ff00ff0u) | 0x70007000u;
    odd = ((w >> 4) & 0x0ff00ff0u) | 0x70007000u;
}

// The product of two pairs of bf16, subnormal factors included. HIGH: of `pair` and the second of `scales`, else the first.
template <bool HIGH> DEVICE uint32_t nv_scaled(uint32_t pair, uint32_t scales) {
    const __nv_bfloat162 both = *reinterpret_cast<const __nv_bfloat162*>(&scales);
    const __nv_bfloat162 scale = HIGH ? __high2bfloat162(both) : __low2bfloat162(both);
    const __nv_bfloat162 code = *reinterpret_cast<const __nv_bfloat162*>(&pair);
#if __CUDA_ARCH__ >= 900
    const __nv_bfloat162 product = __hmul2(code, scale);
#else
    // There is no multiplication: -0 is what changes nothing when it is added.
    const __nv_bfloat162 product = __hfma2(code, scale, __floats2bfloat162_rn(-0.0f, -0.0f));
#endif
    return *reinterpret_cast<const uint32_t*>(&product);
}

// Operand A (16 rows by 16 columns each, in bf16) of the four m16n8k16 of a tile, from a lane's 16 bytes of codes and the eight scale bytes
// of its g: code * scale * 2^-7.
DEVICE void nv_dequantise(uint4 codes, uint2 scales, uint32_t (&a)[4][4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        uint32_t low[4], high[4], even, odd;
        fp4_to_bf16(half ? codes.z : codes.x, low);
        fp4_to_bf16(half ? codes.w : codes.y, high);
        nv_scales(half ? scales.y : scales.x, even, odd);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t scale = i ? odd : even;
            uint32_t (&to)[4] = a[half * 2 + i];
            to[0] = nv_scaled<false>(low[i * 2], scale);
            to[1] = nv_scaled<true>(high[i * 2], scale);
            to[2] = nv_scaled<false>(low[i * 2 + 1], scale);
            to[3] = nv_scaled<true>(high[i * 2 + 1], scale);
        }
    }
}
