// Norms (on request) and rotates queries and keys, rounds the queries to bf16, and appends keys and values to the cache. One block a row;
// four elements of a head a lane, so that a head's maximum is a few shuffles. `kv_store` appends what is rotated already.
#include "common/attention.cuh"
#include "common/attention_heads.cuh"

struct Params {
    const float* qkv;       // [rows, (heads + 2 * kv_heads) * DIM]; pairs (i, i + DIM / 2) of q and k heads are adjacent
    __nv_bfloat16* q;       // [rows, heads * DIM], natural order
    Cache cache;
    const int* position;    // [rows]
    const int* slot;        // [rows]: page * page_size + offset; negative is nowhere
    const int* live;        // rows to do
    const float* inv_freq;  // [DIM / 2]
    HeadNorms norms;
    float mscale;           // multiplies cosine and sine
    int heads;              // of queries; 0: rows are keys and values only
};

constexpr int THREADS = 256;
template <int DIM> struct Plan {
    static constexpr int PAIRS = DIM / 2;
    static constexpr int LANES = DIM / 4;            // of a head
    static constexpr int AHEAD = DIM == 64 ? 5 : 6;  // pieces of a row that a thread has on their way: of 80 heads of 64, 48 of 128
};

template <bool FP8, int DIM> DEVICE void store(const Cache& cache, size_t token, int lane, float4 v, bool rotated) {
    constexpr int PAIRS = Plan<DIM>::PAIRS, LANES = Plan<DIM>::LANES;
    // A rotated lane has dimensions 2 * lane, 2 * lane + 1 and those half a head later; another has four in a row.
    if constexpr (FP8) {
        float amax = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
#pragma unroll
        for (int step = 1; step < LANES; step *= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, step));
        const E4m3Scale scale(amax);
        const uint32_t low = to_e4m3(v.x, v.y, scale), high = to_e4m3(v.z, v.w, scale);
        if (token == ~size_t(0)) return;
        char* line = cache.data + token * DIM;
        if (rotated) {
            *reinterpret_cast<uint16_t*>(line + 2 * lane) = static_cast<uint16_t>(low);
            *reinterpret_cast<uint16_t*>(line + PAIRS + 2 * lane) = static_cast<uint16_t>(high);
        } else {
            *reinterpret_cast<uint32_t*>(line + 4 * lane) = low | high << 16;
        }
        if (lane == 0) cache.scales[token] = scale.scale;
    } else {
        if (token == ~size_t(0)) return;
        char* line = cache.data + token * DIM * 2;
        const uint32_t low = pack2<__nv_bfloat16>(v.x, v.y), high = pack2<__nv_bfloat16>(v.z, v.w);
        if (rotated) {
            *reinterpret_cast<uint32_t*>(line + 4 * lane) = low;
            *reinterpret_cast<uint32_t*>(line + 2 * PAIRS + 4 * lane) = high;
        } else {
            *reinterpret_cast<uint2*>(line + 8 * lane) = make_uint2(low, high);
        }
    }
}

template <bool FP8, int DIM> DEVICE void kv_append(const Params& p) {
    constexpr int PAIRS = Plan<DIM>::PAIRS, LANES = Plan<DIM>::LANES, AHEAD = Plan<DIM>::AHEAD;
    __shared__ float2 turn[PAIRS];  // cosine and sine, times mscale
    __shared__ float4 weights[2][LANES];
    const int lane = threadIdx.x % LANES;
    if (p.norms.k && threadIdx.x < 2 * LANES) weights[threadIdx.x / LANES][lane] = norm_weights<DIM>(threadIdx.x < LANES ? p.norms.q : p.norms.k, lane);
    pdl_wait();
    pdl_launch();
    const int row = blockIdx.x;
    const int kv_heads = p.cache.kv_heads;
    const int units = (p.heads + 2 * kv_heads) * LANES;
    const float4* from = reinterpret_cast<const float4*>(p.qkv) + static_cast<size_t>(row) * units;
    // All reads at once, also those of a row that is not live: there is memory for it.
    float4 pieces[AHEAD];
    const auto fetch = [&](int base) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int unit = base + i * THREADS + threadIdx.x;
            pieces[i] = unit < units ? from[unit] : make_float4(0, 0, 0, 0);
        }
    };
    fetch(0);
    const int slot = p.slot[row];
    if (row >= *p.live) return;
    if (threadIdx.x < PAIRS) turn[threadIdx.x] = turn_of(p.position[row], p.inv_freq[threadIdx.x], p.mscale);
    __syncthreads();
    const float2 first = turn[2 * lane], second = turn[2 * lane + 1];
    // A head belongs to lanes of one warp, so heads are whole; all lanes stay for the shuffles.
    const auto put = [&](int unit, float4 v) {
        const int head = unit / LANES;
        const bool rotated = head < p.heads + kv_heads;
        if (p.norms.k) {
            const float4 normed = norm_head<DIM>(v, weights[head < p.heads ? 0 : 1][lane], p.norms.eps);
            if (rotated) v = normed;
        }
        if (rotated) v = rotate(v, first, second);
        if (head < p.heads) {
            uint32_t* to = reinterpret_cast<uint32_t*>(p.q + (static_cast<size_t>(row) * p.heads + head) * DIM);
            to[lane] = pack2<__nv_bfloat16>(v.x, v.y);
            to[PAIRS / 2 + lane] = pack2<__nv_bfloat16>(v.z, v.w);
        }
        if (__any_sync(~0u, head >= p.heads)) {
            size_t token = ~size_t(0);
            if (head >= p.heads && unit < units && slot >= 0) {
                const int kv_head = (head - p.heads) % kv_heads;
                token = token_of(p.cache, slot >> p.cache.page_shift, kv_head, slot & ((1 << p.cache.page_shift) - 1));
                if (!rotated) token += values_after_keys(p.cache);
            }
            store<FP8, DIM>(p.cache, token, lane, v, rotated);
        }
    };
    for (int base = 0;;) {
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (base + i * THREADS < units) put(base + i * THREADS + threadIdx.x, pieces[i]);
        base += AHEAD * THREADS;
        if (base >= units) return;
        fetch(base);
    }
}

struct StoreParams {
    const float* kv;   // [rows, 2 * kv_heads * DIM]: rotated keys, then values, in natural order
    Cache cache;
    const int* slot;   // as in Params
    const int* live;   // rows to do
};

// Only appends. Some rows a block, so that a thread has several pieces on their way.
template <bool FP8, int DIM> DEVICE void kv_store(const StoreParams& p) {
    constexpr int LANES = DIM / 4, AHEAD = 4, STEP = THREADS / LANES;  // heads at once
    pdl_wait();
    pdl_launch();
    const int live = *p.live, width = 2 * p.cache.kv_heads, lane = threadIdx.x % LANES;
    const int first = blockIdx.x * AHEAD * STEP + threadIdx.x / LANES;
    float4 pieces[AHEAD];
    int slots[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
        const int at = first + i * STEP, row = at / width;
        const bool there = row < live;
        pieces[i] = there ? reinterpret_cast<const float4*>(p.kv)[static_cast<size_t>(at) * LANES + lane] : make_float4(0, 0, 0, 0);
        slots[i] = there ? p.slot[row] : -1;
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
        const int head = (first + i * STEP) % width, slot = slots[i];
        size_t token = ~size_t(0);
        if (slot >= 0) {
            token = token_of(p.cache, slot >> p.cache.page_shift, head % p.cache.kv_heads, slot & ((1 << p.cache.page_shift) - 1));
            if (head >= p.cache.kv_heads) token += values_after_keys(p.cache);
        }
        store<FP8, DIM>(p.cache, token, lane, pieces[i], false);
    }
}

KERNEL __launch_bounds__(THREADS) kv_append_e4m3(const __grid_constant__ Params p) { kv_append<true, 64>(p); }
KERNEL __launch_bounds__(THREADS) kv_append_bf16(const __grid_constant__ Params p) { kv_append<false, 64>(p); }
KERNEL __launch_bounds__(THREADS) kv_append_e4m3_128(const __grid_constant__ Params p) { kv_append<true, 128>(p); }
KERNEL __launch_bounds__(THREADS) kv_append_bf16_128(const __grid_constant__ Params p) { kv_append<false, 128>(p); }
KERNEL __launch_bounds__(THREADS) kv_store_e4m3(const __grid_constant__ StoreParams p) { kv_store<true, 64>(p); }
KERNEL __launch_bounds__(THREADS) kv_store_bf16(const __grid_constant__ StoreParams p) { kv_store<false, 64>(p); }
KERNEL __launch_bounds__(THREADS) kv_store_e4m3_128(const __grid_constant__ StoreParams p) { kv_store<true, 128>(p); }
KERNEL __launch_bounds__(THREADS) kv_store_bf16_128(const __grid_constant__ StoreParams p) { kv_store<false, 128>(p); }
