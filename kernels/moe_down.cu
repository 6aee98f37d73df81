// Down projection of the chosen experts and their weighted sum, for small batches:
// x[row] += sum over slots, in order, of weight[row, slot] * (W_e a[row, slot] + b_e).
//
// `small` and `wide`, for at most 8 rows: a block owns 16 columns of x at a time and does all active experts for them, so that
// nothing meets outside it. `large` and `vast`: warps compute whole strips into `products`; `combine` adds them to x. Both sum in the same order.
//
// Before its pdl_wait a block reads `choice` and `live` and fetches weights by them. That is sound after moe_gate_up alone,
// which lets its successor start only after its own pdl_wait: by then the router, which wrote `choice`, has ended.
#include "common/pipe.cuh"

struct Params {
    const char* weights;   // down strips [experts][hidden / 16], inner / 64 tiles each
    const float* bias;     // [experts, hidden]
    const __half* a;       // [rows * top_k, inner], fragment order
    const int* choice;     // [rows, top_k]
    const float* weight;   // [rows, top_k]
    const int* live;       // rows to do
    float* x;              // [rows, hidden], added to
    float* products;       // [rows * top_k, hidden] (large and combine)
    int hidden;            // multiple of 16
    int inner;             // multiple of 64
    int experts;           // at most 128
    int top_k;
    int capacity;          // rows * top_k: pairs that fit
    int sums;              // floats of shared memory for partial sums (small)
    int stages;            // of the ring (pipe)
};

extern __shared__ __align__(128) char shared[];

template <bool ONE> DEVICE void few_rows(const Params& p) {
    const int warps = blockDim.x / 32 - PRODUCERS, threads = warps * 32, row16 = threadIdx.x % 16;
    char* const ring = shared + BARRIERS;
    float* const sums = reinterpret_cast<float*>(ring + STAGES * warps * PIECE_BYTES);
    float* const products = sums + p.sums;  // [pairs][16]
    const Work work = work_at(reinterpret_cast<char*>(products + p.capacity * 16), p.capacity);
    const int strips = p.hidden / 16, tiles = p.inner / 64, pieces = (tiles + PIECE - 1) / PIECE, slices = (pieces + warps - 1) / warps;
    const int live = min(*p.live, p.capacity / p.top_k);
    init_barriers(shared_address(shared), warps);
    const int segments = list_work(work, p.choice, live * p.top_k, p.capacity, p.experts, GROUP_FEW);
    const int own = (strips - static_cast<int>(blockIdx.x) + gridDim.x - 1) / gridDim.x;

    const Strips from{work, p.weights, strips * strip_bytes(tiles), strips, tiles, segments};
    Slices<true> slice{from, shared_address(shared), shared_address(ring), warps, slices, own * segments, 0, static_cast<int>(blockIdx.x)};
    if (!feed(slice, own * segments * slices)) return;
    auto row_of = [&](int pair) { return reinterpret_cast<const uint4*>(p.a + static_cast<size_t>(pair) * p.inner); };
    Sharer<true, ONE, decltype(row_of)> sharer{
        from, slice, ring, shared_address(shared), warps, slices, row_of, 0, static_cast<int>(blockIdx.x)};
    const int most = segments > 0 ? most_tokens(work, 0, segments, 1) : 1, window = p.sums / (pieces * most * 16);
    pdl_wait();
    pdl_launch();
    for (int strip = blockIdx.x; strip < strips; strip += gridDim.x) {
        // A thread's part of x, fetched while weights stream.
        float* const x = p.x + static_cast<size_t>(threadIdx.x / 16) * p.hidden + strip * 16 + row16;
        const bool adds = static_cast<int>(threadIdx.x) < live * 16;
        const float before = adds ? *x : 0;
        for (int base = 0; base < segments; base += window) {
            const int count = min(window, segments - base);
            // Item i is (segment, token, row of 16); the first one of a thread gets its bias early.
            auto bias_at = [&](int item) {
                const int expert = work.segments[base + item / 16 / most].expert;
                return __ldg(p.bias + static_cast<size_t>(expert) * p.hidden + strip * 16 + row16);
            };
            const int items = count * most * 16;
            float bias = static_cast<int>(threadIdx.x) < items ? bias_at(threadIdx.x) : 0;
            sharer.multiply_units(count, sums, most);
            sync_computing(warps);
#pragma unroll 1
            for (int item = threadIdx.x; item < items; item += threads) {
                const int unit = item / 16 / most, token = item / 16 % most;
                if (item >= threads) bias = bias_at(item);
                const Segment segment = work.segments[base + unit];
                if (token >= segment.count) continue;
                const float* in = sums + (unit * pieces * most + token) * 16 + row16;
                products[work.pairs[segment.first + token] * 16 + row16] = fmaf(sum_pieces(in, pieces, most * 16), FP4_UNIT, bias);
            }
            sync_computing(warps);
        }
        if (adds) {
            const int row = threadIdx.x / 16;
            float sum = 0;
#pragma unroll 4
            for (int slot = 0; slot < p.top_k; ++slot)
                sum = fmaf(p.weight[row * p.top_k + slot], products[(row * p.top_k + slot) * 16 + row16], sum);
            *x = before + sum;
        }
    }
    drain();
}

KERNEL __launch_bounds__(MOST_THREADS, 1) moe_down_few(const __grid_constant__ Params p) { few_rows<true>(p); }
// For more pieces than warps.
KERNEL __launch_bounds__(MOST_THREADS, 1) moe_down_wide(const __grid_constant__ Params p) { few_rows<false>(p); }

template <bool STAGED> DEVICE void many_rows(const Params& p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    char* const ring = shared + BARRIERS + 64;
    const int strips = p.hidden / 16, tiles = p.inner / 64;
    uint4* const staged = reinterpret_cast<uint4*>(ring + warps * STAGES * PIECE_BYTES);
    const Work work = work_at(reinterpret_cast<char*>(staged) + (STAGED ? GROUP_MANY * (tiles * 128 + 64) : 0), p.capacity);
    init_own_barriers(shared_address(shared), warps);
    const int units = strips * list_work(work, p.choice, min(*p.live * p.top_k, p.capacity), p.capacity, p.experts, GROUP_MANY);
    const int begin = share(units, blockIdx.x), end = share(units, blockIdx.x + 1);
    const Strips from{work, p.weights, strips * strip_bytes(tiles), strips, tiles, 0};
    auto row_of = [&](int pair) { return reinterpret_cast<const uint4*>(p.a + static_cast<size_t>(pair) * p.inner); };
    auto done = [&](const Segment& segment, int strip, int tile, const float (&sum)[4]) {
        const int row = strip * 16 + lane / 4, token = tile * 8 + lane % 4 * 2;
        const float* bias = p.bias + static_cast<size_t>(segment.expert) * p.hidden + row;
        const float low = __ldg(bias), high = __ldg(bias + 8);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (token + i >= segment.count) break;
            float* to = p.products + static_cast<size_t>(work.pairs[segment.first + token + i]) * p.hidden + row;
            to[0] = fmaf(sum[i], FP4_UNIT, low);
            to[8] = fmaf(sum[2 + i], FP4_UNIT, high);
        }
    };
    Streamer<STAGED, decltype(row_of), decltype(done)> streamer{
        from, shared_address(shared) + warp * STAGES * 8, shared_address(shared) + BARRIERS, ring + warp * STAGES * PIECE_BYTES, staged,
        warps, row_of, done};
    streamer.start(begin, end);
    pdl_wait();
    pdl_launch();
    streamer.run(begin, end);
}

KERNEL __launch_bounds__(MOST_THREADS, 1) moe_down_large(const __grid_constant__ Params p) { many_rows<true>(p); }
// Where tokens do not fit shared memory.
KERNEL __launch_bounds__(MOST_THREADS, 1) moe_down_vast(const __grid_constant__ Params p) { many_rows<false>(p); }

KERNEL __launch_bounds__(640, 1) moe_down_pipe(const __grid_constant__ Params p) {
#ifdef HOPPER
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tiles = p.inner / 64, pieces = (tiles + PIECE - 1) / PIECE;
    Product product{p.weights, p.bias, p.a, 1, p.hidden / 16, tiles};
    char* const ring = shared + PIPE_FIXED + FINISHERS * pieces * SUMS * 16;
    const Work work = work_at(ring + p.stages * product.strip_size(), p.capacity);
    const Pipe pipe{work, shared_address(shared), shared_address(ring), p.stages, product.strip_size(), pieces, shared + BARRIERS,
                    reinterpret_cast<float4*>(shared + PIPE_FIXED)};
    if (threadIdx.x == 0) pipe.init(), barrier_init_fence();
    product.deal(work, list_work(work, p.choice, min(*p.live * p.top_k, p.capacity), p.capacity, p.experts, GROUP_PIPE));
    if (warp < MULTIPLIERS) {
        registers_of_multipliers();
        pdl_wait();
        pdl_launch();
        Multiplier{pipe}.run(product);
        return;
    }
    registers_of_others();
    if (warp == MULTIPLIERS && lane == 0) Copier{pipe}.run(product);
    pdl_wait();
    pdl_launch();
    if (warp > MULTIPLIERS) {
        Finisher{pipe, warp - MULTIPLIERS - 1}.run(product, [&](const Segment& segment, int strip, int tile, const float (&sum)[4], const float* bias) {
            const int row = strip * 16 + lane / 4, token = tile * 8 + lane % 4 * 2;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (token + i >= segment.count) break;
                float* to = p.products + static_cast<size_t>(work.pairs[segment.first + token + i]) * p.hidden + row;
                to[0] = fmaf(sum[i], FP4_UNIT, bias[lane / 4]);
                to[8] = fmaf(sum[2 + i], FP4_UNIT, bias[lane / 4 + 8]);
            }
        });
    }
#endif
}

// A thread four columns, a block 512 of one row. Few threads of few registers, which find room beside the blocks before.
#if __CUDA_ARCH__ == 890
constexpr int COMBINING = 12;  // blocks to a multiprocessor
#else
constexpr int COMBINING = 16;
#endif
KERNEL __launch_bounds__(128, COMBINING) moe_down_combine(const __grid_constant__ Params p) {
    pdl_wait();
    pdl_launch();
    const int row = blockIdx.y, col = (blockIdx.x * 128 + threadIdx.x) * 4;
    if (row >= *p.live || col >= p.hidden) return;
    const float* from = p.products + static_cast<size_t>(row) * p.top_k * p.hidden + col;
    float* x = p.x + static_cast<size_t>(row) * p.hidden + col;
    float4 old = *reinterpret_cast<float4*>(x), sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (int slot = 0; slot < p.top_k; ++slot) {
        const float weight = p.weight[row * p.top_k + slot];
        const float4 v = *reinterpret_cast<const float4*>(from + static_cast<size_t>(slot) * p.hidden);
        sum.x = fmaf(weight, v.x, sum.x), sum.y = fmaf(weight, v.y, sum.y);
        sum.z = fmaf(weight, v.z, sum.z), sum.w = fmaf(weight, v.w, sum.w);
    }
    old.x += sum.x, old.y += sum.y, old.z += sum.z, old.w += sum.w;
    *reinterpret_cast<float4*>(x) = old;
}
