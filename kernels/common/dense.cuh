// Of gemm.cu and gemm_few.cu: what becomes of the sums.
#pragma once
#include "common/common.cuh"

// SWIGLU: of every 16 weight rows the first eight are gates, the others the ups. QKV: queries rotated, as bf16; keys rotated and values, as float32.
enum Output { STORE_F32, STORE_BF16, ADD_F32, SWIGLU, QKV };

// Of QKV. Weight rows are permuted (README.md, "QKV rows").
struct Heads {
    float* kv;              // [tokens, 2 * kv_width]: keys, rotated, in natural order, then values
    const float2* turns;    // [tokens, head_dim / 2]: cosine and sine, pairs in the order of `turn_place`
    int q_width, kv_width;  // multiples of head_dim
    int head_dim;           // multiple of 16
};

// Place of a pair's cosine and sine in a row of the table (rope_table.cu): of each eight pairs those four apart are neighbours, as a lane of a
// product has them.
DEVICE int turn_place(int pair) { return (pair & ~7) + (pair & 3) * 2 + (pair >> 2 & 1); }

DEVICE float silu_times(float gate, float up) { return __fdividef(gate, 1.0f + __expf(-gate)) * up; }

// The two dimensions of a pair, turned. Spelt out, so that every kernel rounds alike.
DEVICE float2 turned(float a, float b, float2 turn) {
    return make_float2(fmaf(a, turn.x, -__fmul_rn(b, turn.y)), fmaf(b, turn.x, __fmul_rn(a, turn.y)));
}
