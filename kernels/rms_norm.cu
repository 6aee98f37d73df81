// RMSNorm of the residual stream into a bf16 operand in panel layout: y = x * rsqrt(mean(x^2) + eps) * w, in float32 until the
// last rounding. One block a row.
#include "common/common.cuh"

struct Params {
    const float* x;       // [rows, cols]
    const float* weight;  // [cols]
    void* y;              // panels of [capacity, cols], bf16
    const int* live;      // rows to do; later ones are left alone
    const int* index;     // [rows]: the row of x that row r of y takes, -1 for a row of zeros; null is r itself
    int cols;             // multiple of 64, at most CHUNKS * THREADS * 8
    int capacity;         // multiple of 8
    float eps;
};

constexpr int THREADS = 384, CHUNKS = 3;

DEVICE float squares(float sum, const float4& a) {
    return fmaf(a.x, a.x, fmaf(a.y, a.y, fmaf(a.z, a.z, fmaf(a.w, a.w, sum))));
}

KERNEL __launch_bounds__(THREADS) rms_norm(const __grid_constant__ Params p) {
    __shared__ float scratch[THREADS / 32];
    pdl_wait();
    pdl_launch();
    const int row = blockIdx.x;
    if (row >= *p.live) return;
    const int source = p.index ? p.index[row] : row;
    const float* x = p.x + static_cast<size_t>(max(source, 0)) * p.cols;
    float4 values[CHUNKS][2];
    float sum = 0;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        const int col = (i * THREADS + threadIdx.x) * 8;
        if (col >= p.cols) break;
        values[i][0] = *reinterpret_cast<const float4*>(x + col), values[i][1] = *reinterpret_cast<const float4*>(x + col + 4);
        sum = squares(squares(sum, values[i][0]), values[i][1]);
    }
    const float scale = rsqrtf(block_sum<THREADS / 32>(sum, scratch) / p.cols + p.eps);
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        const int col = (i * THREADS + threadIdx.x) * 8;
        if (col >= p.cols) break;
        const float4 a = values[i][0], b = values[i][1];
        const float4 v = *reinterpret_cast<const float4*>(p.weight + col), w = *reinterpret_cast<const float4*>(p.weight + col + 4);
        uint4 packed = make_uint4(0, 0, 0, 0);
        if (source >= 0) {
            packed.x = pack2<__nv_bfloat16>(a.x * scale * v.x, a.y * scale * v.y);
            packed.y = pack2<__nv_bfloat16>(a.z * scale * v.z, a.w * scale * v.w);
            packed.z = pack2<__nv_bfloat16>(b.x * scale * w.x, b.y * scale * w.y);
            packed.w = pack2<__nv_bfloat16>(b.z * scale * w.z, b.w * scale * w.w);
        }
        *reinterpret_cast<uint4*>(static_cast<char*>(p.y) + panel_chunk(row, col, p.capacity)) = packed;
    }
}
