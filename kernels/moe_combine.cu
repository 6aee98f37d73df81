// Adds the experts' outputs to the residual stream: x[row] += sum over slots, in order, of weight[row, slot] * y[position[row, slot]].
// One block a row.
#include "common/common.cuh"

struct Params {
    float* x;             // [rows, cols]
    const void* y;        // [sorted rows, stride], float32 or bf16
    const int* position;  // [rows, slots]
    const float* weight;  // [rows, slots]
    const int* live;      // rows to do; later ones are left alone
    int cols;             // multiple of 8
    int stride;           // multiple of 8
    int slots;
};

constexpr int THREADS = 256;

DEVICE void read8(const float* y, float (&v)[8]) {
    const float4 a = *reinterpret_cast<const float4*>(y), b = *reinterpret_cast<const float4*>(y + 4);
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
DEVICE void read8(const __nv_bfloat16* y, float (&v)[8]) {
    const uint4 packed = *reinterpret_cast<const uint4*>(y);
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        v[2 * i] = __uint_as_float(words[i] << 16);
        v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

template <class T> DEVICE void moe_combine(const Params& p) {
    pdl_wait();
    pdl_launch();
    const int row = blockIdx.x;
    if (row >= *p.live) return;
    const int* position = p.position + static_cast<size_t>(row) * p.slots;
    const float* weight = p.weight + static_cast<size_t>(row) * p.slots;
    const T* y = static_cast<const T*>(p.y);
    for (int col = threadIdx.x * 8; col < p.cols; col += THREADS * 8) {
        float* x = p.x + static_cast<size_t>(row) * p.cols + col;
        float sum[8];
        read8(x, sum);
#pragma unroll 4
        for (int slot = 0; slot < p.slots; ++slot) {
            float v[8];
            read8(y + static_cast<size_t>(position[slot]) * p.stride + col, v);
            const float w = weight[slot];
#pragma unroll
            for (int i = 0; i < 8; ++i) sum[i] = fmaf(w, v[i], sum[i]);
        }
        *reinterpret_cast<float4*>(x) = make_float4(sum[0], sum[1], sum[2], sum[3]);
        *reinterpret_cast<float4*>(x + 4) = make_float4(sum[4], sum[5], sum[6], sum[7]);
    }
}

KERNEL __launch_bounds__(THREADS) moe_combine_f32(const __grid_constant__ Params p) { moe_combine<float>(p); }
KERNEL __launch_bounds__(THREADS) moe_combine_bf16(const __grid_constant__ Params p) { moe_combine<__nv_bfloat16>(p); }
