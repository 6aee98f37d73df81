// RMSNorm of the residual stream into the experts' operand: y[position[row, slot]] = x[row] * rsqrt(mean(x[row]^2) + eps) * w for every
// slot, fp16 panels, in float32 until the last rounding. One block a row. Padding rows among the sorted ones keep what they hold: the
// products of a row depend on no other row, and nobody reads theirs.
#include "common/common.cuh"

struct Params {
    const float* x;       // [rows, cols]
    const float* weight;  // [cols]
    void* y;              // panels of [capacity, cols], fp16
    const int* position;  // [rows, slots]: rows of y
    const int* live;      // rows to do
    int cols;             // multiple of 64, at most CHUNKS * THREADS * 8
    int capacity;         // multiple of 8
    int slots;
    float eps;
};

constexpr int THREADS = 192, CHUNKS = 6;

KERNEL __launch_bounds__(THREADS) moe_scatter(const __grid_constant__ Params p) {
    __shared__ float scratch[THREADS / 32];
    pdl_wait();
    pdl_launch();
    const int row = blockIdx.x;
    if (row >= *p.live) return;
    const float* x = p.x + static_cast<size_t>(row) * p.cols;
    float4 values[CHUNKS][2];
    float sum = 0;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        const int col = (i * THREADS + threadIdx.x) * 8;
        if (col >= p.cols) break;
        const float4 a = values[i][0] = *reinterpret_cast<const float4*>(x + col);
        const float4 b = values[i][1] = *reinterpret_cast<const float4*>(x + col + 4);
        sum += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w + b.x * b.x + b.y * b.y + b.z * b.z + b.w * b.w;
    }
    const float scale = rsqrtf(block_sum<THREADS / 32>(sum, scratch) / p.cols + p.eps);
    const int* position = p.position + static_cast<size_t>(row) * p.slots;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        const int col = (i * THREADS + threadIdx.x) * 8;
        if (col >= p.cols) break;
        const float4 a = values[i][0], b = values[i][1];
        const float4 v = *reinterpret_cast<const float4*>(p.weight + col), w = *reinterpret_cast<const float4*>(p.weight + col + 4);
        uint4 packed;
        packed.x = pack2<__half>(a.x * scale * v.x, a.y * scale * v.y);
        packed.y = pack2<__half>(a.z * scale * v.z, a.w * scale * v.w);
        packed.z = pack2<__half>(b.x * scale * w.x, b.y * scale * w.y);
        packed.w = pack2<__half>(b.z * scale * w.z, b.w * scale * w.w);
        for (int slot = 0; slot < p.slots; ++slot)
            *reinterpret_cast<uint4*>(static_cast<char*>(p.y) + panel_chunk(position[slot], col, p.capacity)) = packed;
    }
}
