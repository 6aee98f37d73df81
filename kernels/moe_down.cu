// Down projection of the chosen experts and their weighted sum, for small batches:
// x[row] += sum over slots, in order, of weight[row, slot] * (W_e a[row, slot] + b_e).
//
// `small` and `wide`, for at most 8 rows: a block owns 16 columns of x and does all active experts for them, so nothing meets outside it.
// `large`: warps compute whole strips into `products`; `combine` adds them to x. Both sum in the same order.
//
// Before its pdl_wait a block reads `choice` and `live` and fetches weights by them. That is sound after moe_gate_up alone,
// which lets its successor start only after its own pdl_wait: by then the router, which wrote `choice`, has ended.
#include "common/experts.cuh"

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
};

extern __shared__ __align__(128) char shared[];

template <bool ONE> DEVICE void few_rows(const Params& p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, threads = blockDim.x;
    const int strip = blockIdx.x, row16 = threadIdx.x % 16;
    char* const ring = shared + warp * RING;
    float* const sums = reinterpret_cast<float*>(shared + warps * RING);
    float* const products = sums + p.sums;  // [pairs][16]
    const Work work = work_at(shared + warps * RING + (p.sums + p.capacity * 16) * 4, p.capacity);
    const int strips = p.hidden / 16, tiles = p.inner / 64, pieces = (tiles + PIECE - 1) / PIECE;
    const int live = min(*p.live, p.capacity / p.top_k);
    const int segments = list_work(work, p.choice, live * p.top_k, p.capacity, p.experts, 8);

    // A unit is this block's strip of one segment's expert.
    auto row_of = [](int pair) { return pair; };
    Sharer<ONE, decltype(row_of)> sharer{{work, p.weights + strip * strip_bytes(tiles), strips * strip_bytes(tiles), 1, tiles, pieces, 1,
                                     warp, warps, shared_address(ring) + lane * 16, segments},
                                    reinterpret_cast<const uint4*>(p.a), ring, row_of, 0, 0};
    sharer.reader.start(0);
    const int most = segments > 0 ? most_tokens(work, 0, segments, 1) : 1, window = p.sums / (pieces * most * 16);
    // Item i is (segment, token, row of 16); the first one of a thread gets its bias early.
    auto bias_at = [&](int segment) {
        return __ldg(p.bias + static_cast<size_t>(work.segments[segment].expert) * p.hidden + strip * 16 + row16);
    };
    const int ahead = threadIdx.x / 16 / most;
    float bias = ahead < min(window, segments) ? bias_at(ahead) : 0;

    pdl_wait();
    pdl_launch();
    for (int base = 0; base < segments; base += window) {
        const int count = min(window, segments - base);
        sharer.multiply_units(count, sums, most);
        __syncthreads();
        for (int item = threadIdx.x; item < count * most * 16; item += threads) {
            const int unit = item / 16 / most, token = item / 16 % most;
            if (base > 0 || item >= threads) bias = bias_at(base + unit);
            const Segment segment = work.segments[base + unit];
            if (token >= segment.count) continue;
            const float* from = sums + (unit * pieces * most + token) * 16 + row16;
            float sum = 0;
            for (int piece = 0; piece < pieces; ++piece, from += most * 16) sum += from[0];
            products[work.pairs[segment.first + token] * 16 + row16] = fmaf(sum, FP4_UNIT, bias);
        }
        __syncthreads();
    }
    copy_wait<0>();
    for (int row = threadIdx.x / 16; row < live; row += threads / 16) {
        float sum = 0;
        for (int slot = 0; slot < p.top_k; ++slot)
            sum = fmaf(p.weight[row * p.top_k + slot], products[(row * p.top_k + slot) * 16 + row16], sum);
        float* const x = p.x + static_cast<size_t>(row) * p.hidden + strip * 16 + row16;
        *x += sum;
    }
}

KERNEL __launch_bounds__(MOST_THREADS, 2) moe_down_small(const __grid_constant__ Params p) { few_rows<true>(p); }
// For more pieces than warps.
KERNEL __launch_bounds__(MOST_THREADS, 2) moe_down_wide(const __grid_constant__ Params p) { few_rows<false>(p); }

KERNEL __launch_bounds__(MOST_THREADS, 1) moe_down_large(const __grid_constant__ Params p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    char* const ring = shared + warp * RING;
    const Work work = work_at(shared + warps * RING, p.capacity);
    const int strips = p.hidden / 16, tiles = p.inner / 64, pieces = (tiles + PIECE - 1) / PIECE;
    const int units = strips * list_work(work, p.choice, min(*p.live * p.top_k, p.capacity), p.capacity, p.experts, 16);
    const int begin = static_cast<int>(static_cast<int64_t>(units) * blockIdx.x / gridDim.x) + warp;
    const int end = static_cast<int>(static_cast<int64_t>(units) * (blockIdx.x + 1) / gridDim.x);
    auto row_of = [](int pair) { return pair; };
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
    Streamer<decltype(row_of), decltype(done)> streamer{
        {work, p.weights, strips * strip_bytes(tiles), strips, tiles, pieces, warps, 0, 1, shared_address(ring) + lane * 16, end},
        reinterpret_cast<const uint4*>(p.a), ring, row_of, done};
    streamer.reader.start(begin);
    pdl_wait();
    pdl_launch();
    streamer.run(begin, end);
}

// One block a row.
KERNEL __launch_bounds__(256) moe_down_combine(const __grid_constant__ Params p) {
    pdl_wait();
    pdl_launch();
    const int row = blockIdx.x;
    if (row >= *p.live) return;
    const float* from = p.products + static_cast<size_t>(row) * p.top_k * p.hidden;
    float* x = p.x + static_cast<size_t>(row) * p.hidden;
    for (int col = threadIdx.x * 4; col < p.hidden; col += 256 * 4) {
        float4 sum = make_float4(0, 0, 0, 0);
        for (int slot = 0; slot < p.top_k; ++slot) {
            const float weight = p.weight[row * p.top_k + slot];
            const float4 v = *reinterpret_cast<const float4*>(from + static_cast<size_t>(slot) * p.hidden + col);
            sum.x = fmaf(weight, v.x, sum.x), sum.y = fmaf(weight, v.y, sum.y);
            sum.z = fmaf(weight, v.z, sum.z), sum.w = fmaf(weight, v.w, sum.w);
        }
        float4 old = *reinterpret_cast<float4*>(x + col);
        old.x += sum.x, old.y += sum.y, old.z += sum.z, old.w += sum.w;
        *reinterpret_cast<float4*>(x + col) = old;
    }
}
