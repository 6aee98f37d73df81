// RMSNorm of the residual stream into a 16-bit operand in panel layout: y = x * rsqrt(mean(x^2) + eps) * w, in float32 until the
// last rounding. One block a row.
#include "common/common.cuh"

struct Params {
    const float* x;       // [rows, cols]
    const float* weight;  // [cols]
    void* y;              // panels of [capacity, cols], bf16 or fp16
    const int* live;      // rows to do; later ones are left alone
    const int* index;     // [rows]: the row of x that row r of y takes, -1 for a row of zeros; null is r itself
    int cols;             // multiple of 64
    int capacity;         // multiple of 8
    float eps;
};

constexpr int THREADS = 256;

template <class T> DEVICE void rms_norm(const Params& p) {
    __shared__ float scratch[THREADS / 32];
    pdl_wait();
    pdl_launch();
    const int row = blockIdx.x;
    if (row >= *p.live) return;
    const int source = p.index ? p.index[row] : row;
    if (source < 0) {
        for (int col = threadIdx.x * 8; col < p.cols; col += THREADS * 8)
            *reinterpret_cast<uint4*>(static_cast<char*>(p.y) + panel_chunk(row, col, p.capacity)) = make_uint4(0, 0, 0, 0);
        return;
    }
    const float* x = p.x + static_cast<size_t>(source) * p.cols;
    float sum = 0;
    for (int col = threadIdx.x * 8; col < p.cols; col += THREADS * 8) {
        const float4 a = *reinterpret_cast<const float4*>(x + col), b = *reinterpret_cast<const float4*>(x + col + 4);
        sum += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w + b.x * b.x + b.y * b.y + b.z * b.z + b.w * b.w;
    }
    const float scale = rsqrtf(block_sum<THREADS / 32>(sum, scratch) / p.cols + p.eps);
    for (int col = threadIdx.x * 8; col < p.cols; col += THREADS * 8) {
        const float4 a = *reinterpret_cast<const float4*>(x + col), b = *reinterpret_cast<const float4*>(x + col + 4);
        const float4 v = *reinterpret_cast<const float4*>(p.weight + col), w = *reinterpret_cast<const float4*>(p.weight + col + 4);
        uint4 packed;
        packed.x = pack2<T>(a.x * scale * v.x, a.y * scale * v.y);
        packed.y = pack2<T>(a.z * scale * v.z, a.w * scale * v.w);
        packed.z = pack2<T>(b.x * scale * w.x, b.y * scale * w.y);
        packed.w = pack2<T>(b.z * scale * w.z, b.w * scale * w.w);
        *reinterpret_cast<uint4*>(static_cast<char*>(p.y) + panel_chunk(row, col, p.capacity)) = packed;
    }
}

KERNEL __launch_bounds__(THREADS) rms_norm_bf16(const __grid_constant__ Params p) { rms_norm<__nv_bfloat16>(p); }
KERNEL __launch_bounds__(THREADS) rms_norm_fp16(const __grid_constant__ Params p) { rms_norm<__half>(p); }
