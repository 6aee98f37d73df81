// RMSNorm of rows of the residual stream, in float32, one block a row. What becomes of the values is a kernel's own.
#pragma once
#include "common/common.cuh"

constexpr int NORM_THREADS = 384, NORM_CHUNKS = 3;  // at most NORM_CHUNKS * NORM_THREADS * 8 columns

DEVICE float squares(float sum, const float4& a) {
    return fmaf(a.x, a.x, fmaf(a.y, a.y, fmaf(a.z, a.z, fmaf(a.w, a.w, sum))));
}

// Calls `put(row, col, v)` for each eight columns of the block's row, zeros where it has no source: x * rsqrt(mean(x^2) + eps) * weight.
// `p` has x [rows, cols], weight [cols], live, index ([rows]: the row of x that a row takes, -1 for zeros; null is the same row), cols (a
// multiple of 64) and eps.
template <class Params, class Put> DEVICE void norm_row(const Params& p, const Put& put) {
    __shared__ float scratch[NORM_THREADS / 32];
    pdl_wait();
    pdl_launch();
    const int row = blockIdx.x;
    if (row >= *p.live) return;
    const int source = p.index ? p.index[row] : row;
    const float* x = p.x + static_cast<size_t>(max(source, 0)) * p.cols;
    float4 values[NORM_CHUNKS][2];
    float sum = 0;
#pragma unroll
    for (int i = 0; i < NORM_CHUNKS; ++i) {
        const int col = (i * NORM_THREADS + threadIdx.x) * 8;
        if (col >= p.cols) break;
        values[i][0] = *reinterpret_cast<const float4*>(x + col), values[i][1] = *reinterpret_cast<const float4*>(x + col + 4);
        sum = squares(squares(sum, values[i][0]), values[i][1]);
    }
    const float scale = rsqrtf(block_sum<NORM_THREADS / 32>(sum, scratch) / p.cols + p.eps);
#pragma unroll
    for (int i = 0; i < NORM_CHUNKS; ++i) {
        const int col = (i * NORM_THREADS + threadIdx.x) * 8;
        if (col >= p.cols) break;
        const float4 a = values[i][0], b = values[i][1];
        const float4 v = *reinterpret_cast<const float4*>(p.weight + col), w = *reinterpret_cast<const float4*>(p.weight + col + 4);
        float y[8] = {};
        if (source >= 0) {
            y[0] = a.x * scale * v.x, y[1] = a.y * scale * v.y, y[2] = a.z * scale * v.z, y[3] = a.w * scale * v.w;
            y[4] = b.x * scale * w.x, y[5] = b.y * scale * w.y, y[6] = b.z * scale * w.z, y[7] = b.w * scale * w.w;
        }
        put(row, col, y);
    }
}

// Eight values as bf16, in order.
DEVICE uint4 pack8(const float (&v)[8]) {
    return make_uint4(pack2<__nv_bfloat16>(v[0], v[1]), pack2<__nv_bfloat16>(v[2], v[3]), pack2<__nv_bfloat16>(v[4], v[5]),
                      pack2<__nv_bfloat16>(v[6], v[7]));
}
