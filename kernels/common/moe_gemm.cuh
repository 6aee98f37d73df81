// Of moe_gemm.cu: its parameters, weights to operand A, and what becomes of the sums.
#pragma once
#include "common/mxfp4.cuh"
#include "common/panels.cuh"

struct Params {
    const char* w;                   // strips of [experts, rows, cols]
    const unsigned char* exponents;  // [experts, rows]: R of each row, in the order of the strips' rows (moe_exponents)
    const float* bias;               // [experts, rows]: gate/up: gate i at 2i, up i at 2i + 1; down: rows in order
    const void* x;                   // panels of [capacity, cols], fp16
    void* y;                         // gate/up: panels of [capacity, rows / 2], fp16; down: [capacity, rows], float32 or bf16
    const int4* tiles;               // {expert, first sorted row, sorted rows (a multiple of 8), 0}
    const int* count;                // tiles
    int cols;                        // multiple of 64
    int rows;                        // of one expert, a multiple of 16
    int capacity;                    // multiple of 8
    float alpha, limit;              // SwiGLU: sigmoid's factor, clamp
    int experts;                     // of `w`
};

// What becomes of the sums.
enum Output { SWIGLU, DOWN_F32, DOWN_BF16 };

// Offsets of a lane's two rows, 30 - R: with them a scale word becomes fp16 factors.
DEVICE uint32_t scale_offsets(int low, int high) { return (static_cast<uint32_t>(30 - low) & 0xffff) | static_cast<uint32_t>(30 - high) << 16; }

// Factors 2^(s - R + 15) of (row g, row g + 8) for one block of 32, each as two equal fp16; 0 where that is below 2^-14.
template <int BLOCK> DEVICE void scale_factors(uint32_t word, uint32_t offsets, uint32_t& low, uint32_t& high) {
    const uint32_t bytes = __byte_perm(word, 0, BLOCK ? 0x4342 : 0x4140);
    const uint32_t exponents = __viaddmax_s16x2_relu(bytes, offsets, 0) << 2;
    low = __byte_perm(exponents, 0, 0x0404);
    high = __byte_perm(exponents, 0, 0x2424);
}

DEVICE uint32_t multiply2(uint32_t a, uint32_t b) {
    const __half2 v = __hmul2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
    return *reinterpret_cast<const uint32_t*>(&v);
}

// A lane's share of a tile as operand A of four products of 16 columns.
DEVICE void dequantise(uint4 codes, uint32_t scales, uint32_t offsets, uint32_t (&a)[4][4]) {
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
    uint32_t factors[4];
    scale_factors<0>(scales, offsets, factors[0], factors[1]);
    scale_factors<1>(scales, offsets, factors[2], factors[3]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32_t pairs[4];
        fp4_to_fp16(words[i], pairs);
        const int first = i / 2 * 2, high = i % 2;
        a[first][high] = multiply2(pairs[0], factors[i]);
        a[first][2 + high] = multiply2(pairs[1], factors[i]);
        a[first + 1][high] = multiply2(pairs[2], factors[i]);
        a[first + 1][2 + high] = multiply2(pairs[3], factors[i]);
    }
}

DEVICE float power_of_two(float v) {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(v));
    return v;
}
DEVICE float reciprocal(float v) {
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(v));
    return v;
}

DEVICE float swiglu(float gate, float up, float alpha, float limit) {
    gate = fminf(gate, limit);
    up = fminf(fmaxf(up, -limit), limit);
    return gate * (up + 1.0f) * reciprocal(1.0f + power_of_two(-1.4426950408889634f * alpha * gate));
}

// Sums of one strip for N sorted rows from `first` on, of which `tokens` are to be stored.
template <int N, Output OUT>
DEVICE void store(const Params& p, const float (&d)[N / 2], int strip, int first, int tokens, uint32_t offsets, float bias_low,
                  float bias_high) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    // 2^(R - 128) from 30 - R.
    const float unit_low = __int_as_float((29 - static_cast<short>(offsets & 0xffff)) << 23);
    const float unit_high = __int_as_float((29 - static_cast<short>(offsets >> 16)) << 23);
    // A multiple of 8 rows further is a multiple of 1024 bytes further in a panel.
    char* y;
    if constexpr (OUT == SWIGLU) y = static_cast<char*>(p.y) + panel_chunk(first + g, strip * 8, p.capacity) + 4 * t;
    if constexpr (OUT == DOWN_BF16) y = static_cast<char*>(p.y) + (static_cast<size_t>(first + (g & ~1)) * p.rows + strip * STRIP_ROWS + g % 2 * 8 + 2 * t) * 2;
    if constexpr (OUT == DOWN_F32) y = static_cast<char*>(p.y) + (static_cast<size_t>(first + 2 * t) * p.rows + strip * STRIP_ROWS + g) * 4;
    const size_t stride = OUT == SWIGLU ? 1024 : static_cast<size_t>(p.rows) * (OUT == DOWN_BF16 ? 16 : 32);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
        if (8 * j >= tokens) break;
        float v[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) v[c] = fmaf(d[4 * j + c], c < 2 ? unit_low : unit_high, c < 2 ? bias_low : bias_high);
        if constexpr (OUT == SWIGLU) {
            const float even = swiglu(v[0], v[2], p.alpha, p.limit), odd = swiglu(v[1], v[3], p.alpha, p.limit);
            *reinterpret_cast<uint32_t*>(y + j * 1024) = transpose8(pack2<__half>(even, odd));
        } else if constexpr (OUT == DOWN_BF16) {
            // Transposed with both halves of the strip, so that lanes of one token write a sector.
            *reinterpret_cast<uint32_t*>(y) = transpose8(pack2<__nv_bfloat16>(v[0], v[2]));
            *reinterpret_cast<uint32_t*>(y + p.rows * 2) = transpose8(pack2<__nv_bfloat16>(v[1], v[3]));
            y += stride;
        } else {
            auto* rows = reinterpret_cast<float*>(y);
            rows[0] = v[0], rows[8] = v[2], rows[p.rows] = v[1], rows[p.rows + 8] = v[3];
            y += stride;
        }
    }
}
