// The experts' products for rows sorted by expert (moe_sort): gate and up with SwiGLU, and down. Weights are MXFP4 strips, operand A of
// wgmma from registers: a warp turns the 16 rows of a strip into fp16, block scale multiplied in, while the products of the 64 columns
// before run; each lane copies what it will need into a ring of its own (bulk copies of a strip's tile are too small to be fast).
// Activations are fp16 panels, operand B, which one more warp copies in bulk. The portable path has the same tiles and mma.sync.
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
    int stagger;                     // nanoseconds by which the second warpgroup starts later: one multiplies while the other stores
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

constexpr int CONSUMERS = STRIPS;  // warps

// A lane's codes and scales of the tiles that its warp will take, DEPTH - 1 of them on their way: the tiles of one strip, then those of
// the next in the list of work. Only the lane itself reads what it copied, so that nothing has to be awaited but its own copies.
template <int DEPTH> struct Weights {
    static constexpr int SLOT = 32 * (16 + 4), BYTES = DEPTH * SLOT;  // of a warp
    const char *codes, *scales;           // of the next tile to copy
    uint32_t to_codes, to_scales, bound;  // the slot taken last, which the next copy goes to; the end of the ring
    int left, at, expert;                 // tiles of this strip; place in the list of work; the expert of the place after it

    __device__ __forceinline__ Weights(const Params& p, uint32_t shared, int work) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        to_codes = shared + warp * BYTES + lane * 16;
        to_scales = shared + warp * BYTES + 512 + lane * 4;
        bound = to_codes + BYTES;
        at = blockIdx.x;
        if (at >= work) return;
        expert = p.tiles[at / row_tiles_of(p)].x;
        enter(p, work);
        for (int i = 0; i < DEPTH - 1; ++i) {
            load(p, work);
            advance();
        }
    }
    // To the strip of this place. Beyond the last place, and beyond the last strip of one, strips are copied for nothing.
    __device__ __forceinline__ void enter(const Params& p, int work) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const int strips = p.rows / STRIP_ROWS, tiles = p.cols / TILE_COLS, row_tiles = row_tiles_of(p);
        const int strip = min(at % row_tiles * STRIPS + warp, strips - 1);
        const char* from = p.w + (static_cast<size_t>(expert) * strips + strip) * strip_bytes(tiles);
        codes = from + lane * 16;
        scales = from + tiles * TILE_CODES + lane / 4 * 4;
        left = tiles;
        at += gridDim.x;
        if (at < work) expert = p.tiles[at / row_tiles].x;
    }
    __device__ __forceinline__ void load(const Params& p, int work) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to_codes), "l"(codes) : "memory");
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to_scales), "l"(scales) : "memory");
        copy_commit();
        codes += TILE_CODES;
        scales += TILE_SCALES;
        if (--left == 0) enter(p, work);
    }
    __device__ __forceinline__ void advance() {
        to_codes += SLOT;
        to_scales += SLOT;
        if (to_codes == bound) {
            to_codes -= BYTES;
            to_scales -= BYTES;
        }
    }
    // The oldest tile; starts the copies of one more in the place of the one taken before.
    __device__ __forceinline__ void take(const Params& p, int work, uint4& words, uint32_t& scale) {
        load(p, work);
        advance();
        copy_wait<DEPTH - 1>();
        asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                     : "r"(to_codes)
                     : "memory");
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(scale) : "r"(to_scales) : "memory");
    }
};

// Gives a stage back to the warp that copies.
DEVICE void give_back(uint32_t empty) {
    if (threadIdx.x % 32 == 0) barrier_arrive(empty);
}

template <int N> struct Columns {
    static constexpr int value = N;
};

// SPAN: tiles of 64 columns of a stage of activations.
template <int N, int MAX, int STAGES, int SPAN, int DEPTH, Output OUT>
DEVICE void consume(const Params& p, Ring<STAGES, 1, CONSUMERS>& ring, Weights<DEPTH>& weights, uint32_t stages, int4 tile, int row_tile,
                    int work) {
    const int lane = threadIdx.x % 32, steps = p.cols / TILE_COLS, strip = row_tile * STRIPS + threadIdx.x / 32;
    const bool real = strip * STRIP_ROWS < p.rows;
    const unsigned char* exponents =
        p.exponents + static_cast<size_t>(tile.x) * p.rows + (real ? strip : 0) * STRIP_ROWS + lane / 4;
    const uint32_t offsets = scale_offsets(exponents[0], exponents[8]);
    float d[N / 2] = {};
    uint32_t a[2][4][4];
    uint32_t before = 0;
    const auto step = [&](uint32_t (&operand)[4][4], int part) {
        uint4 words;
        uint32_t scale;
        weights.take(p, work, words, scale);
        dequantise(words, scale, offsets, operand);
        if (SPAN == 1 || part == 0) ring.wait_full();
        const uint64_t b = wgmma_descriptor(stages + (ring.stage * SPAN + part) * (MAX * 128));
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; ++k) Wgmma<N>::fp16(d, operand[k], b + 2 * k);
        wgmma_commit();
        wgmma_wait<1>();
    };
    const auto leave = [&] {
        before = ring.empty();
        ring.advance();
    };
    // An odd step goes first, on its own: behind the loop its operands would be a third set of registers.
    if (steps % 2) {
        step(a[0], 0);
        wgmma_wait<0>();
        give_back(ring.empty());
        ring.advance();
    }
    for (int k = steps % 2; k < steps; k += 2) {
        step(a[0], 0);
        if (k > 1) give_back(before);
        if constexpr (SPAN == 1) {
            leave();
            step(a[1], 0);
            give_back(before);
        } else {
            step(a[1], 1);
        }
        leave();
    }
    wgmma_wait<0>();
    wgmma_settle(d);
    if (steps > 1) give_back(before);
    if (real) store<N, OUT>(p, d, tile.x, strip, tile.y, tile.z, offsets);
}

template <int MAX, int STAGES, int SPAN, int DEPTH, Output OUT> DEVICE void moe_gemm(const Params& p) {
    constexpr int STAGE_BYTES = SPAN * MAX * 128;
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(8) uint64_t barriers[2 * STAGES];
    const uint32_t stages = shared_address(shared);
    Ring<STAGES, 1, CONSUMERS> ring(shared_address(barriers));
    if (threadIdx.x == 0) ring.init();
    __syncthreads();
    pdl_wait();
    pdl_launch();
    const int row_tiles = row_tiles_of(p), steps = p.cols / TILE_COLS, work = *p.count * row_tiles;
    if (p.stagger > 0 && threadIdx.x / 128 == 1) __nanosleep(p.stagger);
    if (threadIdx.x / 32 >= CONSUMERS) {
        if constexpr (MAX == 256) registers_shrink<24>();
        proxy_fence();
        for (int at = blockIdx.x; threadIdx.x == CONSUMERS * 32 && at < work; at += gridDim.x) {
            const int4 tile = p.tiles[at / row_tiles];
            const char* x = static_cast<const char*>(p.x) + static_cast<size_t>(tile.y) * 128;
            // With an odd number of steps the first stage has one tile only.
            for (int step = 0, span = (steps - 1) % SPAN + 1; step < steps; step += span, span = SPAN) {
                ring.wait_empty();
                barrier_expect(ring.full(), span * tile.z * 128);
                for (int i = 0; i < span; ++i) {
                    bulk_load(stages + ring.stage * STAGE_BYTES + i * (MAX * 128), x, tile.z * 128, ring.full());
                    x += static_cast<size_t>(p.capacity) * 128;
                }
                ring.advance();
            }
        }
    } else {
        if constexpr (MAX == 256) registers_grow<240>();
        Weights<DEPTH> weights(p, stages + STAGES * STAGE_BYTES, work);
        for (int at = blockIdx.x; at < work; at += gridDim.x) {
            const int4 tile = p.tiles[at / row_tiles];
            const int row_tile = at % row_tiles;
            const auto run = [&](auto columns) {
                consume<columns.value, MAX, STAGES, SPAN, DEPTH, OUT>(p, ring, weights, stages, tile, row_tile, work);
            };
            if constexpr (MAX == 256) {
                // A ragged tile multiplies as few columns as an instruction for it has.
                if (tile.z > 192)
                    run(Columns<256>{});
                else if (tile.z > 128)
                    run(Columns<192>{});
                else if (tile.z > 64)
                    run(Columns<128>{});
                else
                    run(Columns<64>{});
            } else {
                run(Columns<MAX>{});
            }
        }
        copy_wait<0>();
    }
}
#define BODY(MAX, STAGES, SPAN, DEPTH, OUT) moe_gemm<MAX, STAGES, SPAN, DEPTH, OUT>(p)
#else
#define BODY(MAX, STAGES, SPAN, DEPTH, OUT)
#endif

#define DEFINE(NAME, OUT)                                                                                                   \
    KERNEL __launch_bounds__(384, 1) NAME##_256(const __grid_constant__ Params p) { BODY(256, 5, 1, 8, OUT); }              \
    KERNEL __launch_bounds__(288, 2) NAME##_64(const __grid_constant__ Params p) { BODY(64, 3, 2, 10, OUT); }               \
    KERNEL __launch_bounds__(288, 2) NAME##_32(const __grid_constant__ Params p) { BODY(32, 6, 2, 10, OUT); }               \
    KERNEL __launch_bounds__(288, 2) NAME##_16(const __grid_constant__ Params p) { BODY(16, 12, 2, 10, OUT); }              \
    KERNEL __launch_bounds__(256) NAME##_portable(const __grid_constant__ Params p) { moe_gemm_portable<OUT>(p); }
DEFINE(moe_gate_up, SWIGLU)
DEFINE(moe_down_f32, DOWN_F32)
DEFINE(moe_down_bf16, DOWN_BF16)
