// The experts' products for rows sorted by expert (moe_sort): gate and up with SwiGLU, and down. Weights are MXFP4 strips, operand A of
// wgmma from registers: a warp turns the 16 rows of a strip into fp16, block scale multiplied in, while the products of the 64 columns
// before run; each lane loads its own codes, four tiles ahead of their use. Activations are fp16 panels, operand B, which one more warp
// copies in bulk. The portable path has mma.sync.
//
// Range: a row's weights are taken relative to its largest block scale, R: code * 2^(s - R + 1) in fp16 (at most 12; exact down to
// s = R - 24, then fading), and the sum is multiplied by 2^(R - 128) in float32.
#include "common/moe_gemm.cuh"
#include "common/products.cuh"

struct ExponentParams {
    const char* w;
    unsigned char* exponents;
    int cols;
    int strips;  // of all experts
};

// R of every row: the largest scale byte, at least 2 so that 2^(R - 128) is a normal number. A warp a strip.
KERNEL __launch_bounds__(128) moe_exponents(const __grid_constant__ ExponentParams p) {
    pdl_wait();
    pdl_launch();
    const int strip = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32, tiles = p.cols / TILE_COLS;
    if (strip >= p.strips) return;
    const char* scales = p.w + strip * strip_bytes(tiles) + tiles * TILE_CODES;
    uint32_t most = 0x02020202;
    for (int at = lane; at < tiles * 8; at += 32) most = __vmaxu4(most, reinterpret_cast<const uint32_t*>(scales)[at]);
    most = __vmaxu4(most, most >> 16);
    most = __vmaxu4(most, __shfl_xor_sync(~0u, most, 8));
    most = __vmaxu4(most, __shfl_xor_sync(~0u, most, 16));
    if (lane < 8) {
        p.exponents[strip * STRIP_ROWS + lane] = most & 255;
        p.exponents[strip * STRIP_ROWS + lane + 8] = most >> 8 & 255;
    }
}

constexpr int STRIPS = 8;  // of a tile of the portable path, one a warp

DEVICE int row_tiles_of(const Params& p) { return (p.rows + STRIPS * STRIP_ROWS - 1) / (STRIPS * STRIP_ROWS); }

// The portable path: a tile's rows by 64 at a time.
template <Output OUT> DEVICE void moe_gemm_portable(const Params& p) {
    constexpr int TOKENS = 64, STAGES = 4, STAGE_BYTES = TOKENS * 128, THREADS = STRIPS * 32;
    extern __shared__ __align__(1024) char shared[];
    const uint32_t stages = shared_address(shared);
    pdl_wait();
    pdl_launch();
    const int row_tiles = row_tiles_of(p), steps = p.cols / TILE_COLS, work = *p.count * row_tiles, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int at = blockIdx.x; at < work; at += gridDim.x) {
        const int4 tile = p.tiles[at / row_tiles];
        const int strip = at % row_tiles * STRIPS + warp;
        const bool real = strip * STRIP_ROWS < p.rows;
        const size_t row = static_cast<size_t>(tile.x) * p.rows + (real ? strip * STRIP_ROWS : 0);
        const uint32_t offsets = scale_offsets(p.exponents[row + lane / 4], p.exponents[row + 8 + lane / 4]);
        const float* bias = p.bias + row + lane / 4 * (OUT == SWIGLU ? 2 : 1);
        const char* codes = p.w + row / STRIP_ROWS * strip_bytes(steps) + lane * 16;
        const char* scales = p.w + row / STRIP_ROWS * strip_bytes(steps) + steps * TILE_CODES + lane / 4 * 4;
        for (int done = 0; done < tile.z; done += TOKENS) {
            const char* x = static_cast<const char*>(p.x) + static_cast<size_t>(tile.y + done) * 128;
            const auto fill = [&](int step) {
                if (step < steps)
                    copy_lines<TOKENS, THREADS>(stages + step % STAGES * STAGE_BYTES, x + static_cast<size_t>(step) * p.capacity * 128,
                                                tile.z - done);
                copy_commit();
            };
            // The piece before has been read.
            __syncthreads();
            fill(0);
            fill(1);
            uint4 words = load_streaming(codes);
            uint32_t scale = *reinterpret_cast<const uint32_t*>(scales);
            float d[TOKENS / 8][4] = {};
            for (int step = 0; step < steps; ++step) {
                uint32_t a[4][4];
                dequantise(words, scale, offsets, a);
                if (step + 1 < steps) {
                    words = load_streaming(codes + (step + 1) * TILE_CODES);
                    scale = *reinterpret_cast<const uint32_t*>(scales + (step + 1) * TILE_SCALES);
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
                        mma_fp16(d[j], a[k][0], a[k][1], a[k][2], a[k][3], b[0], b[1]);
                        mma_fp16(d[j + 1], a[k][0], a[k][1], a[k][2], a[k][3], b[2], b[3]);
                    }
            }
            copy_wait<0>();
            if (real)
                store<TOKENS, OUT>(p, reinterpret_cast<const float(&)[TOKENS / 2]>(d), strip, tile.y + done, tile.z - done, offsets,
                                   bias[0], bias[OUT == SWIGLU ? 1 : 8]);
        }
    }
}

#ifdef HOPPER

constexpr int GROUP = 4;  // tiles of a strip that a warp has in registers ahead of their use

// What a block multiplies at a time: up to W warpgroups' quads (of four strips, 64 rows) of one expert with the rows of one tile. Blocks
// take such pieces in turn, so that those that run together share activations and weights in L2.
template <int W> struct Work {
    int at, end, quads, each;  // place in the list of pieces, its end; quads of an expert, pieces of a tile

    __device__ __forceinline__ Work(int rows, int tiles) : at(blockIdx.x), quads((rows + 63) / 64) {
        each = (quads + W - 1) / W, end = tiles * each;
    }
    __device__ __forceinline__ bool more() const { return at < end; }
    __device__ __forceinline__ void advance() { at += gridDim.x; }
    __device__ __forceinline__ int tile() const { return at / each; }
    __device__ __forceinline__ int quad() const { return at % each * W; }
    // Those of an expert's last piece may be fewer.
    __device__ __forceinline__ int count() const { return min(W, quads - quad()); }
};

// A lane's way through a strip, and what it has of the next tiles.
struct Weights {
    const char *codes, *scales;  // of the tile after those held
    uint4 held[GROUP];
    uint32_t held_scales;  // of tile t of a group, row g and row g + 8; lane t of four hands them on

    __device__ __forceinline__ void enter(const char* strip, int steps) {
        const int lane = threadIdx.x % 32;
        codes = strip + lane * 16;
        scales = strip + steps * TILE_CODES + lane % 4 * TILE_SCALES + lane / 4 * 4;
    }
};

DEVICE uint32_t load_word(const char* p) {
    uint32_t v;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
DEVICE int load_byte(const unsigned char* p) {
    uint32_t v;
    asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
DEVICE float load_float(const float* p) {
    float v;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(v) : "l"(p));
    return v;
}

// Shape of a kernel. W consumer warpgroups; tiles of up to MAX rows; stages of the ring, and tiles of 64 columns of a stage; groups that L2 is
// told of ahead of the loads.
template <int W_, int MAX_, int STAGES_, int SPAN_, int AHEAD_, int LAG_, int REGISTERS_> struct Shape {
    static constexpr int LAG = LAG_, W = W_, MAX = MAX_, STAGES = STAGES_, SPAN = SPAN_, AHEAD = AHEAD_, REGISTERS = REGISTERS_;
    static constexpr int STAGE_BYTES = SPAN * MAX * 128;
    using Activations = Ring<STAGES, 1, 4 * W>;
};

// The sums of one strip and a tile's rows, over all columns. The first group has what is left over of whole ones. Leaves the first group of
// the next strip in `weights`.
template <int N, class S>
DEVICE void multiply(float (&d)[N / 2], typename S::Activations& ring, Weights& weights, const char* here, const char* next,
                     uint64_t descriptor, int steps, uint32_t offsets, uint32_t follower) {
    const int t = threadIdx.x % 4, first = (steps - 1) % GROUP + 1;
    uint32_t a[2][4][4];
    const auto product = [&](const uint32_t (&operand)[4][4], int part) {
        const uint64_t b = descriptor + (ring.stage * (S::STAGE_BYTES / 16) + part * (S::MAX * 8));
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; ++i) Wgmma<N>::fp16(d, operand[i], b + 2 * i);
        wgmma_commit();
    };
    // Of a group that `done` tiles end with: where the next comes from, how many tiles it has.
    int refill;
    const auto turn = [&](int done) {
        refill = GROUP;
        if (done == steps) {
            weights.enter(next, steps);
            refill = first;
        }
        const uint32_t scales = weights.held_scales;
        if (t < refill) weights.held_scales = load_word(weights.scales);
        return scales;
    };
    {
        const uint32_t scales = turn(first);
        int i = 0;
        do {
            dequantise(weights.held[0], __shfl_sync(~0u, scales, i, 4), offsets, a[0]);
#pragma unroll
            for (int j = 0; j + 1 < GROUP; ++j) weights.held[j] = weights.held[j + 1];
            if (S::SPAN == 1 || i == 0) ring.wait_full();
            product(a[0], S::SPAN == 1 ? 0 : i);
            wgmma_wait<0>();
            if (S::SPAN == 1) {
                give_back(ring.empty());
                ring.advance();
            }
        } while (++i < first);
        if (S::SPAN > 1) {
            give_back(ring.empty());
            ring.advance();
        }
#pragma unroll
        for (i = 0; i < GROUP; ++i)
            if (i < refill) weights.held[i] = load_streaming(weights.codes + i * TILE_CODES);
        weights.codes += refill * TILE_CODES;
        weights.scales += refill * TILE_SCALES;
    }
    uint32_t before = 0;
    for (int k = first; k < steps; k += GROUP) {
        if constexpr (S::AHEAD > 0) {
            const int at = k + GROUP * (1 + S::AHEAD) - steps;
            if (at < 0)
                prefetch(here + (k + GROUP * (1 + S::AHEAD)) * TILE_CODES, GROUP * TILE_CODES);
            else if (at + first + GROUP <= steps)
                prefetch(next + (at > 0 ? at + first : 0) * TILE_CODES, (at > 0 ? GROUP : GROUP + first) * TILE_CODES);
            if (k == first) prefetch(next + steps * TILE_CODES, steps * TILE_SCALES);
        }
        const uint32_t scales = turn(k + GROUP);
#pragma unroll
        for (int i = 0; i < GROUP; ++i) {
            dequantise(weights.held[i], __shfl_sync(~0u, scales, i, 4), offsets, a[i % 2]);
            if (i < refill) weights.held[i] = load_streaming(weights.codes + i * TILE_CODES);
            if (i % S::SPAN == 0) ring.wait_full();
            product(a[i % 2], i % S::SPAN);
            wgmma_wait<1>();
            if (i % S::SPAN == 0) {
                if (i > 0 || k > first) give_back(before);
                before = ring.empty();
            }
            if ((i + 1) % S::SPAN == 0) ring.advance();
            if (i == S::LAG && k == first && follower) give_back(follower);
        }
        weights.codes += refill * TILE_CODES;
        weights.scales += refill * TILE_SCALES;
    }
    wgmma_wait<0>();
    wgmma_settle(d);
    if (steps > first) give_back(before);
}

// A ragged tile multiplies no more columns than the instruction made for it has.
template <class S, class Run> DEVICE void for_columns(int rows, const Run& run) {
    if constexpr (S::MAX == 64) {
        if (rows <= 8) run(Columns<8>{});
        else if (rows <= 16) run(Columns<16>{});
        else if (rows <= 24) run(Columns<24>{});
        else if (rows <= 32) run(Columns<32>{});
        else if (rows <= 48) run(Columns<48>{});
        else run(Columns<64>{});
    } else if constexpr (S::MAX == 160) {
        if (rows <= 32) run(Columns<32>{});
        else if (rows <= 64) run(Columns<64>{});
        else if (rows <= 80) run(Columns<80>{});
        else if (rows <= 96) run(Columns<96>{});
        else if (rows <= 112) run(Columns<112>{});
        else if (rows <= 128) run(Columns<128>{});
        else if (rows <= 144) run(Columns<144>{});
        else run(Columns<160>{});
    } else {
        if (rows <= 64) run(Columns<64>{});
        else if (rows <= 96) run(Columns<96>{});
        else if (rows <= 128) run(Columns<128>{});
        else if (rows <= 160) run(Columns<160>{});
        else if (rows <= 192) run(Columns<192>{});
        else if (rows <= 224) run(Columns<224>{});
        else run(Columns<256>{});
    }
}

template <class S, Output OUT> DEVICE void consume(const Params& p, typename S::Activations ring, uint32_t stages, uint32_t turns) {
    const int group = uniform(threadIdx.x / 128), warp = uniform(threadIdx.x / 32 % 4), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int strips = p.rows / STRIP_ROWS, steps = p.cols / TILE_COLS;
    Weights weights;
    const auto strip_of = [&](int expert, int strip) { return p.w + (static_cast<size_t>(expert) * strips + strip) * strip_bytes(steps); };
    const auto fill = [&](const char* strip) {
        const int first = (steps - 1) % GROUP + 1;
        weights.enter(strip, steps);
        if (t < first) weights.held_scales = load_word(weights.scales);
#pragma unroll
        for (int i = 0; i < GROUP; ++i)
            if (i < first) weights.held[i] = load_streaming(weights.codes + i * TILE_CODES);
        weights.codes += first * TILE_CODES, weights.scales += first * TILE_SCALES;
    };
    if (S::AHEAD > 0) {
        // Before the list of tiles is there: what it will be if every expert has one.
        const Work<S::W> likely(p.rows, p.experts);
        const int expert = min(likely.tile(), p.experts - 1);
        const char* codes = strip_of(expert, min((likely.quad() + group) * 4 + warp, strips - 1));
        prefetch(codes, min(steps, GROUP * (1 + S::AHEAD)) * TILE_CODES);
        prefetch(codes + steps * TILE_CODES, steps * TILE_SCALES);
    }
    pdl_wait();
    pdl_launch();
    Work<S::W> work(p.rows, uniform(*p.count));
    if (!work.more()) return;
    const auto tile_of = [&](int at) {
        const int4 v = p.tiles[at];
        return make_int4(uniform(v.x), uniform(v.y), uniform(v.z), 0);
    };
    int4 tile = tile_of(work.tile());
    int strip = min((work.quad() + group) * 4 + warp, strips - 1);
    const char* here = strip_of(tile.x, strip);
    fill(here);
    const auto exponents = [&](int which, int half) {
        return load_byte(p.exponents + static_cast<size_t>(tile.x) * p.rows + which * STRIP_ROWS + half * 8 + g);
    };
    int low = exponents(strip, 0), high = exponents(strip, 1);
    // A warpgroup starts a tile some steps after the one before it, so that one stores while the others multiply.
    const bool lags = S::LAG >= 0 && steps > 2 * S::STAGES;
    const uint32_t follower = lags && group + 1 < S::W ? turns + 8 * group + 8 : 0;
    uint32_t turn = 0;
    while (work.more()) {
        if (lags && group > 0) {
            barrier_wait(turns + 8 * group, turn);
            turn ^= 1;
        }
        const int count = work.count();
        const bool real = (work.quad() + group) * 4 + warp < strips;
        const int4 now = tile;
        const int row = strip * STRIP_ROWS;
        const uint32_t offsets = scale_offsets(low, high);
        work.advance();
        if (work.more()) {
            tile = tile_of(work.tile());
            strip = min((work.quad() + group) * 4 + warp, strips - 1);
        }
        const char* next = strip_of(tile.x, strip);
        low = exponents(strip, 0), high = exponents(strip, 1);
        if (group < count) {
            for_columns<S>(now.z, [&](auto columns) {
                constexpr int N = columns.value;
                const float* bias = p.bias + static_cast<size_t>(now.x) * p.rows + row;
                const float bias_low = load_float(bias + (OUT == SWIGLU ? 2 * g : g));
                const float bias_high = load_float(bias + (OUT == SWIGLU ? 2 * g + 1 : g + 8));
                float d[N / 2] = {};
                multiply<N, S>(d, ring, weights, here, next, wgmma_descriptor(stages), steps, offsets, follower);
                if (real) store<N, OUT>(p, d, row / STRIP_ROWS, now.y, now.z, offsets, bias_low, bias_high);
            });
        } else {
            if (follower) give_back(follower);
            for (int k = (steps - 1) % S::SPAN + 1; k <= steps; k += S::SPAN) {
                ring.wait_full();
                give_back(ring.empty());
                ring.advance();
            }
            fill(next);
        }
        here = next;
    }
}

template <class S, Output OUT> DEVICE void moe_gemm(const Params& p) {
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(8) uint64_t barriers[2 * S::STAGES + S::W];
    const uint32_t turns = shared_address(barriers + 2 * S::STAGES);
    const uint32_t stages = shared_address(shared);
    typename S::Activations ring(shared_address(barriers));
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::W; ++i) barrier_init(turns + 8 * i, 4);
        ring.init();
    }
    __syncthreads();
    if (uniform(threadIdx.x / 128) >= S::W) {
        registers_shrink<S::W == 2 ? 40 : 32>();
        if (threadIdx.x != S::W * 128) return;
        pdl_wait();
        pdl_launch();
        proxy_fence();
        const int steps = p.cols / TILE_COLS;
        for (Work<S::W> work(p.rows, *p.count); work.more(); work.advance()) {
            const int4 tile = p.tiles[work.tile()];
            const char* x = static_cast<const char*>(p.x) + static_cast<size_t>(tile.y) * 128;
            for (int k = 0, span = (steps - 1) % S::SPAN + 1; k < steps; k += span, span = S::SPAN) {
                ring.wait_empty();
                barrier_expect(ring.full(), span * tile.z * 128);
                for (int i = 0; i < span; ++i) {
                    bulk_load(stages + ring.stage * S::STAGE_BYTES + i * (S::MAX * 128), x, tile.z * 128, ring.full());
                    x += static_cast<size_t>(p.capacity) * 128;
                }
                ring.advance();
            }
        }
    } else {
        registers_grow<S::REGISTERS>();
        consume<S, OUT>(p, ring, stages, turns);
    }
}
using Low = Shape<4, 64, 7, 4, 3, -1, 112>;
using Middle = Shape<3, 160, 11, 1, 0, -1, 160>;
using High = Shape<2, 256, 7, 1, 0, 1, 232>;
#define BODY(SHAPE, OUT) moe_gemm<SHAPE, OUT>(p)
#else
#define BODY(SHAPE, OUT)
#endif

#define DEFINE(NAME, OUT)                                                                                      \
    KERNEL __launch_bounds__(640, 1) NAME##_64(const __grid_constant__ Params p) { BODY(Low, OUT); }           \
    KERNEL __launch_bounds__(512, 1) NAME##_160(const __grid_constant__ Params p) { BODY(Middle, OUT); }       \
    KERNEL __launch_bounds__(384, 1) NAME##_256(const __grid_constant__ Params p) { BODY(High, OUT); }         \
    KERNEL __launch_bounds__(256) NAME##_portable(const __grid_constant__ Params p) { moe_gemm_portable<OUT>(p); }
DEFINE(moe_gate_up, SWIGLU)
DEFINE(moe_down_f32, DOWN_F32)
DEFINE(moe_down_bf16, DOWN_BF16)
