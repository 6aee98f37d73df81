// Adds the experts' outputs to the residual stream: x[row] += sum over slots, in order, of weight[row, slot] * y[position[row, slot]], or
// of y[row * slots + slot].
// On request also RMSNorm of the new x into the operand of the next layer's product, in float32 until the last rounding. One block a row.
#include "common/common.cuh"

struct Params {
    float* x;             // [rows, cols]
    const void* y;        // [sorted rows, stride], float32 or bf16
    const int* position;  // [rows, slots], or null
    const float* weight;  // [rows, slots]
    const int* live;      // rows to do; later ones are left alone
    const float* norm;    // [cols]
    void* normed;         // panels of [capacity, cols], bf16, or null
    int cols;             // multiple of 64
    int stride;           // multiple of 8
    int slots;
    int capacity;         // multiple of 8
    float eps;
};

constexpr int THREADS = 384;

constexpr int AT_ONCE = 4;  // slots whose outputs are on their way together

// Eight outputs, as they are stored.
struct Wide {
    float4 a, b;
    __device__ __forceinline__ void load(const void* y, size_t at) {
        const float4* const from = reinterpret_cast<const float4*>(static_cast<const float*>(y) + at);
        a = from[0], b = from[1];
    }
    __device__ __forceinline__ void add(float4& low, float4& high, float w) const {
        low.x = fmaf(w, a.x, low.x), low.y = fmaf(w, a.y, low.y), low.z = fmaf(w, a.z, low.z), low.w = fmaf(w, a.w, low.w);
        high.x = fmaf(w, b.x, high.x), high.y = fmaf(w, b.y, high.y), high.z = fmaf(w, b.z, high.z), high.w = fmaf(w, b.w, high.w);
    }
};
struct Narrow {
    uint4 v;
    __device__ __forceinline__ void load(const void* y, size_t at) {
        v = *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(y) + at);
    }
    __device__ __forceinline__ void add(float4& low, float4& high, float w) const {
        const auto first = [](uint32_t pair) { return __uint_as_float(pair << 16); };
        const auto second = [](uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); };
        Wide{{first(v.x), second(v.x), first(v.y), second(v.y)}, {first(v.z), second(v.z), first(v.w), second(v.w)}}.add(low, high, w);
    }
};

DEVICE float4 plus(const float4& a, const float4& b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// As in rms_norm.cu, to the bit.
DEVICE float squares(float sum, const float4& a) {
    return fmaf(a.x, a.x, fmaf(a.y, a.y, fmaf(a.z, a.z, fmaf(a.w, a.w, sum))));
}

template <class T> DEVICE void moe_combine(const Params& p) {
    // Where a norm is wanted its weight and the new row: of each eight columns the first four, then all last four. Each thread finds
    // what it stored itself.
    extern __shared__ float4 held[];
    __shared__ float scratch[THREADS / 32];
    const int row = blockIdx.x, chunks = p.cols / 8;
    float4* const norm = held + 2 * chunks;
    for (int chunk = threadIdx.x; p.normed && chunk < chunks; chunk += THREADS) {
        const float4* const from = reinterpret_cast<const float4*>(p.norm) + chunk * 2;
        norm[chunk] = __ldg(from), norm[chunks + chunk] = __ldg(from + 1);
    }
    pdl_wait();
    pdl_launch();
    int from[AT_ONCE];
    float weight[AT_ONCE];
    const auto read_slots = [&](int first) {
#pragma unroll
        for (int s = 0; s < AT_ONCE; ++s) {
            if (first + s >= p.slots) continue;
            const int at = row * p.slots + first + s;
            from[s] = p.position ? p.position[at] : at, weight[s] = p.weight[at];
        }
    };
    // With the number of live rows, not after it: there is memory for rows that are not.
    read_slots(0);
    if (row >= *p.live) return;
    float square = 0;
    for (int chunk = threadIdx.x; chunk < chunks; chunk += THREADS) {
        float4* const x = reinterpret_cast<float4*>(p.x + static_cast<size_t>(row) * p.cols + chunk * 8);
        // The sum by itself, as moe_down.cu has it of few rows.
        float4 low = make_float4(0, 0, 0, 0), high = low, old_low = x[0], old_high = x[1];
        for (int first = 0;;) {
            T of_slot[AT_ONCE];
#pragma unroll
            for (int s = 0; s < AT_ONCE; ++s)
                if (first + s < p.slots) of_slot[s].load(p.y, static_cast<size_t>(from[s]) * p.stride + chunk * 8);
#pragma unroll
            for (int s = 0; s < AT_ONCE; ++s)
                if (first + s < p.slots) of_slot[s].add(low, high, weight[s]);
            if (p.slots <= AT_ONCE) break;
            first = first + AT_ONCE < p.slots ? first + AT_ONCE : 0;
            read_slots(first);
            if (first == 0) break;
        }
        low = plus(old_low, low), high = plus(old_high, high);
        x[0] = low, x[1] = high;
        if (!p.normed) continue;
        held[chunk] = low, held[chunks + chunk] = high;
        square = squares(squares(square, low), high);
    }
    if (!p.normed) return;
    const float scale = rsqrtf(block_sum<THREADS / 32>(square, scratch) / p.cols + p.eps);
    for (int chunk = threadIdx.x; chunk < chunks; chunk += THREADS) {
        const float4 a = held[chunk], b = held[chunks + chunk], v = norm[chunk], w = norm[chunks + chunk];
        uint4 packed;
        packed.x = pack2<__nv_bfloat16>(a.x * scale * v.x, a.y * scale * v.y);
        packed.y = pack2<__nv_bfloat16>(a.z * scale * v.z, a.w * scale * v.w);
        packed.z = pack2<__nv_bfloat16>(b.x * scale * w.x, b.y * scale * w.y);
        packed.w = pack2<__nv_bfloat16>(b.z * scale * w.z, b.w * scale * w.w);
        *reinterpret_cast<uint4*>(static_cast<char*>(p.normed) + panel_chunk(row, chunk * 8, p.capacity)) = packed;
    }
}

KERNEL __launch_bounds__(THREADS, 2) moe_combine_f32(const __grid_constant__ Params p) { moe_combine<Wide>(p); }
KERNEL __launch_bounds__(THREADS, 3) moe_combine_bf16(const __grid_constant__ Params p) { moe_combine<Narrow>(p); }
