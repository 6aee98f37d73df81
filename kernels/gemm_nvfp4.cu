// Dense products of NVFP4 weights by bf16 tokens, float32 sums: y[token, row] = factor[row] * sum over k of x[token, k] * w[row, k]. The
// weights are operand A of wgmma from registers: a warp turns the 16 rows of a strip into bf16, block scale multiplied in (exactly), while
// the products of the 64 columns before run; each lane loads its own codes, four tiles ahead of their use. The tokens, panels, are operand
// B, which one more warp copies in bulk. Blocks stay, and take tiles of W quads (of four strips, 64 rows) by some tokens in turn, over all
// columns; gemm_nvfp4_few.cu shares columns. The portable path has mma.sync.
#include "common/gemm_nvfp4.cuh"
#include "common/wgmma_more.cuh"

// A tile: quads from `quad` on, tokens from `token` on, and how many.
struct Place {
    int quad, token, tokens;
};
// What there is of tiles of QUADS quads: those of the first row tiles, cut by `height`, then those of the last ones, cut by `tail`. Of the first,
// groups of some token tiles; within a group all token tiles of one row tile, then the next.
template <int QUADS> struct Tiles {
    int live, quads, whole, rest, high, low, count;

    __device__ __forceinline__ Tiles(const Params& p, int live) : live(live), quads((p.rows + 63) / 64) {
        const int row_tiles = (quads + QUADS - 1) / QUADS;
        whole = min(p.whole, row_tiles), rest = row_tiles - whole;
        high = (live + p.height - 1) / p.height, low = (live + p.tail - 1) / p.tail;
        count = whole * high + rest * low;
    }
    __device__ __forceinline__ Place at(const Params& p, int tile) const {
        if (tile >= whole * high) {
            const int token = (tile - whole * high) % low * p.tail;
            return {(whole + (tile - whole * high) / low) * QUADS, token, min(p.tail, live - token)};
        }
        const int group = tile / (whole * p.group), inside = tile - group * whole * p.group;
        const int size = min(p.group, high - group * p.group), token = (group * p.group + inside % size) * p.height;
        return {inside / size * QUADS, token, min(p.height, live - token)};
    }
};

constexpr int STRIPS = 8;  // of a tile of the portable path, one a warp

// The portable path: 64 tokens a tile, every warp copies.
template <Output OUT> DEVICE void gemm_nvfp4_portable(const Params& p) {
    constexpr int TOKENS = 64, STAGES = 4, STAGE_BYTES = TOKENS * 128, THREADS = STRIPS * 32;
    extern __shared__ __align__(1024) char shared[];
    const uint32_t stages = shared_address(shared);
    pdl_wait();
    pdl_launch();
    const int live = min(*p.live, p.tokens), steps = p.cols / 64, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Tiles<STRIPS / 4> tiles(p, live);
    for (int tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
        const Place at = tiles.at(p, tile);
        const int strip = at.quad * 4 + warp;
        const bool real = strip * STRIP_ROWS < p.rows;
        const char* weights = p.w + (real ? strip : 0) * nv_strip_bytes(steps);
        const char* codes = weights + lane * 16;
        const char* scales = weights + steps * NV_TILE_CODES + lane / 4 * 8;
        const char* x = static_cast<const char*>(p.x) + static_cast<size_t>(at.token) * 128;
        const auto fill = [&](int step) {
            if (step < steps)
                copy_lines<TOKENS, THREADS>(stages + step % STAGES * STAGE_BYTES, x + static_cast<size_t>(step) * p.capacity * 128, at.tokens);
            copy_commit();
        };
        // The tile before has been read.
        __syncthreads();
        fill(0);
        fill(1);
        uint4 words = load_streaming(codes);
        uint2 scale = *reinterpret_cast<const uint2*>(scales);
        float d[TOKENS / 8][4] = {};
        for (int step = 0; step < steps; ++step) {
            uint32_t a[4][4];
            nv_dequantise(words, scale, a);
            if (step + 1 < steps) {
                words = load_streaming(codes + (step + 1) * NV_TILE_CODES);
                scale = *reinterpret_cast<const uint2*>(scales + (step + 1) * NV_TILE_SCALES);
            }
            copy_wait<1>();
            __syncthreads();
            fill(step + 2);
#pragma unroll
            for (int k = 0; k < 4; ++k)
#pragma unroll
                for (int j = 0; j < TOKENS / 8; j += 2) {
                    uint32_t b[4];
                    load_b(b, stages + step % STAGES * STAGE_BYTES, j * 8, k);
                    mma_bf16(d[j], a[k][0], a[k][1], a[k][2], a[k][3], b[0], b[1]);
                    mma_bf16(d[j + 1], a[k][0], a[k][1], a[k][2], a[k][3], b[2], b[3]);
                }
        }
        copy_wait<0>();
        if (real)
            store<TOKENS, OUT>(p, reinterpret_cast<const float(&)[TOKENS / 2]>(d), Rows(p, strip), strip, at.token, at.token + at.tokens);
    }
}

#ifdef HOPPER

// Shape of a kernel: W consumer warpgroups, tiles of up to MAX tokens, stages of the ring; a warpgroup starts a tile LAG steps of a group
// after the one before it, so that one stores while the others multiply (not if LAG < 0).
template <int W_, int MAX_, int STAGES_, int LAG_, int REGISTERS_> struct Shape {
    static constexpr int W = W_, MAX = MAX_, STAGES = STAGES_, LAG = LAG_, REGISTERS = REGISTERS_;
    using Activations = Ring<STAGES, 1, 4 * W>;
};

// Of few tokens all that there may be are multiplied, so that nothing waits to hear of the live ones.
DEVICE bool is_few(const Params& p) { return p.tokens <= 256; }

template <class S, Output OUT> DEVICE void consume(const Params& p, typename S::Activations ring, uint32_t stages, uint32_t turns) {
    const int group = uniform(threadIdx.x / 128), warp = uniform(threadIdx.x / 32 % 4);
    const int strips = p.rows / STRIP_ROWS, steps = p.cols / 64;
    const auto strip_at = [&](int quad) { return min((quad + group) * 4 + warp, strips - 1); };
    const auto address = [&](int strip) { return p.w + strip * nv_strip_bytes(steps); };
    if (!is_few(p)) pdl_wait();
    const Tiles<S::W> tiles(p, is_few(p) ? p.tokens : uniform(min(*p.live, p.tokens)));
    int tile = blockIdx.x;
    if (tile >= tiles.count) return;
    Place now = tiles.at(p, tile);
    Weights weights;
    weights.enter(address(strip_at(now.quad)), 0, steps);
    weights.fill(steps);
    if (p.ahead > 0) {
        const char* from = address(strip_at(now.quad));
        prefetch(from, min(p.ahead, steps) * NV_TILE_CODES);
        prefetch(from + steps * NV_TILE_CODES, min(p.ahead, steps) * NV_TILE_SCALES);
    }
    pdl_launch();
    if (is_few(p)) pdl_wait();
    const int live = min(*p.live, p.tokens);
    const bool lags = S::LAG >= 0 && steps > 2 * S::STAGES;
    const uint32_t follower = lags && group + 1 < S::W ? turns + 8 * group + 8 : 0;
    uint32_t turn = 0;
    while (tile < tiles.count) {
        if (lags && group > 0) {
            barrier_wait(turns + 8 * group, turn);
            turn ^= 1;
        }
        const int strip = strip_at(now.quad);
        const bool mine = now.quad + group < tiles.quads, real = (now.quad + group) * 4 + warp < strips;
        const int token = now.token, end = token + now.tokens;
        tile += gridDim.x;
        if (tile < tiles.count) now = tiles.at(p, tile);
        const char* next = address(strip_at(now.quad));
        if (mine) {
            for_columns<S::MAX>(end - token, [&](auto columns) {
                constexpr int N = columns.value;
                const Rows rows(p, strip);
                float d[N / 2] = {};
                multiply<N, S::MAX, S::LAG, true>(d, ring, weights, next, wgmma_descriptor(stages), steps, follower, [] {});
                if (real) store<N, OUT>(p, d, rows, strip, token, min(end, live));
            });
        } else {
            if (follower) give_back(follower);
            for (int k = 0; k < steps; ++k) {
                ring.wait_full();
                give_back(ring.empty());
                ring.advance();
            }
            weights.enter(next, 0, steps);
            weights.fill(steps);
        }
    }
}

template <class S, Output OUT> DEVICE void gemm_nvfp4(const Params& p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(8) uint64_t barriers[2 * S::STAGES + S::W];
    const uint32_t turns = shared_address(barriers + 2 * S::STAGES), stages = shared_address(shared);
    typename S::Activations ring(shared_address(barriers));
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::W; ++i) barrier_init(turns + 8 * i, 4);
        ring.init();
    }
    __syncthreads();
    if (uniform(threadIdx.x / 128) >= S::W) {
        registers_shrink<S::W == 2 ? 40 : 32>();
        if (threadIdx.x != S::W * 128) return;
        pdl_launch();
        pdl_wait();
        global_proxy_fence();
        const int steps = p.cols / 64;
        const Tiles<S::W> tiles(p, is_few(p) ? p.tokens : min(*p.live, p.tokens));
        for (int tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
            const Place at = tiles.at(p, tile);
            const uint32_t bytes = (at.tokens + 7) / 8 * 1024;
            const char* x = static_cast<const char*>(p.x) + static_cast<size_t>(at.token) * 128;
            for (int k = 0; k < steps; ++k) {
                ring.wait_empty();
                barrier_expect(ring.full(), bytes);
                bulk_load(stages + ring.stage * (S::MAX * 128), x, bytes, ring.full());
                x += static_cast<size_t>(p.capacity) * 128;
                ring.advance();
            }
        }
    } else {
        registers_grow<S::REGISTERS>();
        consume<S, OUT>(p, ring, stages, turns);
    }
}
using Low = Shape<4, 64, 24, -1, 112>;
using Middle = Shape<3, 160, 11, -1, 160>;
using High = Shape<2, 256, 7, 1, 232>;
#define BODY(SHAPE, OUT) gemm_nvfp4<SHAPE, OUT>(p)
#else
#define BODY(SHAPE, OUT)
#endif

#define DEFINE(NAME, OUT)                                                                                      \
    KERNEL __launch_bounds__(640, 1) NAME##_64(const __grid_constant__ Params p) { BODY(Low, OUT); }           \
    KERNEL __launch_bounds__(512, 1) NAME##_160(const __grid_constant__ Params p) { BODY(Middle, OUT); }       \
    KERNEL __launch_bounds__(384, 1) NAME##_256(const __grid_constant__ Params p) { BODY(High, OUT); }         \
    KERNEL __launch_bounds__(256) NAME##_portable(const __grid_constant__ Params p) { gemm_nvfp4_portable<OUT>(p); }
DEFINE(gemm_nvfp4_f32, STORE_F32)
DEFINE(gemm_nvfp4_add, ADD_F32)
DEFINE(gemm_nvfp4_swiglu, SWIGLU)
