// Of gemm_nvfp4.cu and gemm_nvfp4_few.cu: parameters, a warp's way through its strip, the products, what becomes of the sums.
#pragma once
#include "common/nvfp4.cuh"
#include "common/products.cuh"

struct Params {
    const char* w;         // NVFP4 strips of [rows, cols]
    const float* factors;  // [rows], in the order of the strips' rows
    const void* x;         // panels of [capacity, cols], bf16
    void* y;               // F32, ADD: [tokens, stride]; SWIGLU: panels of [capacity, rows / 2], bf16
    const int* live;       // tokens to do; later rows of y are left alone
    int cols;              // multiple of 64
    int rows;              // multiple of 16
    int capacity;          // multiple of 8
    int stride;
    int tokens;       // most that the grid is made for
    int output;       // an Output, where a kernel leaves it open
    int height;       // tokens of a tile, a multiple of 8
    int group;        // token tiles that are swept together, for reuse in L2
    int whole;        // row tiles that are cut by `height`; those after them by `tail`
    int tail;         // tokens of a tile, a multiple of 8
    int ahead;        // of few tokens: tiles of its first strip that a warp tells L2 of before the wait
};

// What becomes of the sums: stored, added to what is there, or rows are gates and ups.
enum Output { STORE_F32, ADD_F32, SWIGLU };

constexpr int STRIP_ROWS = 16;

DEVICE float silu(float v) {
    float power, part;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-1.4426950408889634f * v));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(part) : "f"(1.0f + power));
    return v * part;
}

// What a lane needs of a strip's 16 rows to finish their sums.
struct Rows {
    float low, high;  // factors of rows g and g + 8

    __device__ __forceinline__ Rows(const Params& p, int strip) {
        const float* at = p.factors + strip * STRIP_ROWS + threadIdx.x % 32 / 4;
        low = __ldg(at) * NV_UNIT, high = __ldg(at + 8) * NV_UNIT;
    }
};

// Stores or adds sums of one strip by eight tokens from `token` on (a multiple of 8), of which those before `end` are stored. Lane (g, t)
// has v = {row g: tokens 2 t, 2 t + 1}, {row g + 8: the same}. All lanes of a warp.
template <Output OUT> DEVICE void put(const Params& p, const float (&v)[4], int strip, int token, int end) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if constexpr (OUT == SWIGLU) {
        const float even = silu(v[0]) * v[2], odd = silu(v[1]) * v[3];
        const uint32_t pair = transpose8(pack2<__nv_bfloat16>(even, odd));
        char* to = static_cast<char*>(p.y) + panel_chunk(token + g, strip * 8, p.capacity) + 4 * t;
        if (token + g < end) *reinterpret_cast<uint32_t*>(to) = pair;
    } else {
        // Eight lanes of one t write the 32 bytes of a sector. An element gets one addition, so that leaving it to the L2 cache keeps the
        // order of its sum.
        float* y = static_cast<float*>(p.y) + static_cast<size_t>(token + 2 * t) * p.stride + strip * STRIP_ROWS + g;
#pragma unroll
        for (int c = 0; c < 2; ++c, y += p.stride) {
            if (token + 2 * t + c >= end) break;
            if constexpr (OUT == ADD_F32) {
                asm volatile("red.global.add.f32 [%0], %1;" ::"l"(y), "f"(v[c]) : "memory");
                asm volatile("red.global.add.f32 [%0], %1;" ::"l"(y + 8), "f"(v[2 + c]) : "memory");
            } else {
                y[0] = v[c], y[8] = v[2 + c];
            }
        }
    }
}

// Those of N tokens.
template <int N, Output OUT> DEVICE void store(const Params& p, const float (&d)[N / 2], Rows rows, int strip, int token, int end) {
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
        if (token + 8 * j >= end) break;
        const float v[4] = {d[4 * j] * rows.low, d[4 * j + 1] * rows.low, d[4 * j + 2] * rows.high, d[4 * j + 3] * rows.high};
        put<OUT>(p, v, strip, token + 8 * j, end);
    }
}

#ifdef HOPPER

constexpr int GROUP = 4;  // tiles of a strip that a warp has in registers ahead of their use

DEVICE uint2 load_pair(const char* p) {
    uint2 v;
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

// A lane's way through some tiles of a strip, and what it has of the next ones.
struct Weights {
    const char *codes, *scales;  // of the tile after those held
    uint4 held[GROUP];
    uint2 held_scales;  // of tile t of a group, row g and row g + 8; lane t of four hands them on

    // From tile `first` on, of `tiles`.
    __device__ __forceinline__ void enter(const char* strip, int first, int tiles) {
        const int lane = threadIdx.x % 32;
        codes = strip + first * NV_TILE_CODES + lane * 16;
        scales = strip + tiles * NV_TILE_CODES + (first + lane % 4) * NV_TILE_SCALES + lane / 4 * 8;
    }
    // The first group of `steps` tiles, which has what is left over of whole ones, if anything is.
    __device__ __forceinline__ void fill(int steps) {
        const int first = (steps - 1) % GROUP + 1;
        if (threadIdx.x % 4 < first) held_scales = load_pair(scales);
#pragma unroll
        for (int i = 0; i < GROUP; ++i)
            if (i < first) held[i] = load_streaming(codes + i * NV_TILE_CODES);
        codes += first * NV_TILE_CODES, scales += first * NV_TILE_SCALES;
    }
};

// Adds to d the products of one strip's next `steps` tiles with the next stages of N tokens. Leaves the first group of `next`, a strip
// of `steps` tiles, in `weights`, if there is one. After LAG steps of the first whole group tells `follower`, if there is one.
// `fed` is called after each step. Without STAYS the first group may be a whole one, whose products overlap; a kernel that stays with `next`
// begins with a group of its own, one product after the other: otherwise the compiler gives up overlapping them.
template <int N, int MAX, int LAG, bool STAYS, class R, class Fed>
DEVICE void multiply(float (&d)[N / 2], R& ring, Weights& weights, const char* next, uint64_t descriptor, int steps, uint32_t follower,
                     const Fed& fed) {
    const int t = threadIdx.x % 4, first = (steps - 1) % GROUP + 1, lead = STAYS ? first : steps % GROUP;
    uint32_t a[2][4][4];
    const auto product = [&](const uint32_t (&operand)[4][4]) {
        const uint64_t b = descriptor + ring.stage * (MAX * 8);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; ++i) Wgmma<N>::bf16(d, operand[i], b + 2 * i);
        wgmma_commit();
    };
    // Of a group that `done` tiles end with: where the next comes from, how many tiles it has.
    int refill;
    const auto turn = [&](int done) {
        refill = GROUP;
        if (done == steps) {
            refill = 0;
            if (next) {
                weights.enter(next, 0, steps);
                refill = first;
            }
        }
        const uint2 scales = weights.held_scales;
        if (t < refill) weights.held_scales = load_pair(weights.scales);
        return scales;
    };
    const auto scales_of = [&](uint2 scales, int i) {
        return make_uint2(__shfl_sync(~0u, scales.x, i, 4), __shfl_sync(~0u, scales.y, i, 4));
    };
    if (STAYS || lead > 0) {
        const uint2 scales = turn(lead);
        int i = 0;
        do {
            nv_dequantise(weights.held[0], scales_of(scales, i), a[0]);
#pragma unroll
            for (int j = 0; j + 1 < GROUP; ++j) weights.held[j] = weights.held[j + 1];
            ring.wait_full();
            product(a[0]);
            wgmma_wait<0>();
            give_back(ring.empty());
            ring.advance();
            fed();
        } while (++i < lead);
#pragma unroll
        for (i = 0; i < GROUP; ++i)
            if (i < refill) weights.held[i] = load_streaming(weights.codes + i * NV_TILE_CODES);
        weights.codes += refill * NV_TILE_CODES;
        weights.scales += refill * NV_TILE_SCALES;
    }
    uint32_t before = 0;
    for (int k = lead; k < steps; k += GROUP) {
        const uint2 scales = turn(k + GROUP);
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            nv_dequantise(weights.held[i], scales_of(scales, i), a[i % 2]);
            if (i < refill) weights.held[i] = load_streaming(weights.codes + i * NV_TILE_CODES);
            ring.wait_full();
            product(a[i % 2]);
            wgmma_wait<1>();
            if (i > 0 || k > lead) give_back(before);
            before = ring.empty();
            ring.advance();
            fed();
            if (i == LAG && k == lead && follower) give_back(follower);
        }
        weights.codes += refill * NV_TILE_CODES;
        weights.scales += refill * NV_TILE_SCALES;
    }
    wgmma_wait<0>();
    wgmma_settle(d);
    if (steps > lead) give_back(before);
}

// A ragged tile multiplies no more columns than the instruction made for it has.
template <int MAX, class Run> DEVICE void for_columns(int tokens, const Run& run) {
    if constexpr (MAX == 64) {
        if (tokens <= 32) run(Columns<32>{});
        else if (tokens <= 48) run(Columns<48>{});
        else run(Columns<64>{});
    } else if constexpr (MAX == 128) {
        if (tokens <= 64) run(Columns<64>{});
        else if (tokens <= 96) run(Columns<96>{});
        else run(Columns<128>{});
    } else if constexpr (MAX == 160) {
        if (tokens <= 32) run(Columns<32>{});
        else if (tokens <= 64) run(Columns<64>{});
        else if (tokens <= 96) run(Columns<96>{});
        else if (tokens <= 128) run(Columns<128>{});
        else run(Columns<160>{});
    } else {
        if (tokens <= 48) run(Columns<48>{});
        else if (tokens <= 64) run(Columns<64>{});
        else if (tokens <= 96) run(Columns<96>{});
        else if (tokens <= 128) run(Columns<128>{});
        else if (tokens <= 160) run(Columns<160>{});
        else if (tokens <= 192) run(Columns<192>{});
        else if (tokens <= 224) run(Columns<224>{});
        else run(Columns<256>{});
    }
}
#endif
