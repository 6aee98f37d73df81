// Dense products of bf16 operands, float32 sums: y[token, out] = sum over k of x[token, k] * w[out, k]. The weights are operand A
// (64 rows an instruction), the tokens operand B, both as the panel layout holds them: a bulk copy brings a tile of 64 k of either.
// On Hopper persistent blocks: one warp copies into a ring, two warpgroups multiply 64 weight rows each by up to MAX tokens. Elsewhere
// eight warps copy and multiply 16 rows each by 64 tokens, with mma.sync.
#include "common/dense.cuh"
#include "common/products.cuh"
#include "common/wgmma_more.cuh"

struct Params {
    const void* w;      // panels of [w_rows, cols], bf16
    const void* x;      // panels of [capacity, cols], bf16
    const float* bias;  // [outs] or null
    void* y;            // [tokens, stride]; SWIGLU: panels of [capacity, outs / 2], bf16
    const int* live;    // tokens to do; later rows of y are left alone
    int cols;           // multiple of 64
    int w_rows;         // multiple of 8
    int outs;           // columns of y that are written, at most w_rows
    int capacity;       // multiple of 8
    int stride;
    int tokens;  // most that the grid is made for
    int group;   // token tiles that are swept together, for reuse in L2
    int height;  // tokens of a tile, a multiple of 64, where a kernel leaves it open
    Heads heads; // of QKV: y is [tokens, q_width], bf16
};

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

// Stores below: sums of the 16 weight rows from `row` on, of this warp, for N tokens. Of d, lane (g, t) holds at 4 j.. {row g: tokens 8 j + 2 t,
// + 1}, {row g + 8: the same}.

// Columns from `row` on of a row-major matrix, those below `outs` only. Eight lanes of one t write the 32 bytes of a sector.
template <int N, bool ADD>
DEVICE void store_floats(float* y, size_t stride, const float (&d)[N / 2], int row, int outs, int token, int live, float bias_low, float bias_high) {
    const int lane = threadIdx.x % 32, t = lane % 4, low = row + lane / 4, high = low + 8;
    // An element gets one addition, so that leaving it to the L2 cache keeps the order of its sum.
    const auto put = [&](int to, int out, float v) {
        float* at = y + to * stride + out;
        if constexpr (ADD)
            asm volatile("red.global.add.f32 [%0], %1;" ::"l"(at), "f"(v) : "memory");
        else
            *at = v;
    };
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int to = token + 8 * j + 2 * t + c;
            if (to < live && low < outs) put(to, low, d[4 * j + c] + bias_low);
            if (to < live && high < outs) put(to, high, d[4 * j + 2 + c] + bias_high);
        }
}

// A lane's turns for queries and keys: of tokens 8 j + 2 t + odd, pairs i and i + 4. Some are held ahead of their use.
struct Turns {
    static constexpr int AHEAD = 8;
    const char* from;  // of the next to be loaded
    int bytes, left;   // to the one after, tokens that there are from it on
    float4 held[AHEAD];

    __device__ __forceinline__ float4 next() {
        float4 v = make_float4(0, 0, 0, 0);
        if (left > 0)
            asm volatile("ld.global.nc.v4.f32 {%0,%1,%2,%3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from));
        from += bytes, left -= 8;
        return v;
    }
    // For the rows from `row` on; `groups` of eight tokens.
    __device__ __forceinline__ void start(const Params& p, int row, int token, int live, int groups) {
        const int lane = threadIdx.x % 32, own = lane % 4 * 2 + lane / 4 % 2, width = p.heads.head_dim / 2;
        bytes = width * 8 * static_cast<int>(sizeof(float2));
        left = row < p.heads.q_width + p.heads.kv_width ? live - token - own : 0;
        from = reinterpret_cast<const char*>(p.heads.turns + static_cast<size_t>(token + own) * width + row % p.heads.head_dim / 2 + lane / 8 * 2);
#pragma unroll
        for (int j = 0; j < AHEAD; ++j)
            if (j < groups) held[j] = next();
    }
};

// Sums to be added go through shared memory, so that a warp adds to whole lines of 128 bytes. A warpgroup has a place of its own for 64
// tokens by 64 outputs, padded. `stride` and `outs` are multiples of 4.
constexpr int PITCH = 68 * 4, STAGING = 64 * PITCH;
template <int N>
DEVICE void add_staged(uint32_t staging, float* y, size_t stride, const float (&d)[N / 2], int row, int outs, int token, int live, float bias_low,
                       float bias_high) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, line = threadIdx.x % 128 / 16, column = row - warp * 16 + threadIdx.x % 16 * 4;
    const uint32_t to = staging + lane % 4 * 2 * PITCH + (warp * 16 + lane / 4) * 4, from = staging + line * PITCH + threadIdx.x % 16 * 16;
    const auto sync = [] {
        __syncwarp();
        asm volatile("bar.sync %0, 128;" ::"r"(threadIdx.x / 128 + 1) : "memory");
    };
    const auto put = [](uint32_t at, float v) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory"); };
#pragma unroll
    for (int base = 0; base < N / 8; base += 8) {
        sync();
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                if (base + j >= N / 8) continue;
                put(to + (8 * j + c) * PITCH, d[4 * (base + j) + c] + bias_low);
                put(to + (8 * j + c) * PITCH + 32, d[4 * (base + j) + 2 + c] + bias_high);
            }
        sync();
        float* const first = y + (token + 8 * base + line) * stride + column;
        if (column < outs) {
#pragma unroll
            for (int i = 0; i < 64; i += 8) {
                if (token + 8 * base + line + i >= live) break;
                float4 v;
                asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                             : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                             : "r"(from + i * PITCH)
                             : "memory");
                asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(first + i * stride), "f"(v.x), "f"(v.y), "f"(v.z),
                             "f"(v.w)
                             : "memory");
            }
        }
    }
}

// Queries and keys. A lane and the one four further have the two rows of a pair, of two tokens each: they swap, so that each has both rows of
// one token, and turns them. Queries move on between lanes until each has four dimensions of a token in a row.
template <int N, bool QUERY>
DEVICE void store_turned(const Params& p, const float (&d)[N / 2], int row, int token, int live, float bias_low, float bias_high, Turns& turns) {
    const int lane = threadIdx.x % 32, i = lane / 8, odd = lane / 4 % 2, t = lane % 4;
    const int half = p.heads.head_dim / 2, pair = row % p.heads.head_dim / 2;
    const uint32_t sign = odd ? 0x80000000u : 0;
    // Of the lanes i of a token even ones take the dimensions of the first half, then of four such lanes the first two the lower ones.
    const bool swaps = (i ^ odd) & 1, upper = i & 2;
    const uint32_t first = i & 1 ? 0x1054 : 0x5410, second = i & 1 ? 0x3276 : 0x7632;
    int left = live - token - 2 * t - odd;
    const size_t to = token + 2 * t + odd;
    __nv_bfloat16* q = static_cast<__nv_bfloat16*>(p.y) + to * p.heads.q_width + (row - pair * 2) + (i & 1) * half + pair + (upper ? 4 : 0);
    float* k = p.heads.kv + to * 2 * p.heads.kv_width + (row - pair * 2 - p.heads.q_width) + pair + i;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
        float4 by = turns.held[j % Turns::AHEAD];
        if (j + Turns::AHEAD < N / 8) turns.held[j % Turns::AHEAD] = turns.next();
        by.y = __uint_as_float(__float_as_uint(by.y) ^ sign), by.w = __uint_as_float(__float_as_uint(by.w) ^ sign);
        // Of pairs i and i + 4: an even lane gets {first, second} dimension, an odd one the other way round.
        float2 v[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const float bias = c ? bias_high : bias_low, a = d[4 * j + 2 * c] + bias, b = d[4 * j + 2 * c + 1] + bias;
            const float mine = odd ? b : a, other = __shfl_xor_sync(~0u, odd ? a : b, 4);
            v[c] = turned(mine, other, c ? make_float2(by.z, by.w) : make_float2(by.x, by.y));
        }
        if constexpr (QUERY) {
            const uint32_t x = pack2<__nv_bfloat16>(v[0].x, v[1].x), y = pack2<__nv_bfloat16>(v[0].y, v[1].y);
            const uint32_t mine = swaps ? y : x, other = __shfl_xor_sync(~0u, swaps ? x : y, 8);
            const uint32_t low = __byte_perm(mine, other, first), high = __byte_perm(mine, other, second);
            const uint32_t kept = upper ? high : low, got = __shfl_xor_sync(~0u, upper ? low : high, 16);
            if (left > 0) *reinterpret_cast<uint2*>(q) = upper ? make_uint2(got, kept) : make_uint2(kept, got);
            q += 8 * p.heads.q_width;
        } else {
            const int x = odd ? half : 0, y = half - x;
            if (left > 0) k[x] = v[0].x, k[y] = v[0].y, k[x + 4] = v[1].x, k[y + 4] = v[1].y;
            k += 16 * p.heads.kv_width;
        }
        left -= 8;
    }
}

template <int N, Output OUT>
DEVICE void store(const Params& p, const float (&d)[N / 2], int row, int token, int live, Turns& turns, uint32_t staging) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int low = row + g, high = row + g + 8;
    const float bias_low = p.bias && low < p.outs ? p.bias[low] : 0.0f, bias_high = p.bias && high < p.outs ? p.bias[high] : 0.0f;
    if constexpr (OUT == STORE_BF16) {
        // Transposed with both halves of the rows, so that lanes of one token write a sector.
        auto* y = static_cast<__nv_bfloat16*>(p.y);
        const int out = row + g % 2 * 8 + 2 * t;
#pragma unroll
        for (int j = 0; j < N / 8; ++j)
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const uint32_t v = transpose8(pack2<__nv_bfloat16>(d[4 * j + c] + bias_low, d[4 * j + 2 + c] + bias_high));
                const int to = token + 8 * j + (g & ~1) + c;
                if (to < live && out < p.outs) *reinterpret_cast<uint32_t*>(y + static_cast<size_t>(to) * p.stride + out) = v;
            }
    } else if constexpr (OUT == SWIGLU) {
        // Whole strips of 16 rows; a multiple of 8 tokens further is a multiple of 1024 bytes further in a panel.
        if (row >= p.outs) return;
        char* y = static_cast<char*>(p.y) + panel_chunk(token + g, row / 2, p.capacity) + 4 * t;
#pragma unroll
        for (int j = 0; j < N / 8; ++j) {
            const float even = silu_times(d[4 * j] + bias_low, d[4 * j + 2] + bias_high);
            const float odd = silu_times(d[4 * j + 1] + bias_low, d[4 * j + 3] + bias_high);
            const uint32_t v = transpose8(pack2<__nv_bfloat16>(even, odd));
            if (token + 8 * j + g < live) *reinterpret_cast<uint32_t*>(y + j * 1024) = v;
        }
    } else if constexpr (OUT == QKV) {
        // Whole heads; a tile has what is one warp's of one of them.
        if (row >= p.outs) return;
        if (row < p.heads.q_width) {
            store_turned<N, true>(p, d, row, token, live, bias_low, bias_high, turns);
        } else if (row < p.heads.q_width + p.heads.kv_width) {
            store_turned<N, false>(p, d, row, token, live, bias_low, bias_high, turns);
        } else {
            float* const y = p.heads.kv - p.heads.q_width;
            store_floats<N, false>(y, 2 * p.heads.kv_width, d, row, p.outs, token, live, bias_low, bias_high);
        }
    } else if (OUT == ADD_F32 && staging) {
        add_staged<N>(staging, static_cast<float*>(p.y), p.stride, d, row, p.outs, token, live, bias_low, bias_high);
    } else {
        store_floats<N, OUT == ADD_F32>(static_cast<float*>(p.y), p.stride, d, row, p.outs, token, live, bias_low, bias_high);
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
        float d[TOKENS / 8][4] = {};
        multiply_portable<ROWS, TOKENS, STAGES>(d, stages, steps, fill);
        Turns turns;
        if (OUT == QKV) turns.start(p, at.row + warp * 16, at.token, live, TOKENS / 8);
        store<TOKENS, OUT>(p, reinterpret_cast<const float(&)[TOKENS / 2]>(d), at.row + warp * 16, at.token, live, turns, 0);
    }
}

#ifdef HOPPER

template <int N, int STAGE_BYTES, Output OUT, class R>
DEVICE void consume(const Params& p, R& ring, uint32_t stages, Place at, int end, uint32_t staging) {
    float d[N / 2] = {};
    const int row = at.row + threadIdx.x / 32 * 16;
    Turns turns;
    if constexpr (OUT == QKV) turns.start(p, row, at.token, end, N / 8);
    const int steps = p.cols / 64;
    const uint32_t last = multiply_stages<N, STAGE_BYTES>(d, ring, stages, threadIdx.x / 128 * 8192, ROWS * 128, steps);
    if (steps > 0) give_back(last);
    store<N, OUT>(p, d, row, at.token, end, turns, staging);
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
        const bool whole = OUT == ADD_F32 && p.stride % 4 == 0 && p.outs % 4 == 0;
        const uint32_t staging = whole ? stages + STAGES * STAGE_BYTES + (threadIdx.x >= 128 ? STAGING : 0) : 0;
        for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            const Place at = place(p, tile, row_tiles, token_tiles, p.height);
            const int tokens = min(p.height, live - at.token), end = at.token + tokens;
            // A ragged tile multiplies as few columns as an instruction for it has.
            if constexpr (MAX == 256) {
                if (tokens > 128) {
                    if (tokens > 208)
                        consume<256, STAGE_BYTES, OUT>(p, ring, stages, at, end, staging);
                    else if (tokens > 192)
                        consume<208, STAGE_BYTES, OUT>(p, ring, stages, at, end, staging);
                    else if (tokens > 176)
                        consume<192, STAGE_BYTES, OUT>(p, ring, stages, at, end, staging);
                    else
                        consume<176, STAGE_BYTES, OUT>(p, ring, stages, at, end, staging);
                    continue;
                }
            }
            if (tokens > 64)
                consume<128, STAGE_BYTES, OUT>(p, ring, stages, at, end, staging);
            else if (MAX == 256 || tokens > 32)
                consume<64, STAGE_BYTES, OUT>(p, ring, stages, at, end, staging);
            else
                consume<32, STAGE_BYTES, OUT>(p, ring, stages, at, end, staging);
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
DEFINE(gemm_swiglu, SWIGLU)
DEFINE(gemm_qkv, QKV)
