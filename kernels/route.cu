// The router: logits = W RMSNorm(x) + b in float32, the top_k greatest (ties: lowest index; NaN above all), and the softmax over
// those. The scale of RMSNorm is taken out of the product, so that a row is read once.
//
// For few rows, with h = RMSNorm(x) written in fragment order: `route_spread` (compute capability 9.0 and newer), eight blocks a row, a
// cluster, so that each holds its experts' weights in registers before x is there; logits meet in the first block's shared memory.
// `route_one`, elsewhere: a block a row.
//
// For more rows, with the scale of each row written: tensor cores. x * norm is split into two bf16 parts, which keep 16 bits of it, and
// both are multiplied. `route_many`: a block's warps share the columns of 32 rows. `route_split` (9.0): the warps of a cluster of
// eight blocks share those of 16 rows, two of which each block then finishes; it writes h or the scales.
#include "common/route.cuh"

constexpr int WARPS = 16;
constexpr int THREADS = WARPS * 32;
constexpr int AHEAD = 4;  // chunks of W that a lane holds of each of two experts before x is there

DEVICE float dot(float sum, const uint4& w, const float4& a, const float4& b) {
    sum = fmaf(low(w.x), a.x, sum), sum = fmaf(high(w.x), a.y, sum);
    sum = fmaf(low(w.y), a.z, sum), sum = fmaf(high(w.y), a.w, sum);
    sum = fmaf(low(w.z), b.x, sum), sum = fmaf(high(w.z), b.y, sum);
    sum = fmaf(low(w.w), b.z, sum), sum = fmaf(high(w.w), b.w, sum);
    return sum;
}

// Stores eight columns of a normed row in fragment order.
DEVICE void store(const Params& p, int row, int chunk, const float4& a, const float4& b) {
    uint32_t* const to = reinterpret_cast<uint32_t*>(p.h + static_cast<size_t>(row) * p.hidden) + (chunk / 4) * 16 + chunk % 4;
    to[0] = pack2<__half>(a.x, a.y), to[4] = pack2<__half>(a.z, a.w), to[8] = pack2<__half>(b.x, b.y), to[12] = pack2<__half>(b.z, b.w);
}

#if __CUDA_ARCH__ >= 900
constexpr int SPREAD = 8;  // blocks of a cluster
constexpr int SPREAD_WARPS = 8, SPREAD_THREADS = SPREAD_WARPS * 32;
constexpr int GROUP = 4;  // experts at a time
constexpr int HELD = 2;   // chunks of eight columns of each that a thread holds before x is there

// The address, in a block of the cluster, of what `local` is in this one.
DEVICE uint32_t in_block(const void* local, int rank) {
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(local)), "r"(rank));
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
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
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
        asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(in_block(logits + expert, 0)),
                     "r"(__float_as_uint(fmaf(sum, scale, bias))), "r"(in_block(&arrived, 0))
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

DEVICE void route_alone(const Params& p) {
    extern __shared__ __align__(128) char shared[];
    __shared__ float scratch[WARPS];
    __shared__ float logits[MOST_EXPERTS];
    const int chunks = p.hidden / 8, thread = threadIdx.x, warp = thread / 32, lane = thread % 32, row = blockIdx.x;
    // The normed row: of each 8 columns the first four, then, after all of these, the last four, so that neighbouring lanes read
    // neighbouring 16 bytes.
    float4* const low = reinterpret_cast<float4*>(shared);
    float4* const high = low + chunks;
    const uint4* const router = reinterpret_cast<const uint4*>(p.router);

    // Weights only, before the wait: all of W on its way to L2, the first chunks to registers.
    const int bytes = p.experts * p.hidden * 2;
    for (int at = thread * 128; at < bytes; at += THREADS * 128)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(reinterpret_cast<const char*>(p.router) + at));
    uint4 ahead[2][AHEAD];
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            const int expert = warp + e * WARPS, chunk = lane + i * 32;
            ahead[e][i] = make_uint4(0, 0, 0, 0);
            if (expert < p.experts && chunk < chunks) ahead[e][i] = __ldg(router + static_cast<size_t>(expert) * chunks + chunk);
        }
    pdl_wait();
    pdl_launch();
    if (row >= *p.live) return;
    const float4* const x = reinterpret_cast<const float4*>(p.x + static_cast<size_t>(row) * p.hidden);
    float sum = 0;
    for (int chunk = thread; chunk < chunks; chunk += THREADS) {
        const float4 a = x[chunk * 2], b = x[chunk * 2 + 1];
        low[chunk] = a, high[chunk] = b;
        sum = squares(squares(sum, a), b);
    }
    const float scale = rsqrtf(block_sum<WARPS>(sum, scratch) / p.hidden + p.eps);
    const float4* const norm = reinterpret_cast<const float4*>(p.norm);
    // Each thread finds what it stored itself.
    for (int chunk = thread; chunk < chunks; chunk += THREADS) {
        const float4 a = low[chunk] = times(times(low[chunk], __ldg(norm + chunk * 2)), scale);
        const float4 b = high[chunk] = times(times(high[chunk], __ldg(norm + chunk * 2 + 1)), scale);
        store(p, row, chunk, a, b);
    }
    __syncthreads();

    for (int first = warp; first < p.experts; first += 2 * WARPS) {
        const bool both = first + WARPS < p.experts;
        const uint4* const w0 = router + static_cast<size_t>(first) * chunks;
        const uint4* const w1 = both ? w0 + static_cast<size_t>(WARPS) * chunks : w0;
        float dots[2] = {};
        auto add = [&](int chunk, const uint4& v0, const uint4& v1) {
            const float4 a = low[chunk], b = high[chunk];
            dots[0] = dot(dots[0], v0, a, b), dots[1] = dot(dots[1], v1, a, b);
        };
        int chunk = lane;
        if (first == warp) {
#pragma unroll
            for (int i = 0; i < AHEAD; ++i, chunk += 32)
                if (chunk < chunks) add(chunk, ahead[0][i], ahead[1][i]);
        }
#pragma unroll 4
        for (; chunk < chunks; chunk += 32) add(chunk, __ldg(w0 + chunk), __ldg(w1 + chunk));
        dots[0] = warp_sum(dots[0]), dots[1] = warp_sum(dots[1]);
        if (lane != 0) continue;
        logits[first] = dots[0] + __ldg(p.bias + first);
        if (both) logits[first + WARPS] = dots[1] + __ldg(p.bias + first + WARPS);
    }
    __syncthreads();
    if (warp == 0) choose(p, logits, row);
}

// More rows. A step is 32 columns; of these lane (g, t) has columns 8t..8t + 7 of rows g, g + 8, ... and of experts g, g + 8, ...: the
// first four go through one instruction of 16 columns, the others through the next. Which column sits where in an instruction does not
// matter as long as both operands agree.
constexpr int STEP = 32;
constexpr int MANY_WARPS = 8, MANY_THREADS = MANY_WARPS * 32;

// Of M * 16 rows: products with N * 8 experts, and squares, of the columns that this lane saw. d is what mma_bf16 says.
template <int M, int N> struct Sums {
    float d[M][N][4] = {};
    float square[M][2] = {};
};

// What a lane multiplies in one step.
template <int N> struct Weights {
    float4 norm[2];
    uint4 router[N];

    __device__ __forceinline__ void load(const Params& p, int step) {
        const int col = step * STEP + threadIdx.x % 4 * 8, g = threadIdx.x % 32 / 4;
        const float4* const from = reinterpret_cast<const float4*>(p.norm + col);
        norm[0] = __ldg(from), norm[1] = __ldg(from + 1);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            // Columns of experts that there are not are dropped.
            const int expert = min(n * 8 + g, p.experts - 1);
            router[n] = __ldg(reinterpret_cast<const uint4*>(p.router + static_cast<size_t>(expert) * p.hidden + col));
        }
    }
};
template <int M> struct Inputs {
    float4 x[M][2][2];  // of M * 16 rows: g or g + 8; the first or the last four columns

    __device__ __forceinline__ void load(const Params& p, int first, int step) {
        const int col = step * STEP + threadIdx.x % 4 * 8, g = threadIdx.x % 32 / 4;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                // Not the live rows' bound: x need not wait for that. The results of other rows are dropped.
                const int row = min(first + m * 16 + half * 8 + g, p.rows - 1);
                const float4* const from = reinterpret_cast<const float4*>(p.x + static_cast<size_t>(row) * p.hidden + col);
                x[m][half][0] = from[0], x[m][half][1] = from[1];
            }
    }
};

// v as the sum of two bf16 numbers, each of two neighbours.
DEVICE void split(float v0, float v1, uint32_t& first, uint32_t& rest) {
    first = pack2<__nv_bfloat16>(v0, v1);
    rest = pack2<__nv_bfloat16>(v0 - low(first), v1 - high(first));
}

template <int M, int N> DEVICE void multiply(Sums<M, N>& sums, const Inputs<M>& in, const Weights<N>& w) {
#pragma unroll
    for (int piece = 0; piece < 2; ++piece)
#pragma unroll
        for (int m = 0; m < M; ++m) {
            uint32_t first[4], rest[4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float4 x = in.x[m][half][piece], v = times(x, w.norm[piece]);
                sums.square[m][half] = squares(sums.square[m][half], x);
                split(v.x, v.y, first[half], rest[half]);
                split(v.z, v.w, first[2 + half], rest[2 + half]);
            }
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const uint4 r = w.router[n];
                mma_bf16(sums.d[m][n], first[0], first[1], first[2], first[3], piece ? r.z : r.x, piece ? r.w : r.y);
            }
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const uint4 r = w.router[n];
                mma_bf16(sums.d[m][n], rest[0], rest[1], rest[2], rest[3], piece ? r.z : r.x, piece ? r.w : r.y);
            }
        }
}

// Where the warps of a block meet.
template <int M, int N> struct Meeting {
    static constexpr int LINE = N * 8 + 8;  // padded: lanes of four g store to all banks
    float products[MANY_WARPS][M * 16][LINE];
    float squares[MANY_WARPS][M * 16];

    __device__ __forceinline__ void put(Sums<M, N>& sums) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = m * 16 + half * 8 + g;
                float v = sums.square[m][half];
                v += __shfl_xor_sync(~0u, v, 1);
                v += __shfl_xor_sync(~0u, v, 2);
                if (t == 0) squares[warp][row] = v;
#pragma unroll
                for (int n = 0; n < N; ++n)
                    *reinterpret_cast<float2*>(&products[warp][row][n * 8 + 2 * t]) =
                        make_float2(sums.d[m][n][2 * half], sums.d[m][n][2 * half + 1]);
            }
    }
    __device__ __forceinline__ float product(int row, int expert) const {
        float sum = 0;
#pragma unroll
        for (int warp = 0; warp < MANY_WARPS; ++warp) sum += products[warp][row][expert];
        return sum;
    }
    __device__ __forceinline__ float square(int row) const {
        float sum = 0;
#pragma unroll
        for (int warp = 0; warp < MANY_WARPS; ++warp) sum += squares[warp][row];
        return sum;
    }
};

template <int M, int N> DEVICE void route_rows(const Params& p) {
    extern __shared__ __align__(128) char shared[];
    auto& meeting = *reinterpret_cast<Meeting<M, N>*>(shared);
    const int warp = threadIdx.x / 32, steps = p.hidden / STEP, first = blockIdx.x * M * 16;
    pdl_wait();
    pdl_launch();
    const int live = *p.live;
    if (first >= live) return;
    Sums<M, N> sums;
#pragma unroll 1
    for (int step = warp; step < steps; step += MANY_WARPS) {
        Inputs<M> in;
        Weights<N> w;
        in.load(p, first, step);
        w.load(p, step);
        multiply(sums, in, w);
    }
    meeting.put(sums);
    __syncthreads();
    // Each warp finishes rows of its own.
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int row = warp; row < min(M * 16, live - first); row += MANY_WARPS) {
        const float scale = rsqrtf(meeting.square(row) / p.hidden + p.eps);
        // The logits take the place of the first warp's products, which only this lane reads.
        float* const logits = meeting.products[0][row];
        for (int expert = lane; expert < p.experts; expert += 32)
            logits[expert] = fmaf(meeting.product(row, expert), scale, __ldg(p.bias + expert));
        if (lane == 0) p.scale[first + row] = scale;
        __syncwarp();
        choose(p, logits, first + row);
    }
}

#if __CUDA_ARCH__ >= 900
DEVICE void send(const void* to, int rank, float v) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(in_block(to, rank)), "f"(v) : "memory");
}

// What COUNT steps of a warp need of the weights is in registers before x is there.
template <int N, int COUNT> DEVICE void route_rows_in_cluster(const Params& p) {
    constexpr int ROWS = 16, OWN = ROWS / SPREAD, ALL_WARPS = SPREAD * MANY_WARPS;
    extern __shared__ __align__(128) char shared[];
    __shared__ float products[SPREAD][OWN][N * 8], squares[SPREAD][ROWS];
    auto& meeting = *reinterpret_cast<Meeting<1, N>*>(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, steps = p.hidden / STEP;
    const int rank = blockIdx.x % SPREAD, first = blockIdx.x / SPREAD * ROWS, begin = rank * MANY_WARPS + warp;
    // Blocks must be there before another sends to them.
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    Weights<N> held[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        if (begin + i * ALL_WARPS < steps) held[i].load(p, begin + i * ALL_WARPS);
    pdl_wait();
    pdl_launch();
    const int live = *p.live;
    Sums<1, N> sums;
    Inputs<1> in[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        if (begin + i * ALL_WARPS < steps) in[i].load(p, first, begin + i * ALL_WARPS);
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        if (begin + i * ALL_WARPS < steps) multiply(sums, in[i], held[i]);
#pragma unroll 1
    for (int step = begin + COUNT * ALL_WARPS; step < steps; step += ALL_WARPS) {
        Weights<N> w;
        Inputs<1> more;
        w.load(p, step);
        more.load(p, first, step);
        multiply(sums, more, w);
    }
    meeting.put(sums);
    __syncthreads();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    for (int at = threadIdx.x; at < ROWS * N * 8; at += MANY_THREADS) {
        const int row = at / (N * 8), expert = at % (N * 8);
        send(&products[rank][row % OWN][expert], row / OWN, meeting.product(row, expert));
    }
    if (threadIdx.x < ROWS * SPREAD) send(&squares[rank][threadIdx.x % ROWS], threadIdx.x / ROWS, meeting.square(threadIdx.x % ROWS));
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    const auto scale_of = [&](int row) {
        float square = 0;
#pragma unroll
        for (int block = 0; block < SPREAD; ++block) square += squares[block][row];
        return rsqrtf(square / p.hidden + p.eps);
    };
    if (p.h) {
        const int g = lane / 4, t = lane % 4;
        const float scales[2] = {scale_of(g), scale_of(g + 8)};
        const auto put = [&](const Inputs<1>& in, const float4 (&norm)[2], int step) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float4 a = times(in.x[0][half][0], norm[0]), b = times(in.x[0][half][1], norm[1]);
                const int row = first + half * 8 + g;
                if (row < live) store(p, row, step * 4 + t, times(a, scales[half]), times(b, scales[half]));
            }
        };
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            if (begin + i * ALL_WARPS < steps) put(in[i], held[i].norm, begin + i * ALL_WARPS);
#pragma unroll 1
        for (int step = begin + COUNT * ALL_WARPS; step < steps; step += ALL_WARPS) {
            const float4* const norm = reinterpret_cast<const float4*>(p.norm + step * STEP + t * 8);
            Inputs<1> more;
            more.load(p, first, step);
            put(more, {__ldg(norm), __ldg(norm + 1)}, step);
        }
    }
    const int row = first + rank * OWN + warp;
    if (warp >= OWN || row >= live) return;
    const float scale = scale_of(rank * OWN + warp);
    float* const logits = meeting.products[0][warp];
    for (int expert = lane; expert < p.experts; expert += 32) {
        float sum = 0;
#pragma unroll
        for (int block = 0; block < SPREAD; ++block) sum += products[block][warp][expert];
        logits[expert] = fmaf(sum, scale, __ldg(p.bias + expert));
    }
    if (lane == 0 && !p.h) p.scale[row] = scale;
    __syncwarp();
    choose(p, logits, row);
}
#endif

KERNEL __launch_bounds__(THREADS) route_one(const __grid_constant__ Params p) { route_alone(p); }
KERNEL __launch_bounds__(MANY_THREADS, 2) route_many_32(const __grid_constant__ Params p) { route_rows<2, 4>(p); }
KERNEL __launch_bounds__(MANY_THREADS, 3) route_some_32(const __grid_constant__ Params p) { route_rows<1, 4>(p); }
KERNEL __launch_bounds__(MANY_THREADS) route_many_128(const __grid_constant__ Params p) { route_rows<1, 16>(p); }

#if __CUDA_ARCH__ >= 900
#define CLUSTER __cluster_dims__(SPREAD)
KERNEL CLUSTER __launch_bounds__(SPREAD_THREADS, 2) route_spread(const __grid_constant__ Params p) { route_in_cluster(p); }
KERNEL CLUSTER __launch_bounds__(MANY_THREADS, 2) route_split_32(const __grid_constant__ Params p) { route_rows_in_cluster<4, 2>(p); }
KERNEL CLUSTER __launch_bounds__(MANY_THREADS) route_split_128(const __grid_constant__ Params p) { route_rows_in_cluster<16, 1>(p); }
#else
KERNEL route_spread(const __grid_constant__ Params p) {}
KERNEL route_split_32(const __grid_constant__ Params p) {}
KERNEL route_split_128(const __grid_constant__ Params p) {}
#endif
