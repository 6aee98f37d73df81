// Dense products of bf16 operands, float32 sums: y[token, out] = sum over k of x[token, k] * w[out, k]. The weights are operand A
// (64 rows an instruction), the tokens operand B, both as the panel layout holds them: a bulk copy brings a tile of 64 k of either.
// On Hopper persistent blocks: one warp copies into a ring, two warpgroups multiply 64 weight rows each by up to MAX tokens. Elsewhere
// eight warps copy and multiply 16 rows each by 64 tokens, with mma.sync.
#include "common/panels.cuh"
#include "common/wgmma_more.cuh"

struct Params {
    const void* w;      // panels of [w_rows, cols], bf16
    const void* x;      // panels of [capacity, cols], bf16
    const float* bias;  // [outs] or null
    void* y;            // [tokens, stride]
    const int* live;    // tokens to do; later rows of y are left alone
    int cols;           // multiple of 64
    int w_rows;         // multiple of 8
    int outs;           // columns of y that are written, at most w_rows
    int capacity;       // multiple of 8
    int stride;
    int tokens;  // most that the grid is made for
    int group;   // token tiles that are swept together, for reuse in L2
    int height;  // tokens of a tile, a multiple of 64, where a kernel leaves it open
};

// What becomes of the sums.
enum Output { STORE_F32, STORE_BF16, ADD_F32 };

constexpr int ROWS = 128;     // weight rows of a tile
constexpr int CONSUMERS = 8;  // warps

// Tile `at` of the list: groups of some token tiles; within a group all token tiles of one weight tile, then the next.
struct Place {
    int row, token;
};
DEVICE Place place(const Params& p, int at, int row_tiles, int token_tiles, int tokens) {
    const int group = at / (row_tiles * p.group), rest = at - group * row_tiles * p.group;
    const int size = min(p.group, token_tiles - group * p.group);
    return {rest / size * ROWS, (group * p.group + rest % size) * tokens};
}

// Sums of the 16 weight rows from `row` on, of this warp, for N tokens. Of d, lane (g, t) holds at 4 j.. {row g: tokens 8 j + 2 t, + 1},
// {row g + 8: the same}.
template <int N, Output OUT> DEVICE void store(const Params& p, const float (&d)[N / 2], int row, int token, int live) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int low = row + g, high = row + g + 8;
    const bool has_low = low < p.outs, has_high = high < p.outs;
    const float bias_low = p.bias && has_low ? p.bias[low] : 0.0f, bias_high = p.bias && has_high ? p.bias[high] : 0.0f;
    if constexpr (OUT == STORE_BF16) {
        auto* y = static_cast<__nv_bfloat16*>(p.y);
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            const uint32_t a = transpose8(pack2<__nv_bfloat16>(d[4 * j] + bias_low, d[4 * j + 1] + bias_low));
            const uint32_t b = transpose8(pack2<__nv_bfloat16>(d[4 * j + 2] + bias_high, d[4 * j + 3] + bias_high));
            const int to = token + 8 * j + g, out = row + 2 * t;
            if (to >= live) continue;
            auto* line = y + static_cast<size_t>(to) * p.stride + out;
            if (out < p.outs) *reinterpret_cast<uint32_t*>(line) = a;
            if (out + 8 < p.outs) *reinterpret_cast<uint32_t*>(line + 8) = b;
        }
    } else {
        // Eight lanes of one t write the 32 bytes of a sector. An element gets one addition, so that leaving it to the L2 cache
        // keeps the order of its sum.
        auto* y = static_cast<float*>(p.y);
        const auto put = [&](int to, int out, float v) {
            float* at = y + static_cast<size_t>(to) * p.stride + out;
            if constexpr (OUT == ADD_F32)
                asm volatile("red.global.add.f32 [%0], %1;" ::"l"(at), "f"(v) : "memory");
            else
                *at = v;
        };
#pragma unroll
        for (int j = 0; j < N / 8; ++j)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int to = token + 8 * j + 2 * t + c;
                if (to < live && has_low) put(to, low, d[4 * j + c] + bias_low);
                if (to < live && has_high) put(to, high, d[4 * j + 2 + c] + bias_high);
            }
    }
}

// The portable path: 64 tokens a tile, every warp copies.
template <Output OUT> DEVICE void gemm_portable(const Params& p) {
    constexpr int TOKENS = 64, STAGES = 3, STAGE_BYTES = (ROWS + TOKENS) * 128, THREADS = CONSUMERS * 32;
    extern __shared__ __align__(1024) char shared[];
    const uint32_t stages = shared_address(shared);
    pdl_wait();
    pdl_launch();
    const int live = min(*p.live, p.tokens), steps = p.cols / 64, warp = threadIdx.x / 32;
    const int row_tiles = (p.w_rows + ROWS - 1) / ROWS, token_tiles = (live + TOKENS - 1) / TOKENS;
    for (int tile = blockIdx.x; tile < row_tiles * token_tiles; tile += gridDim.x) {
        const Place at = place(p, tile, row_tiles, token_tiles, TOKENS);
        const char* w = static_cast<const char*>(p.w) + static_cast<size_t>(at.row) * 128;
        const char* x = static_cast<const char*>(p.x) + static_cast<size_t>(at.token) * 128;
        const auto fill = [&](int step) {
            if (step < steps) {
                const uint32_t to = stages + step % STAGES * STAGE_BYTES;
                copy_lines<ROWS, THREADS>(to, w + static_cast<size_t>(step) * p.w_rows * 128, p.w_rows - at.row);
                copy_lines<TOKENS, THREADS>(to + ROWS * 128, x + static_cast<size_t>(step) * p.capacity * 128, live - at.token);
            }
            copy_commit();
        };
        // The tile before has been read.
        __syncthreads();
        fill(0);
        fill(1);
        float d[TOKENS / 8][4] = {};
        for (int step = 0; step < steps; ++step) {
            copy_wait<1>();
            __syncthreads();
            fill(step + 2);
            const uint32_t from = stages + step % STAGES * STAGE_BYTES;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                uint32_t a[4];
                load_a(a, from, warp * 16, k);
#pragma unroll
                for (int j = 0; j < TOKENS / 8; j += 2) {
                    uint32_t b[4];
                    load_b(b, from + ROWS * 128, j * 8, k);
                    mma_bf16(d[j], a[0], a[1], a[2], a[3], b[0], b[1]);
                    mma_bf16(d[j + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
                }
            }
        }
        copy_wait<0>();
        store<TOKENS, OUT>(p, reinterpret_cast<const float(&)[TOKENS / 2]>(d), at.row + warp * 16, at.token, live);
    }
}

#ifdef HOPPER

// Adds to d the products of the next `steps` stages: 64 weight rows of each warpgroup by N tokens.
template <int N, int STAGE_BYTES, class R> DEVICE void multiply(float (&d)[N / 2], R& ring, uint32_t stages, int steps) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t before = 0;
    for (int step = 0; step < steps; ++step) {
        ring.wait_full();
        const uint32_t at = stages + ring.stage * STAGE_BYTES;
        const uint64_t a = wgmma_descriptor(at + warp / 4 * 8192), b = wgmma_descriptor(at + ROWS * 128);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) Wgmma<N>::bf16(d, a + 2 * k, b + 2 * k);
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0 && lane == 0) barrier_arrive(before);
        before = ring.empty();
        ring.advance();
    }
    wgmma_wait<0>();
    wgmma_settle(d);
    if (steps > 0 && lane == 0) barrier_arrive(before);
}

template <int N, int STAGE_BYTES, Output OUT, class R> DEVICE void consume(const Params& p, R& ring, uint32_t stages, Place at, int end) {
    float d[N / 2] = {};
    multiply<N, STAGE_BYTES>(d, ring, stages, p.cols / 64);
    store<N, OUT>(p, d, at.row + threadIdx.x / 32 * 16, at.token, end);
}

template <int MAX, int STAGES, Output OUT> DEVICE void gemm(const Params& p) {
    constexpr int STAGE_BYTES = (ROWS + MAX) * 128;
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(8) uint64_t barriers[2 * STAGES];
    const uint32_t stages = shared_address(shared);
    Ring<STAGES, 1, CONSUMERS> ring(shared_address(barriers));
    if (threadIdx.x == 0) ring.init();
    __syncthreads();
    pdl_wait();
    pdl_launch();
    const int live = min(*p.live, p.tokens), steps = p.cols / 64;
    const int row_tiles = (p.w_rows + ROWS - 1) / ROWS, token_tiles = (live + p.height - 1) / p.height;
    const int tiles = row_tiles * token_tiles;
    if (threadIdx.x / 32 >= CONSUMERS) {
        registers_shrink<24>();
        global_proxy_fence();
        for (int tile = blockIdx.x; threadIdx.x == CONSUMERS * 32 && tile < tiles; tile += gridDim.x) {
            const Place at = place(p, tile, row_tiles, token_tiles, p.height);
            const uint32_t a_bytes = min(ROWS, p.w_rows - at.row) * 128;
            const uint32_t b_bytes = (min(p.height, live - at.token) + 7) / 8 * 1024;
            const char* a = static_cast<const char*>(p.w) + static_cast<size_t>(at.row) * 128;
            const char* b = static_cast<const char*>(p.x) + static_cast<size_t>(at.token) * 128;
            for (int step = 0; step < steps; ++step) {
                const uint32_t to = stages + ring.stage * STAGE_BYTES;
                ring.wait_empty();
                barrier_expect(ring.full(), a_bytes + b_bytes);
                bulk_load(to, a, a_bytes, ring.full());
                bulk_load(to + ROWS * 128, b, b_bytes, ring.full());
                ring.advance();
                a += static_cast<size_t>(p.w_rows) * 128;
                b += static_cast<size_t>(p.capacity) * 128;
            }
        }
    } else {
        registers_grow<240>();
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            const Place at = place(p, tile, row_tiles, token_tiles, p.height);
            const int tokens = min(p.height, live - at.token), end = at.token + tokens;
            // A ragged tile multiplies as few columns as an instruction for it has.
            if constexpr (MAX == 256) {
                if (tokens > 128) {
                    if (tokens > 208)
                        consume<256, STAGE_BYTES, OUT>(p, ring, stages, at, end);
                    else if (tokens > 192)
                        consume<208, STAGE_BYTES, OUT>(p, ring, stages, at, end);
                    else if (tokens > 176)
                        consume<192, STAGE_BYTES, OUT>(p, ring, stages, at, end);
                    else
                        consume<176, STAGE_BYTES, OUT>(p, ring, stages, at, end);
                    continue;
                }
            }
            if (tokens > 64)
                consume<128, STAGE_BYTES, OUT>(p, ring, stages, at, end);
            else if (MAX == 256 || tokens > 32)
                consume<64, STAGE_BYTES, OUT>(p, ring, stages, at, end);
            else
                consume<32, STAGE_BYTES, OUT>(p, ring, stages, at, end);
        }
    }
}

#define BODY(MAX, STAGES, OUT) gemm<MAX, STAGES, OUT>(p)
#else
#define BODY(MAX, STAGES, OUT)
#endif

#define DEFINE(NAME, OUT)                                                                                                          \
    KERNEL __launch_bounds__(384, 1) NAME##_128(const __grid_constant__ Params p) { BODY(128, 6, OUT); }                           \
    KERNEL __launch_bounds__(384, 1) NAME##_256(const __grid_constant__ Params p) { BODY(256, 4, OUT); }                           \
    KERNEL __launch_bounds__(256) NAME##_portable(const __grid_constant__ Params p) { gemm_portable<OUT>(p); }
DEFINE(gemm_f32, STORE_F32)
DEFINE(gemm_bf16, STORE_BF16)
DEFINE(gemm_add, ADD_F32)
