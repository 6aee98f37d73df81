// The experts' products for rows sorted by expert (moe_sort): gate and up with SwiGLU, and down. Weights are MXFP4 strips, operand A of
// wgmma from registers: a warp turns the 16 rows of a strip into fp16, block scale multiplied in, while the products of the 64 columns
// before run. Activations are fp16 panels, operand B. Two warps copy into a ring (one alone could not issue that many small copies fast
// enough); two warpgroups use it. The portable path has the same tiles and mma.sync.
//
// Range: a row's weights are taken relative to its largest block scale, R: code * 2^(s - R + 1) in fp16 (at most 12; exact down to
// s = R - 24, then fading), and the sum is multiplied by 2^(R - 128) in float32.
#include "common/mxfp4.cuh"
#include "common/panels.cuh"
#include "common/wgmma.cuh"

struct Params {
    const char* w;                   // strips of [experts, rows, cols]
    const unsigned char* exponents;  // [experts, rows]: R of each row, in the order of the strips' rows (moe_exponents)
    const float* bias;               // [experts, rows]: gate/up: gate i at 2i, up i at 2i + 1; down: rows in order
    const void* x;                   // panels of [capacity, cols], fp16
    void* y;                         // gate/up: panels of [capacity, rows / 2], fp16; down: [capacity, rows], float32 or bf16
    const int4* tiles;               // {expert, first sorted row, sorted rows (a multiple of 8), 0}
    const int* count;                // tiles
    int cols;                        // multiple of 64
    int rows;                        // of one expert, a multiple of 16
    int capacity;                    // multiple of 8
    float alpha, limit;              // SwiGLU: sigmoid's factor, clamp
};

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

// What becomes of the sums.
enum Output { SWIGLU, DOWN_F32, DOWN_BF16 };

// Offsets of a lane's two rows, 30 - R: with them a scale word becomes fp16 factors.
DEVICE uint32_t scale_offsets(int low, int high) { return (static_cast<uint32_t>(30 - low) & 0xffff) | static_cast<uint32_t>(30 - high) << 16; }

// Factors 2^(s - R + 15) of (row g, row g + 8) for one block of 32, each as two equal fp16; 0 where that is below 2^-14.
template <int BLOCK> DEVICE void scale_factors(uint32_t word, uint32_t offsets, uint32_t& low, uint32_t& high) {
    const uint32_t bytes = __byte_perm(word, 0, BLOCK ? 0x4342 : 0x4140);
    const uint32_t exponents = __viaddmax_s16x2_relu(bytes, offsets, 0) << 2;
    low = __byte_perm(exponents, 0, 0x0404);
    high = __byte_perm(exponents, 0, 0x2424);
}

DEVICE uint32_t multiply2(uint32_t a, uint32_t b) {
    const __half2 v = __hmul2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b));
    return *reinterpret_cast<const uint32_t*>(&v);
}

// A lane's share of a tile as operand A of four products of 16 columns.
DEVICE void dequantise(uint4 codes, uint32_t scales, uint32_t offsets, uint32_t (&a)[4][4]) {
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
    uint32_t factors[4];
    scale_factors<0>(scales, offsets, factors[0], factors[1]);
    scale_factors<1>(scales, offsets, factors[2], factors[3]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32_t pairs[4];
        fp4_to_fp16(words[i], pairs);
        const int first = i / 2 * 2, high = i % 2;
        a[first][high] = multiply2(pairs[0], factors[i]);
        a[first][2 + high] = multiply2(pairs[1], factors[i]);
        a[first + 1][high] = multiply2(pairs[2], factors[i]);
        a[first + 1][2 + high] = multiply2(pairs[3], factors[i]);
    }
}

DEVICE float swiglu(float gate, float up, float alpha, float limit) {
    gate = fminf(gate, limit);
    up = fminf(fmaxf(up, -limit), limit);
    return __fdividef(gate, 1.0f + __expf(-alpha * gate)) * (up + 1.0f);
}

constexpr int STRIPS = 8;  // of a tile, one a warp
constexpr int CONSUMERS = STRIPS, COPIERS = 2;  // warps
constexpr int A_BYTES = STRIPS * (TILE_CODES + TILE_SCALES);

// Sums of one strip for N sorted rows from `first` on, of which `tokens` are to be stored.
template <int N, Output OUT>
DEVICE void store(const Params& p, const float (&d)[N / 2], int expert, int strip, int first, int tokens, uint32_t offsets) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const float* bias = p.bias + static_cast<size_t>(expert) * p.rows + strip * STRIP_ROWS;
    const float bias_low = bias[OUT == SWIGLU ? 2 * g : g], bias_high = bias[OUT == SWIGLU ? 2 * g + 1 : g + 8];
    // 2^(R - 128) from 30 - R.
    const float unit_low = __int_as_float((29 - static_cast<short>(offsets & 0xffff)) << 23);
    const float unit_high = __int_as_float((29 - static_cast<short>(offsets >> 16)) << 23);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
        if (8 * j >= tokens) break;
        float v[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) v[c] = fmaf(d[4 * j + c], c < 2 ? unit_low : unit_high, c < 2 ? bias_low : bias_high);
        if constexpr (OUT == SWIGLU) {
            const float even = swiglu(v[0], v[2], p.alpha, p.limit), odd = swiglu(v[1], v[3], p.alpha, p.limit);
            const uint32_t turned = transpose8(pack2<__half>(even, odd));
            char* y = static_cast<char*>(p.y) + panel_chunk(first + 8 * j + g, strip * 8, p.capacity) + 4 * t;
            *reinterpret_cast<uint32_t*>(y) = turned;
        } else if constexpr (OUT == DOWN_BF16) {
            const uint32_t low = transpose8(pack2<__nv_bfloat16>(v[0], v[1])), high = transpose8(pack2<__nv_bfloat16>(v[2], v[3]));
            auto* y = static_cast<__nv_bfloat16*>(p.y) + static_cast<size_t>(first + 8 * j + g) * p.rows + strip * STRIP_ROWS + 2 * t;
            *reinterpret_cast<uint32_t*>(y) = low;
            *reinterpret_cast<uint32_t*>(y + 8) = high;
        } else {
            auto* y = static_cast<float*>(p.y) + static_cast<size_t>(first + 8 * j + 2 * t) * p.rows + strip * STRIP_ROWS + g;
            y[0] = v[0], y[8] = v[2], y[p.rows] = v[1], y[p.rows + 8] = v[3];
        }
    }
}

// The portable path: a tile's rows by 64 at a time.
template <Output OUT> DEVICE void moe_gemm_portable(const Params& p) {
    constexpr int TOKENS = 64, STAGES = 4, STAGE_BYTES = TOKENS * 128, THREADS = STRIPS * 32;
    extern __shared__ __align__(1024) char shared[];
    const uint32_t stages = shared_address(shared);
    pdl_wait();
    pdl_launch();
    const int row_tiles = (p.rows + STRIPS * STRIP_ROWS - 1) / (STRIPS * STRIP_ROWS), steps = p.cols / TILE_COLS;
    const int work = *p.count * row_tiles, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int at = blockIdx.x; at < work; at += gridDim.x) {
        const int4 tile = p.tiles[at / row_tiles];
        const int strip = at % row_tiles * STRIPS + warp;
        const bool real = strip * STRIP_ROWS < p.rows;
        const size_t row = static_cast<size_t>(tile.x) * p.rows + (real ? strip * STRIP_ROWS : 0);
        const uint32_t offsets = scale_offsets(p.exponents[row + lane / 4], p.exponents[row + 8 + lane / 4]);
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
                store<TOKENS, OUT>(p, reinterpret_cast<const float(&)[TOKENS / 2]>(d), tile.x, strip, tile.y + done, tile.z - done, offsets);
        }
    }
}

#ifdef HOPPER

// What one lane of a copying warp copies in each step.
struct Copy {
    const char* from;
    uint32_t stride, to, apart, bytes;
};

template <int N, int MAX, int STAGES, int BLOCKS, Output OUT>
DEVICE void consume(const Params& p, Ring<STAGES, COPIERS, BLOCKS * CONSUMERS>& ring, uint32_t stages, int4 tile, int row_tile) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, steps = p.cols / TILE_COLS;
    const int strip = row_tile * STRIPS + warp;
    const bool real = strip * STRIP_ROWS < p.rows;
    // Beyond the last strip a warp multiplies whatever the ring holds and stores nothing.
    const unsigned char* exponents =
        p.exponents + static_cast<size_t>(tile.x) * p.rows + (real ? strip * STRIP_ROWS : 0) + lane / 4;
    const uint32_t offsets = scale_offsets(exponents[0], exponents[8]);
    const uint32_t codes = stages + STAGES * MAX * 128 + warp * TILE_CODES + lane * 16;
    const uint32_t scales = stages + STAGES * MAX * 128 + STRIPS * TILE_CODES + warp * TILE_SCALES + lane / 4 * 4;
    float d[N / 2] = {};
    uint32_t a[2][4][4];
    uint32_t before = 0;
    const auto step = [&](uint32_t (&operand)[4][4], bool has_before) {
        ring.wait_full();
        uint4 words;
        uint32_t scale;
        asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                     : "r"(codes + ring.stage * A_BYTES));
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(scale) : "r"(scales + ring.stage * A_BYTES));
        dequantise(words, scale, offsets, operand);
        const uint64_t b = wgmma_descriptor(stages + ring.stage * (MAX * 128));
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) Wgmma<N>::fp16(d, operand[k], b + 2 * k);
        wgmma_commit();
        wgmma_wait<1>();
        if (has_before) release<BLOCKS>(before);
        before = ring.empty();
        ring.advance();
    };
    // An odd step goes first, on its own: behind the loop its operands would be a third set of registers.
    if (steps % 2) {
        step(a[0], false);
        wgmma_wait<0>();
    }
    for (int k = steps % 2; k < steps; k += 2) {
        step(a[0], k > 0);
        step(a[1], true);
    }
    wgmma_wait<0>();
    wgmma_settle(d);
    release<BLOCKS>(before);
    if (real) store<N, OUT>(p, d, tile.x, strip, tile.y, tile.z, offsets);
}

// The BLOCKS (1 or 2) blocks of a cluster take adjacent weight tiles of the same tokens, and each copies a half of those for both.
template <int MAX, int STAGES, int BLOCKS, Output OUT> DEVICE void moe_gemm(const Params& p) {
    constexpr int SHARE = MAX / BLOCKS;
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(8) uint64_t barriers[2 * STAGES];
    const uint32_t stages = shared_address(shared);
    Ring<STAGES, COPIERS, BLOCKS * CONSUMERS> ring(shared_address(barriers));
    if (threadIdx.x == 0) ring.init();
    __syncthreads();
    if constexpr (BLOCKS > 1) cluster_sync();
    pdl_wait();
    pdl_launch();
    constexpr int TILE_ROWS = STRIPS * STRIP_ROWS * BLOCKS;
    const int row_tiles = (p.rows + TILE_ROWS - 1) / TILE_ROWS, steps = p.cols / TILE_COLS, rank = BLOCKS > 1 ? cluster_rank() : 0;
    const int work = *p.count * row_tiles, begin = blockIdx.x / BLOCKS, stride = gridDim.x / BLOCKS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp >= CONSUMERS) {
        if constexpr (MAX == 256) registers_shrink<24>();
        proxy_fence();
        const uint32_t to_codes = stages + STAGES * MAX * 128, to_scales = to_codes + STRIPS * TILE_CODES;
        for (int at = begin; warp < CONSUMERS + COPIERS && at < work; at += stride) {
            const int4 tile = p.tiles[at / row_tiles];
            const int first = (at % row_tiles * BLOCKS + rank) * STRIPS, strips = max(0, min(STRIPS, p.rows / STRIP_ROWS - first));
            const char* strip = p.w + (static_cast<size_t>(tile.x) * (p.rows / STRIP_ROWS) + first + lane) * strip_bytes(steps);
            Copy copy = {};
            uint32_t bytes;
            if (warp == CONSUMERS) {
                if (lane < strips) copy = {strip, TILE_CODES, to_codes + lane * TILE_CODES, A_BYTES, TILE_CODES};
                bytes = strips * TILE_CODES;
            } else {
                if (lane < strips)
                    copy = {strip + steps * TILE_CODES, TILE_SCALES, to_scales + lane * TILE_SCALES, A_BYTES, TILE_SCALES};
                if (lane == STRIPS)
                    copy = {static_cast<const char*>(p.x) + static_cast<size_t>(tile.y + rank * SHARE) * 128,
                            static_cast<uint32_t>(p.capacity) * 128, stages + rank * SHARE * 128, MAX * 128,
                            static_cast<uint32_t>(max(0, min(SHARE, tile.z - rank * SHARE))) * 128};
                bytes = strips * TILE_SCALES + tile.z * 128;
            }
            for (int step = 0; step < steps; ++step) {
                ring.wait_empty();
                if (lane == 0) barrier_expect(ring.full(), bytes);
                __syncwarp();
                if (copy.bytes) {
                    const uint32_t to = copy.to + ring.stage * copy.apart;
                    if constexpr (BLOCKS > 1)
                        bulk_load_shared(to, copy.from, copy.bytes, ring.full(), lane == STRIPS ? (1 << BLOCKS) - 1 : 1 << rank);
                    else
                        bulk_load(to, copy.from, copy.bytes, ring.full());
                }
                copy.from += copy.stride;
                ring.advance();
            }
        }
        // A block stays until no other copies into it or arrives at its barriers.
        if constexpr (BLOCKS > 1) {
            __syncwarp();
            cluster_sync();
        }
    } else {
        if constexpr (MAX == 256) registers_grow<240>();
        for (int at = begin; at < work; at += stride) {
            const int4 tile = p.tiles[at / row_tiles];
            const int row_tile = at % row_tiles * BLOCKS + rank;
            if constexpr (MAX == 256) {
                // A ragged tile multiplies as few columns as an instruction for it has.
                if (tile.z > 192)
                    consume<256, MAX, STAGES, BLOCKS, OUT>(p, ring, stages, tile, row_tile);
                else if (tile.z > 128)
                    consume<192, MAX, STAGES, BLOCKS, OUT>(p, ring, stages, tile, row_tile);
                else if (tile.z > 64)
                    consume<128, MAX, STAGES, BLOCKS, OUT>(p, ring, stages, tile, row_tile);
                else
                    consume<64, MAX, STAGES, BLOCKS, OUT>(p, ring, stages, tile, row_tile);
            } else {
                consume<MAX, MAX, STAGES, BLOCKS, OUT>(p, ring, stages, tile, row_tile);
            }
        }
        if constexpr (BLOCKS > 1) cluster_sync();
    }
}
#define BODY(MAX, STAGES, BLOCKS, OUT) moe_gemm<MAX, STAGES, BLOCKS, OUT>(p)
#define CLUSTER(BLOCKS) __cluster_dims__(BLOCKS, 1, 1)
#else
#define BODY(MAX, STAGES, BLOCKS, OUT)
#define CLUSTER(BLOCKS)
#endif

#define DEFINE(NAME, OUT)                                                                                                              \
    KERNEL CLUSTER(2) __launch_bounds__(384, 1) NAME##_pair(const __grid_constant__ Params p) { BODY(256, 6, 2, OUT); }                \
    KERNEL __launch_bounds__(384, 1) NAME##_256(const __grid_constant__ Params p) { BODY(256, 6, 1, OUT); }                            \
    KERNEL __launch_bounds__(320, 2) NAME##_64(const __grid_constant__ Params p) { BODY(64, 8, 1, OUT); }                              \
    KERNEL __launch_bounds__(320, 2) NAME##_32(const __grid_constant__ Params p) { BODY(32, 12, 1, OUT); }                             \
    KERNEL __launch_bounds__(320, 2) NAME##_16(const __grid_constant__ Params p) { BODY(16, 16, 1, OUT); }                             \
    KERNEL __launch_bounds__(256) NAME##_portable(const __grid_constant__ Params p) { moe_gemm_portable<OUT>(p); }
DEFINE(moe_gate_up, SWIGLU)
DEFINE(moe_down_f32, DOWN_F32)
DEFINE(moe_down_bf16, DOWN_BF16)
