// Dense products of bf16 operands of at most 128 tokens at a time, on Hopper: y[token, out] (+)= sum over k of x[token, k] * w[out, k]. The
// tokens are operand A (64 rows an instruction), the weights operand B, both as the panel layout holds them. The four blocks of a cluster
// share the k of a tile of TOKENS tokens by WIDE outputs; each sends the others the sums of their tokens and adds up those of its own, in
// the order of the blocks. Two blocks fit a multiprocessor, so that the first weights arrive while the kernel before ends.
#include "common/dense.cuh"
#include "common/inbox.cuh"
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
    int launch;  // the next kernel may start when this many steps of weights have not been asked for
    Heads heads; // of QKV: y is [tokens, q_width], bf16
};

#ifdef HOPPER

constexpr int SPLIT = 4;      // blocks of a cluster
constexpr int CONSUMERS = 8;  // warps, two groups

template <Output OUT> DEVICE void put(const Params& p, int token, int out, float a, float b) {
    const size_t at = static_cast<size_t>(token) * p.stride + out;
    const bool pair = out + 1 < p.outs && p.stride % 2 == 0;
    if constexpr (OUT == STORE_BF16) {
        // outs and stride are even.
        *reinterpret_cast<uint32_t*>(static_cast<__nv_bfloat16*>(p.y) + at) = pack2<__nv_bfloat16>(a, b);
    } else if constexpr (OUT == QKV) {
        const int q_width = p.heads.q_width, half = p.heads.head_dim / 2, pair = out % p.heads.head_dim / 2;
        float* const kv = p.heads.kv + static_cast<size_t>(token) * 2 * p.heads.kv_width + (out - q_width);
        if (out >= q_width + p.heads.kv_width) {
            *reinterpret_cast<float2*>(kv) = make_float2(a, b);
            return;
        }
        const float2 v = turned(a, b, __ldg(p.heads.turns + static_cast<size_t>(token) * half + turn_place(pair)));
        if (out < q_width) {
            auto* const q = static_cast<__nv_bfloat16*>(p.y) + static_cast<size_t>(token) * q_width + (out - pair);
            q[0] = __float2bfloat16(v.x), q[half] = __float2bfloat16(v.y);
        } else {
            kv[-pair] = v.x, kv[half - pair] = v.y;
        }
    } else {
        // An element gets one addition, so that leaving it to the L2 cache keeps the order of its sum.
        float* y = static_cast<float*>(p.y) + at;
        if (OUT == ADD_F32) {
            if (pair) {
                asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(y), "f"(a), "f"(b) : "memory");
            } else {
                asm volatile("red.global.add.f32 [%0], %1;" ::"l"(y), "f"(a) : "memory");
                if (out + 1 < p.outs) asm volatile("red.global.add.f32 [%0], %1;" ::"l"(y + 1), "f"(b) : "memory");
            }
        } else if (pair) {
            *reinterpret_cast<float2*>(y) = make_float2(a, b);
        } else {
            y[0] = a;
            if (out + 1 < p.outs) y[1] = b;
        }
    }
}

template <int TOKENS, int WIDE, int STAGES, Output OUT> DEVICE void gemm_few(const Params& p) {
    // A group of consumers has 64 tokens: by half of the outputs where there are no more tokens, else by all.
    constexpr int N = TOKENS == 64 ? WIDE / 2 : WIDE;
    constexpr int STAGE = (WIDE + TOKENS) * 128, UNITS = TOKENS / 16 / SPLIT * (WIDE / 8), PART = UNITS * 512;
    static_assert(SPLIT * PART <= STAGES * STAGE, "the sums take the ring's place");
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(8) uint64_t barriers[2 * STAGES + 1];
    const uint32_t stages = shared_address(shared), inbox = shared_address(barriers + 2 * STAGES);
    Ring<STAGES, 2, CONSUMERS> ring(shared_address(barriers));
    const int rank = cluster_rank(), row_tiles = (p.w_rows + WIDE - 1) / WIDE, tile = blockIdx.x / SPLIT;
    const int row = tile % row_tiles * WIDE, token = tile / row_tiles * TOKENS;
    const int first = p.cols / 64 * rank / SPLIT, steps = p.cols / 64 * (rank + 1) / SPLIT - first;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const uint32_t w_bytes = min(WIDE, p.w_rows - row) * 128;
    const char* w = static_cast<const char*>(p.w) + (static_cast<size_t>(first) * p.w_rows + row) * 128;
    const size_t w_panel = static_cast<size_t>(p.w_rows) * 128;
    const auto copy_w = [&](int step) {
        barrier_expect(ring.full(), w_bytes);
        bulk_load(stages + ring.stage * STAGE, w + step * w_panel, w_bytes, ring.full());
        if (step + 1 + p.launch == steps) pdl_launch();
    };
    if (threadIdx.x == CONSUMERS * 32) {
        ring.init();
        if (p.launch >= steps) pdl_launch();
        // The first weights do not wait for the kernel before.
        for (int step = 0; step < min(STAGES, steps); ++step, ring.advance()) copy_w(step);
    }
    __syncthreads();
    pdl_wait();
    const int live = min(*p.live, p.tokens), tokens = max(0, min(TOKENS, live - token));
    if (threadIdx.x < 32) {
        // Sums that this block adds up: of 16 tokens each, those that there are.
        int bytes = 0;
        for (int i = 0; i < TOKENS / 16 / SPLIT; ++i)
            if ((rank * (TOKENS / 16 / SPLIT) + i) * 16 < tokens) bytes += WIDE / 8 * 512;
        inbox_open(inbox, SPLIT * bytes);
    }
    float d[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[i] = 0;
    if (threadIdx.x == CONSUMERS * 32) {
        global_proxy_fence();
        const uint32_t bytes = (tokens + 7) / 8 * 1024;
        const char* x = static_cast<const char*>(p.x) + (static_cast<size_t>(first) * p.capacity + token) * 128;
        ring.stage = 0, ring.parity = 0;
        for (int step = 0; step < steps; ++step, ring.advance()) {
            if (step >= STAGES) {
                ring.wait_empty();
                copy_w(step);
            }
            barrier_expect(ring.full(), bytes);
            if (bytes) bulk_load(stages + ring.stage * STAGE + WIDE * 128, x, bytes, ring.full());
            x += static_cast<size_t>(p.capacity) * 128;
        }
    } else if (warp < CONSUMERS) {
        const uint32_t a_at = WIDE * 128 + (TOKENS == 64 ? 0 : warp / 4 * 8192), b_at = TOKENS == 64 ? warp / 4 * N * 128 : 0;
        multiply_stages<N, STAGE>(d, ring, stages, a_at, b_at, steps);
    }
    __syncwarp();
    // All blocks are done with their rings, and their inboxes are open.
    cluster_arrive();
    cluster_wait();
    if (warp < CONSUMERS) {
        const int block = TOKENS == 64 ? warp % 4 : warp;  // of 16 tokens
        const int each = TOKENS / 16 / SPLIT, column = TOKENS == 64 ? warp / 4 * (N / 8) : 0;
        if (block * 16 < tokens) {
            const uint32_t to = stages + rank * PART + (block % each * (WIDE / 8) + column) * 512 + lane * 16;
#pragma unroll
            for (int j = 0; j < N / 8; ++j)
                send(to + j * 512, inbox, block / each, make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]));
        }
        inbox_wait(inbox);
        // What all blocks have of 16 tokens by 8 outputs, from `out` on.
        const auto sum_of = [&](int unit, int out) {
            const float2 bias = make_float2(p.bias ? p.bias[out] : 0.0f, p.bias && out + 1 < p.outs ? p.bias[out + 1] : 0.0f);
            float4 sum = make_float4(bias.x, bias.y, bias.x, bias.y);
#pragma unroll
            for (int source = 0; source < SPLIT; ++source) {
                const float4 part = *reinterpret_cast<const float4*>(shared + source * PART + unit * 512 + lane * 16);
                sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
            }
            return sum;
        };
        for (int at = warp; at < (OUT == SWIGLU ? UNITS / 2 : UNITS); at += CONSUMERS) {
            const int unit = OUT == SWIGLU ? 2 * at : at;
            const int line = (rank * each + unit / (WIDE / 8)) * 16 + g, out = row + unit % (WIDE / 8) * 8 + 2 * t;
            if (out >= p.outs || line >= tokens) continue;
            const float4 sum = sum_of(unit, out);
            if constexpr (OUT == SWIGLU) {
                const float4 up = sum_of(unit + 1, out + 8);
                char* const y = static_cast<char*>(p.y) + panel_chunk(token + line, (out & ~15) / 2, p.capacity) + 4 * t;
                *reinterpret_cast<uint32_t*>(y) = pack2<__nv_bfloat16>(silu_times(sum.x, up.x), silu_times(sum.y, up.y));
                if (line + 8 < tokens)
                    *reinterpret_cast<uint32_t*>(y + 1024) = pack2<__nv_bfloat16>(silu_times(sum.z, up.z), silu_times(sum.w, up.w));
            } else {
                put<OUT>(p, token + line, out, sum.x, sum.y);
                if (line + 8 < tokens) put<OUT>(p, token + line + 8, out, sum.z, sum.w);
            }
        }
    }
}

#define BODY(TOKENS, WIDE, STAGES, OUT) gemm_few<TOKENS, WIDE, STAGES, OUT>(p)
#define CLUSTER __cluster_dims__(4, 1, 1)
#else
#define BODY(TOKENS, WIDE, STAGES, OUT)
#define CLUSTER
#endif

#define KERNEL_OF(NAME, TOKENS, STAGES, OUT)                                                                                \
    KERNEL CLUSTER __launch_bounds__(288, 2) NAME##_##TOKENS(const __grid_constant__ Params p) { BODY(TOKENS, 96, STAGES, OUT); }
#define DEFINE(NAME, OUT)       \
    KERNEL_OF(NAME, 64, 5, OUT) \
    KERNEL_OF(NAME, 128, 4, OUT)
DEFINE(gemm_few_f32, STORE_F32)
DEFINE(gemm_few_bf16, STORE_BF16)
DEFINE(gemm_few_add, ADD_F32)
DEFINE(gemm_few_swiglu, SWIGLU)
DEFINE(gemm_few_qkv, QKV)
