// The router: h = RMSNorm(x), logits = W h + b from the unrounded h, the top_k greatest (ties: lowest index; NaN above all), and
// the softmax over those. `route_one` has a block for each row, `route_eight` one for eight rows, which share the reads of W.
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

// One warp: the greatest of `logits`, and their softmax.
DEVICE void choose(const Params& p, const float* logits, int row) {
    constexpr int EACH = MOST_EXPERTS / 32;
    const int lane = threadIdx.x % 32;
    uint32_t keys[EACH];
    uint32_t free = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int expert = i * 32 + lane;
        keys[i] = expert < p.experts ? order(logits[expert]) : 0;
        free |= static_cast<uint32_t>(expert < p.experts) << i;
    }
    float first = 0, sum = 0, power = 0;
    int mine = 0;
    for (int slot = 0; slot < p.top_k; ++slot) {
        uint32_t best = 0;
#pragma unroll
        for (int i = 0; i < EACH; ++i)
            if (free >> i & 1) best = max(best, keys[i]);
        best = __reduce_max_sync(~0u, best);
        uint32_t at = MOST_EXPERTS;
#pragma unroll
        for (int i = EACH - 1; i >= 0; --i)
            if ((free >> i & 1) && keys[i] == best) at = i * 32 + lane;
        at = __reduce_min_sync(~0u, at);
        if (at % 32 == lane) free &= ~(1u << at / 32);
        const float logit = logits[at];
        if (slot == 0) first = logit;
        const float e = expf(logit - first);
        sum += e;
        if (slot == lane) power = e, mine = at;
    }
    if (lane < p.top_k) {
        p.choice[row * p.top_k + lane] = mine;
        p.weight[row * p.top_k + lane] = power / sum;
    }
}

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

    float squares[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        squares[r] = 0;
        if (r >= count) continue;
        const float4* x = reinterpret_cast<const float4*>(p.x + static_cast<size_t>(base + r) * p.hidden);
        for (int chunk = thread; chunk < chunks; chunk += THREADS) {
            const float4 a = x[chunk * 2], b = x[chunk * 2 + 1];
            rows[(r * 2) * chunks + chunk] = a;
            rows[(r * 2 + 1) * chunks + chunk] = b;
            squares[r] += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w + b.x * b.x + b.y * b.y + b.z * b.z + b.w * b.w;
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        squares[r] = warp_sum(squares[r]);
        if (lane == 0) scratch[r][warp] = squares[r];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        if (r >= count) continue;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += scratch[r][w];
        const float scale = rsqrtf(sum / p.hidden + p.eps);
        __half* h = p.h + static_cast<size_t>(base + r) * p.hidden;
        const float4* norm = reinterpret_cast<const float4*>(p.norm);
        // Each thread finds what it stored itself.
        for (int chunk = thread; chunk < chunks; chunk += THREADS) {
            float4 &a = rows[(r * 2) * chunks + chunk], &b = rows[(r * 2 + 1) * chunks + chunk];
            const float4 v = __ldg(norm + chunk * 2), w = __ldg(norm + chunk * 2 + 1);
            a = make_float4(a.x * scale * v.x, a.y * scale * v.y, a.z * scale * v.z, a.w * scale * v.w);
            b = make_float4(b.x * scale * w.x, b.y * scale * w.y, b.z * scale * w.z, b.w * scale * w.w);
            const uint4 packed = make_uint4(pack2<__half>(a.x, a.y), pack2<__half>(a.z, a.w), pack2<__half>(b.x, b.y),
                                            pack2<__half>(b.z, b.w));
            if (p.fragments) {
                uint32_t* to = reinterpret_cast<uint32_t*>(h) + (chunk / 4) * 16 + chunk % 4;
                to[0] = packed.x, to[4] = packed.y, to[8] = packed.z, to[12] = packed.w;
            } else {
                reinterpret_cast<uint4*>(h)[chunk] = packed;
            }
        }
    }
    __syncthreads();

    for (int first = warp; first < p.experts; first += 2 * WARPS) {
        const bool both = first + WARPS < p.experts;
        const uint4* w0 = router + static_cast<size_t>(first) * chunks;
        const uint4* w1 = both ? w0 + static_cast<size_t>(WARPS) * chunks : w0;
        float sums[2][ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sums[0][r] = sums[1][r] = 0;
        auto add = [&](int chunk, const uint4& v0, const uint4& v1) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const float4 a = rows[(r * 2) * chunks + chunk], b = rows[(r * 2 + 1) * chunks + chunk];
                sums[0][r] = dot(sums[0][r], v0, a, b);
                sums[1][r] = dot(sums[1][r], v1, a, b);
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
            const float s0 = warp_sum(sums[0][r]), s1 = warp_sum(sums[1][r]);
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
