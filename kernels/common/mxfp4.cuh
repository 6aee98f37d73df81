// The experts' weights in strips of MXFP4 (README.md): sizes, codes to fp16, block scales to float32.
//
// A code becomes the fp16 number code * 2^-14 and a block scale the float32 number 2^(s - 127), both exactly. A sum of
// `scale * (products of one block)` is therefore 2^-14 of the true one; multiply it by FP4_UNIT once, at the end. (Folding 2^14
// into the scale would push scale bytes above 240 out of float32's range.)
#pragma once
#include "common/common.cuh"

constexpr int STRIP_ROWS = 16;    // rows of a strip
constexpr int TILE_COLS = 64;     // columns of a tile: two blocks of 32
constexpr int TILE_CODES = 512;   // bytes of a tile's codes
constexpr int TILE_SCALES = 32;   // bytes of a tile's scales
constexpr float FP4_UNIT = 16384.0f;

// Bytes of a strip of `tiles` * 64 columns; its scales start at `tiles` * TILE_CODES.
DEVICE size_t strip_bytes(int tiles) { return static_cast<size_t>(tiles) * (TILE_CODES + TILE_SCALES); }

// A word of a strip, the eight codes of one row and one block that a lane owns, as fp16: columns {2t, 2t + 1}, {2t + 8, 2t + 9},
// {2t + 16, 2t + 17}, {2t + 24, 2t + 25}. Of row g, pairs 0 and 1 are operands a0 and a2 of the block's first m16n8k16, pairs 2
// and 3 of its second; of row g + 8 they are a1 and a3.
DEVICE void fp4_to_fp16(uint32_t w, uint32_t (&pairs)[4]) {
    pairs[0] = w & 0x8e008e00u;
    pairs[1] = (w << 3) & 0x8e008e00u;
    // A product moves sign and exponent by different distances at once; what lands elsewhere is masked, and carries end before
    // the bits that count.
    pairs[2] = ((w & 0x40384038u) * 66u) & 0x8e008e00u;
    pairs[3] = ((w & 0x20072007u) * 516u) & 0x8e008e00u;
}

// The bits that `code` has in a half word of a strip as a member of pair `pair`: the inverse of the above.
DEVICE uint32_t fp4_place(uint32_t code, int pair) {
    const uint32_t sign = code >> 3 & 1, rest = code & 7;
    switch (pair) {
        case 0: return sign << 15 | rest << 9;
        case 1: return sign << 12 | rest << 6;
        case 2: return sign << 14 | rest << 3;
        default: return sign << 13 | rest;
    }
}

// 2^(s - 127) of scale byte `at` of a word. 2^-127, of s = 0, is subnormal; s = 255 does not occur (refused at load).
template <int at> DEVICE float e8m0(uint32_t word) {
    const uint32_t bits = at == 3 ? word >> 1 : word << (23 - 8 * at);
    return __uint_as_float(max(bits & 0x7f800000u, 0x00400000u));
}

// All four of a word.
DEVICE void e8m0(uint32_t word, float (&scales)[4]) {
#if __CUDA_ARCH__ >= 900
    // As bfloat16, two at a time.
    const uint32_t even = __vmaxu2((word << 7) & 0x7f807f80u, 0x00400040u), odd = __vmaxu2((word >> 1) & 0x7f807f80u, 0x00400040u);
    scales[0] = __uint_as_float(even << 16), scales[2] = __uint_as_float(even & 0xffff0000u);
    scales[1] = __uint_as_float(odd << 16), scales[3] = __uint_as_float(odd & 0xffff0000u);
#else
    scales[0] = e8m0<0>(word), scales[1] = e8m0<1>(word), scales[2] = e8m0<2>(word), scales[3] = e8m0<3>(word);
#endif
}

// D[16 x 8] = A[16 x 16] B[16 x 8] with nothing added; lanes as for mma_fp16.
DEVICE void mma_fp16_fresh(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(0.0f));
}
