// The router: h = RMSNorm(x), logits = W h + b from the unrounded h, the top_k greatest (ties: lowest index; NaN above all), and
// the softmax over those.
//
// `route_spread` (compute capability 9.0 and newer), for few rows: eight blocks a row, a cluster, so that each holds its experts'
// weights in registers before x is there; logits meet in the first block's shared memory. `route_one`: a block a row.
// `route_eight`: a block for eight rows, which share the reads of W.
#include "common/common.cuh"

struct Params {
    const float* x;         // [rows, hidden]
    const float* norm;      // [hidden]
    const uint16_t* router; // bf16 [experts, hidden]
    const float* bias;      // [experts]
    const int* live;        // rows to do; later ones are left alone
    int* choice;            // [rows, top_k]
    float* weight;          // [rows, top_k]
    __half* h;              // [rows, hidden]
    int hidden;             // multiple of 64
    int experts;            // at most 128
    int top_k;
    int fragments;          // whether h is in fragment order (README.md), not in natural order
    float eps;
};

constexpr int WARPS = 16;
constexpr int THREADS = WARPS * 32;
constexpr int MOST_EXPERTS = 128;
constexpr int AHEAD = 4;  // chunks of W that a lane holds of each of two experts before x is there

DEVICE float low(uint32_t pair) { return __uint_as_float(pair << 16); }
DEVICE float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

DEVICE float dot(float sum, const uint4& w, const float4& a, const float4& b) {
    sum = fmaf(low(w.x), a.x, sum), sum = fmaf(high(w.x), a.y, sum);
    sum = fmaf(low(w.y), a.z, sum), sum = fmaf(high(w.y), a.w, sum);
    sum = fmaf(low(w.z), b.x, sum), sum = fmaf(high(w.z), b.y, sum);
    sum = fmaf(low(w.w), b.z, sum), sum = fmaf(high(w.w), b.w, sum);
    return sum;
}

// Greater for a greater float, greatest for NaN; -0 is below +0.
DEVICE uint32_t order(float value) {
    const uint32_t bits = __float_as_uint(value);
    if (isnan(value)) return ~0u;
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// One warp: the greatest of `logits`, and their softmax. EACH * 32 experts at most.
template <int EACH> DEVICE void choose_among(const Params& p, const float* logits, int row) {
    const int lane = threadIdx.x % 32;
    uint32_t keys[EACH];  // 0, below any float's, where there is none or it is taken
#pragma unroll
    for (int i = 0; i < EACH; ++i) keys[i] = i * 32 + lane < p.experts ? order(logits[i * 32 + lane]) : 0;
    int mine = 0;
    for (int slot = 0; slot < p.top_k; ++slot) {
        uint32_t best = keys[0], at = EACH * 32;
#pragma unroll
        for (int i = 1; i < EACH; ++i) best = max(best, keys[i]);
        best = __reduce_max_sync(~0u, best);
#pragma unroll
        for (int i = EACH - 1; i >= 0; --i)
            if (keys[i] == best) at = i * 32 + lane;
        at = __reduce_min_sync(~0u, at);
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (at == i * 32 + lane) keys[i] = 0;
        if (slot == lane) mine = at;
    }
    const float logit = logits[mine], first = __shfl_sync(~0u, logit, 0), power = expf(logit - first);
    float sum = 0;
    for (int slot = 0; slot < p.top_k; ++slot) sum += __shfl_sync(~0u, power, slot);
    if (lane >= p.top_k) return;
    p.choice[row * p.top_k + lane] = mine;
    p.weight[row * p.top_k + lane] = power / sum;
}

DEVICE void choose(const Params& p, const float* logits, int row) {
    if (p.experts <= 32) choose_among<1>(p, logits, row);
    else choose_among<MOST_EXPERTS / 32>(p, logits, row);
}

// Stores eight columns of a normed row.
DEVICE void store(const Params& p, int row, int chunk, const float4& a, const float4& b) {
    __half* const h = p.h + static_cast<size_t>(row) * p.hidden;
    const uint4 packed = make_uint4(pack2<__half>(a.x, a.y), pack2<__half>(a.z, a.w), pack2<__half>(b.x, b.y), pack2<__half>(b.z, b.w));
    if (p.fragments) {
        uint32_t* const to = reinterpret_cast<uint32_t*>(h) + (chunk / 4) * 16 + chunk % 4;
        to[0] = packed.x, to[4] = packed.y, to[8] = packed.z, to[12] = packed.w;
    } else {
        reinterpret_cast<uint4*>(h)[chunk] = packed;
    }
}

DEVICE float4 times(const float4& a, const float4& b) { return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w); }
DEVICE float4 times(const float4& a, float b) { return make_float4(a.x * b, a.y * b, a.z * b, a.w * b); }
DEVICE float squares(float sum, const float4& a) {
    return fmaf(a.x, a.x, fmaf(a.y, a.y, fmaf(a.z, a.z, fmaf(a.w, a.w, sum))));
}

#if __CUDA_ARCH__ >= 900
constexpr int SPREAD = 8;  // blocks of a cluster
constexpr int SPREAD_WARPS = 8;
constexpr int SPREAD_THREADS = SPREAD_WARPS * 32;
constexpr int GROUP = 4;  // experts at a time
constexpr int HELD = 2;   // chunks of eight columns of each that a thread holds before x is there

// The address, in the cluster's first block, of what `local` is in this one.
DEVICE uint32_t in_first(const void* local) {
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(address) : "r"(shared_address(local)));
    return address;
}

// Sums over the block, in one fixed order, for threads below N: thread i gets the sum of v[i]; the last one all threads get.
template <int N> DEVICE float sums_of_block(float (&v)[N], float (*scratch)[N], float& last) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        v[i] = warp_sum(v[i]);
        if (lane == 0) scratch[warp][i] = v[i];
    }
    __syncthreads();
    float own = 0;
    last = 0;
#pragma unroll
    for (int w = 0; w < SPREAD_WARPS; ++w) {
        own += scratch[w][min(static_cast<int>(threadIdx.x), N - 1)];
        last += scratch[w][N - 1];
    }
    return own;
}

DEVICE void route_in_cluster(const Params& p) {
    extern __shared__ __align__(128) char shared[];
    __shared__ float scratch[2][SPREAD_WARPS][GROUP + 1];
    __shared__ float logits[MOST_EXPERTS];
    __shared__ uint64_t arrived;
    const int chunks = p.hidden / 8, thread = threadIdx.x;
    const int rank = blockIdx.x % SPREAD, row = blockIdx.x / SPREAD;
    const int each = (p.experts + SPREAD - 1) / SPREAD, begin = rank * each, end = min(begin + each, p.experts);
    const uint4* const router = reinterpret_cast<const uint4*>(p.router);
    const float4* const norm = reinterpret_cast<const float4*>(p.norm);
    // x * norm, not yet scaled: of each eight columns the first four, then, after all of these, the last four, so that
    // neighbouring lanes touch neighbouring 16 bytes.
    float4* const product = reinterpret_cast<float4*>(shared);
    auto weights = [&](int expert, int chunk) {
        return expert < end ? __ldg(router + static_cast<size_t>(expert) * chunks + chunk) : make_uint4(0, 0, 0, 0);
    };

    // The first block gets all logits; its barrier must be there before another block sends.
    if (rank == 0 && thread == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&arrived)) : "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&arrived)), "r"(p.experts * 4)
                     : "memory");
    }
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    uint4 held[HELD][GROUP];
    float4 held_norm[HELD][2];
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        const int chunk = thread + i * SPREAD_THREADS;
        if (chunk >= chunks) continue;
#pragma unroll
        for (int e = 0; e < GROUP; ++e) held[i][e] = weights(begin + e, chunk);
        held_norm[i][0] = __ldg(norm + chunk * 2), held_norm[i][1] = __ldg(norm + chunk * 2 + 1);
    }
    const float held_bias = begin + thread < end ? __ldg(p.bias + begin + thread) : 0;
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    pdl_wait();
    pdl_launch();
    // Rows that are not live are there, too; their results are dropped.
    const bool live = row < *p.live;
    const float4* const x = reinterpret_cast<const float4*>(p.x + static_cast<size_t>(row) * p.hidden);
    float4 held_x[HELD][2];
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
        const int chunk = thread + i * SPREAD_THREADS;
        if (chunk < chunks) held_x[i][0] = x[chunk * 2], held_x[i][1] = x[chunk * 2 + 1];
    }

    float sums[GROUP + 1] = {}, scale;
    auto add = [&](int chunk, const uint4 (&w)[GROUP], const float4& a, const float4& b) {
#pragma unroll
        for (int e = 0; e < GROUP; ++e) sums[e] = dot(sums[e], w[e], a, b);
    };
    auto take = [&](int chunk, const uint4 (&w)[GROUP], const float4& a, const float4& b, const float4& v0, const float4& v1) {
        sums[GROUP] = squares(squares(sums[GROUP], a), b);
        const float4 low = times(a, v0), high = times(b, v1);
        product[chunk] = low, product[chunks + chunk] = high;
        add(chunk, w, low, high);
    };
    auto send = [&](int expert, float sum, float bias) {
        if (thread >= GROUP || expert >= end) return;
        asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(in_first(logits + expert)),
                     "r"(__float_as_uint(fmaf(sum, scale, bias))), "r"(in_first(&arrived))
                     : "memory");
    };
#pragma unroll
    for (int i = 0; i < HELD; ++i)
        if (thread + i * SPREAD_THREADS < chunks)
            take(thread + i * SPREAD_THREADS, held[i], held_x[i][0], held_x[i][1], held_norm[i][0], held_norm[i][1]);
#pragma unroll 1
    for (int chunk = thread + HELD * SPREAD_THREADS; chunk < chunks; chunk += SPREAD_THREADS) {
        uint4 w[GROUP];
#pragma unroll
        for (int e = 0; e < GROUP; ++e) w[e] = weights(begin + e, chunk);
        take(chunk, w, x[chunk * 2], x[chunk * 2 + 1], __ldg(norm + chunk * 2), __ldg(norm + chunk * 2 + 1));
    }
    float square;
    const float own = sums_of_block(sums, scratch[0], square);
    scale = rsqrtf(square / p.hidden + p.eps);
    send(begin + thread, own, held_bias);
    // Groups that are left, of more than 32 experts.
#pragma unroll 1
    for (int first = begin + GROUP, turn = 1; first < end; first += GROUP, turn ^= 1) {
#pragma unroll
        for (int i = 0; i < GROUP + 1; ++i) sums[i] = 0;
#pragma unroll 1
        for (int chunk = thread; chunk < chunks; chunk += SPREAD_THREADS) {
            uint4 w[GROUP];
#pragma unroll
            for (int e = 0; e < GROUP; ++e) w[e] = weights(first + e, chunk);
            add(chunk, w, product[chunk], product[chunks + chunk]);
        }
        const float sum = sums_of_block(sums, scratch[turn], square);
        send(first + thread, sum, first + thread < end ? __ldg(p.bias + first + thread) : 0);
    }
    if (live) {
        // An eighth of h each.
        for (int chunk = chunks * rank / SPREAD + thread; chunk < chunks * (rank + 1) / SPREAD; chunk += SPREAD_THREADS)
            store(p, row, chunk, times(product[chunk], scale), times(product[chunks + chunk], scale));
    }
    if (rank != 0 || thread >= 32) return;
    uint32_t done = 0;
    while (!done) {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(shared_address(&arrived))
                     : "memory");
    }
    if (live) choose(p, logits, row);
}
#endif

template <int ROWS> DEVICE void route(const Params& p) {
    extern __shared__ __align__(128) char shared[];
    __shared__ float scratch[ROWS][WARPS];
    __shared__ float logits[ROWS][MOST_EXPERTS];
    const int chunks = p.hidden / 8, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    // Normed rows: of each 8 columns the first four, then, after all of these, the last four, so that neighbouring lanes read
    // neighbouring 16 bytes.
    float4* const rows = reinterpret_cast<float4*>(shared);
    const uint4* const router = reinterpret_cast<const uint4*>(p.router);

    // Weights only, before the wait: all of W on its way to L2, the first chunks to registers.
    uint4 ahead[2][AHEAD];
    if (ROWS == 1) {
        const int bytes = p.experts * p.hidden * 2;
        for (int at = thread * 128; at < bytes; at += THREADS * 128)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(reinterpret_cast<const char*>(p.router) + at));
#pragma unroll
        for (int e = 0; e < 2; ++e)
#pragma unroll
            for (int i = 0; i < AHEAD; ++i) {
                const int expert = warp + e * WARPS, chunk = lane + i * 32;
                ahead[e][i] = make_uint4(0, 0, 0, 0);
                if (expert < p.experts && chunk < chunks)
                    ahead[e][i] = __ldg(router + static_cast<size_t>(expert) * chunks + chunk);
            }
    }
    pdl_wait();
    pdl_launch();
    const int base = blockIdx.x * ROWS, live = *p.live, count = min(ROWS, live - base);
    if (count <= 0) return;

    float sums[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        sums[r] = 0;
        if (r >= count) continue;
        const float4* x = reinterpret_cast<const float4*>(p.x + static_cast<size_t>(base + r) * p.hidden);
        for (int chunk = thread; chunk < chunks; chunk += THREADS) {
            const float4 a = x[chunk * 2], b = x[chunk * 2 + 1];
            rows[(r * 2) * chunks + chunk] = a;
            rows[(r * 2 + 1) * chunks + chunk] = b;
            sums[r] = squares(squares(sums[r], a), b);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        sums[r] = warp_sum(sums[r]);
        if (lane == 0) scratch[r][warp] = sums[r];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        if (r >= count) continue;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += scratch[r][w];
        const float scale = rsqrtf(sum / p.hidden + p.eps);
        const float4* norm = reinterpret_cast<const float4*>(p.norm);
        // Each thread finds what it stored itself.
        for (int chunk = thread; chunk < chunks; chunk += THREADS) {
            float4 &a = rows[(r * 2) * chunks + chunk], &b = rows[(r * 2 + 1) * chunks + chunk];
            a = times(times(a, __ldg(norm + chunk * 2)), scale);
            b = times(times(b, __ldg(norm + chunk * 2 + 1)), scale);
            store(p, base + r, chunk, a, b);
        }
    }
    __syncthreads();

    for (int first = warp; first < p.experts; first += 2 * WARPS) {
        const bool both = first + WARPS < p.experts;
        const uint4* w0 = router + static_cast<size_t>(first) * chunks;
        const uint4* w1 = both ? w0 + static_cast<size_t>(WARPS) * chunks : w0;
        float dots[2][ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) dots[0][r] = dots[1][r] = 0;
        auto add = [&](int chunk, const uint4& v0, const uint4& v1) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const float4 a = rows[(r * 2) * chunks + chunk], b = rows[(r * 2 + 1) * chunks + chunk];
                dots[0][r] = dot(dots[0][r], v0, a, b);
                dots[1][r] = dot(dots[1][r], v1, a, b);
            }
        };
        int chunk = lane;
        if (ROWS == 1 && first == warp) {
#pragma unroll
            for (int i = 0; i < AHEAD; ++i, chunk += 32)
                if (chunk < chunks) add(chunk, ahead[0][i], ahead[1][i]);
        }
#pragma unroll 4
        for (; chunk < chunks; chunk += 32) add(chunk, __ldg(w0 + chunk), __ldg(w1 + chunk));
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const float s0 = warp_sum(dots[0][r]), s1 = warp_sum(dots[1][r]);
            if (lane == 0) {
                logits[r][first] = s0 + __ldg(p.bias + first);
                if (both) logits[r][first + WARPS] = s1 + __ldg(p.bias + first + WARPS);
            }
        }
    }
    __syncthreads();
    if (warp < count) choose(p, logits[warp], base + warp);
}

KERNEL __launch_bounds__(THREADS) route_one(const __grid_constant__ Params p) { route<1>(p); }
KERNEL __launch_bounds__(THREADS) route_eight(const __grid_constant__ Params p) { route<8>(p); }

#if __CUDA_ARCH__ >= 900
KERNEL __cluster_dims__(SPREAD) __launch_bounds__(SPREAD_THREADS, 2) route_spread(const __grid_constant__ Params p) {
    route_in_cluster(p);
}
#else
KERNEL route_spread(const __grid_constant__ Params p) {}
#endif
