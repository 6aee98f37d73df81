// Down projection of the chosen experts and their weighted sum, for small batches:
// x[row] += sum over slots, in order, of weight[row, slot] * (W_e a[row, slot] + b_e).
//
// `small`, for at most 8 rows: a block owns 16 columns of x and does all active experts for them, so nothing meets outside it.
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

KERNEL __launch_bounds__(THREADS, 2) moe_down_small(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, strip = blockIdx.x;
    char* const ring = shared + warp * (STAGES * STAGE);
    float* const sums = reinterpret_cast<float*>(shared + RING);
    float* const products = sums + p.sums;  // [pairs][16]
    const Work work = work_at(shared + RING + (p.sums + p.capacity * 16) * 4, p.capacity);
    const Strips weights{p.weights, p.hidden / 16, p.inner / 64};
    const int pieces = weights.pieces(), live = min(*p.live, p.capacity / p.top_k);
    const int segments = list_work(work, p.choice, live * p.top_k, p.capacity, p.experts, 8);

    // Unit and segment are the same here: one strip of each expert.
    Cursor now{0, 0, 0, 0};
    now.step(warp, pieces, 1);
    Cursor ahead = now;
    auto fetch_next = [&](int stage) {
        if (ahead.unit < segments)
            fetch(weights, work.segments[ahead.segment].expert, strip, ahead.piece, shared_address(ring) + stage * STAGE);
        copy_commit();
        ahead.step(WARPS, pieces, 1);
    };
    for (int stage = 0; stage < STAGES; ++stage) fetch_next(stage);
    int most = 1;
    for (int segment = 0; segment < segments; ++segment) most = max(most, static_cast<int>(work.segments[segment].count));
    const int window = p.sums / (pieces * most * 16);
    // Item i is (segment, token, row of 16); the first one of a thread gets its bias early.
    auto bias_of = [&](int segment, int row) {
        return __ldg(p.bias + static_cast<size_t>(work.segments[segment].expert) * p.hidden + strip * 16 + row);
    };
    const int item = threadIdx.x / 16 / most, row16 = threadIdx.x % 16;
    float bias = item < min(window, segments) ? bias_of(item, row16) : 0;

    pdl_wait();
    pdl_launch();
    // What a thread adds to at the end, and by which weight: fetched while the weights stream.
    float* const target = p.x + static_cast<size_t>(threadIdx.x / 16) * p.hidden + strip * 16 + row16;
    const bool adds = static_cast<int>(threadIdx.x) < live * 16;
    const float before = adds ? *target : 0;

    for (int base = 0, stage = 0; base < segments; base += window) {
        const int top = min(base + window, segments);
        while (now.unit < top) {
            const Segment segment = work.segments[now.segment];
            Tokens<1> tokens;
            tokens.at[0] = nullptr;
            if (lane / 4 < segment.count) {
                const size_t from = work.pairs[segment.first + lane / 4];
                tokens.at[0] = reinterpret_cast<const uint4*>(p.a + from * p.inner) + lane % 4;
            }
            tokens.load(now.piece, weights.tiles);
            copy_wait<STAGES - 1>();
            __syncwarp();
            float acc[1][4];
            multiply<1>(ring + stage * STAGE, min(PIECE, weights.tiles - now.piece * PIECE), tokens, acc);
            float* to = sums + (((now.unit - base) * pieces + now.piece) * most + lane % 4 * 2) * 16 + lane / 4;
            if (lane % 4 * 2 < segment.count) to[0] = acc[0][0], to[8] = acc[0][2];
            if (lane % 4 * 2 + 1 < segment.count) to[16] = acc[0][1], to[24] = acc[0][3];
            __syncwarp();
            fetch_next(stage);
            stage = stage == STAGES - 1 ? 0 : stage + 1;
            now.step(WARPS, pieces, 1);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < (top - base) * most * 16; i += THREADS) {
            const int at = base + i / 16 / most, token = i / 16 % most, row = i % 16;
            if (base > 0 || i >= THREADS) bias = bias_of(at, row);
            const Segment segment = work.segments[at];
            if (token >= segment.count) continue;
            const float* from = sums + ((at - base) * pieces * most + token) * 16 + row;
            float sum = 0;
            for (int piece = 0; piece < pieces; ++piece, from += most * 16) sum += from[0];
            products[work.pairs[segment.first + token] * 16 + row] = fmaf(sum, FP4_UNIT, bias);
        }
        __syncthreads();
    }
    copy_wait<0>();
    if (!adds) return;
    const int row = threadIdx.x / 16;
    float sum = 0;
    for (int slot = 0; slot < p.top_k; ++slot)
        sum = fmaf(p.weight[row * p.top_k + slot], products[(row * p.top_k + slot) * 16 + row16], sum);
    *target = before + sum;
}

KERNEL __launch_bounds__(THREADS, 1) moe_down_large(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char shared[];
    const int warp = threadIdx.x / 32;
    const Work work = work_at(shared + RING, p.capacity);
    const Strips weights{p.weights, p.hidden / 16, p.inner / 64};
    const int units = weights.strips * list_work(work, p.choice, min(*p.live * p.top_k, p.capacity), p.capacity, p.experts, 16);
    const int begin = static_cast<int>(static_cast<int64_t>(units) * blockIdx.x / gridDim.x);
    const int end = static_cast<int>(static_cast<int64_t>(units) * (blockIdx.x + 1) / gridDim.x);
    auto row_of = [&](int pair) { return pair; };
    auto done = [&](const Segment& segment, int strip, int tile, const float (&sum)[4]) {
        const int lane = threadIdx.x % 32, row = strip * 16 + lane / 4, token = tile * 8 + lane % 4 * 2;
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
        weights, work, reinterpret_cast<const uint4*>(p.a), shared + warp * (STAGES * STAGE), row_of, done};
    streamer.run(begin, end, [] {
        pdl_wait();
        pdl_launch();
    });
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
