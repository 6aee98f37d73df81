// Gate/up of the chosen experts and the clamped SwiGLU, for small batches: a[pair] = SwiGLU(W_e h[row] + b_e) for each of the
// top_k experts e of a row. Weights are read once for up to 16 tokens of an expert.
//
// `small`, for at most 8 rows: the pieces of all units of a block are dealt to its warps, partial sums meet in shared memory.
// `large`: a warp computes whole strips. Both sum in the same order.
#include "common/experts.cuh"

struct Params {
    const char* weights;  // gate/up strips [experts][inner / 8], hidden / 64 tiles each
    const float* bias;    // [experts, 2 * inner]: gate i at 2i, up i at 2i + 1
    const __half* h;      // [rows, hidden], fragment order
    const int* choice;    // [rows, top_k]
    const int* live;      // rows to do
    __half* a;            // [rows * top_k, inner], fragment order
    int hidden;           // multiple of 64
    int inner;            // multiple of 64
    int experts;          // at most 128
    int top_k;
    int capacity;         // rows * top_k: pairs that fit
    int sums;             // floats of shared memory for partial sums (small)
    float alpha;
    float limit;
};

// `gate * sigmoid(alpha * gate) * (up + 1)` of the clamped pair; a NaN stays one.
DEVICE float swiglu(float gate, float up, float alpha, float limit) {
    gate = gate > limit ? limit : gate;
    up = up > limit ? limit : up < -limit ? -limit : up;
    return gate / (1.0f + expf(-alpha * gate)) * (up + 1.0f);
}

// Where column `col` of a row is in fragment order.
DEVICE int fragment(int col) { return (col & ~31) + ((col >> 1 & 3) << 3) + ((col >> 3 & 3) << 1) + (col & 1); }

DEVICE void store(const Params& p, int pair, int row, float gate, float up, float2 bias) {
    const float value = swiglu(fmaf(gate, FP4_UNIT, bias.x), fmaf(up, FP4_UNIT, bias.y), p.alpha, p.limit);
    p.a[static_cast<size_t>(pair) * p.inner + fragment(row)] = __float2half_rn(value);
}

DEVICE float2 bias_of(const Params& p, int expert, int row) {
    return __ldg(reinterpret_cast<const float2*>(p.bias) + static_cast<size_t>(expert) * p.inner + row);
}

KERNEL __launch_bounds__(THREADS, 2) moe_gate_up_small(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char shared[];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    char* const ring = shared + warp * (STAGES * STAGE);
    float* const sums = reinterpret_cast<float*>(shared + RING);
    const Work work = work_at(shared + RING + p.sums * 4, p.capacity);
    const Strips weights{p.weights, p.inner / 8, p.hidden / 64};
    const int pieces = weights.pieces();

    // What is chosen is known only after the wait; the next kernel may start then, knowing that `choice` is complete.
    pdl_wait();
    pdl_launch();
    const int units = weights.strips * list_work(work, p.choice, min(*p.live * p.top_k, p.capacity), p.capacity, p.experts, 8);
    const int begin = static_cast<int>(static_cast<int64_t>(units) * blockIdx.x / gridDim.x);
    const int end = static_cast<int>(static_cast<int64_t>(units) * (blockIdx.x + 1) / gridDim.x);
    if (begin == end) return;

    Cursor now{begin, begin / weights.strips, begin % weights.strips, 0};
    now.step(warp, pieces, weights.strips);
    Cursor ahead = now;
    auto fetch_next = [&](int stage) {
        if (ahead.unit < end)
            fetch(weights, work.segments[ahead.segment].expert, ahead.strip, ahead.piece, shared_address(ring) + stage * STAGE);
        copy_commit();
        ahead.step(WARPS, pieces, weights.strips);
    };
    for (int stage = 0; stage < STAGES; ++stage) fetch_next(stage);

    // Partial sums: [unit of the window][piece][token][16 rows]. A window is as many units as there is room for.
    int most = 1;
    for (int segment = begin / weights.strips; segment <= (end - 1) / weights.strips; ++segment)
        most = max(most, static_cast<int>(work.segments[segment].count));
    const int window = p.sums / (pieces * most * 16);
    for (int base = begin, stage = 0; base < end; base += window) {
        const int top = min(base + window, end), items = (top - base) * most * 8;
        // Item i is (unit, token, row of eight); the first one of a thread gets its bias early.
        auto place = [&](int item, int& unit, int& token, int& row) {
            row = item % 8, token = item / 8 % most, unit = base + item / (8 * most);
            const Segment segment = work.segments[unit / weights.strips];
            return segment;
        };
        float2 bias = make_float2(0, 0);
        int unit, token, row;
        if (static_cast<int>(threadIdx.x) < items) {
            const Segment segment = place(threadIdx.x, unit, token, row);
            bias = bias_of(p, segment.expert, unit % weights.strips * 8 + row);
        }
        while (now.unit < top) {
            const Segment segment = work.segments[now.segment];
            Tokens<1> tokens;
            tokens.at[0] = nullptr;
            if (lane / 4 < segment.count) {
                const size_t from = work.pairs[segment.first + lane / 4] / p.top_k;
                tokens.at[0] = reinterpret_cast<const uint4*>(p.h + from * p.hidden) + lane % 4;
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
            now.step(WARPS, pieces, weights.strips);
        }
        __syncthreads();
        for (int item = threadIdx.x; item < items; item += THREADS) {
            const Segment segment = place(item, unit, token, row);
            const int first = unit % weights.strips * 8 + row;
            if (item != static_cast<int>(threadIdx.x)) bias = bias_of(p, segment.expert, first);
            if (token >= segment.count) continue;
            const float* from = sums + (unit - base) * pieces * most * 16 + token * 16 + row;
            float gate = 0, up = 0;
            for (int piece = 0; piece < pieces; ++piece, from += most * 16) gate += from[0], up += from[8];
            store(p, work.pairs[segment.first + token], first, gate, up, bias);
        }
        __syncthreads();
    }
    copy_wait<0>();
}

KERNEL __launch_bounds__(THREADS, 1) moe_gate_up_large(const __grid_constant__ Params p) {
    extern __shared__ __align__(128) char shared[];
    const int warp = threadIdx.x / 32;
    const Work work = work_at(shared + RING, p.capacity);
    const Strips weights{p.weights, p.inner / 8, p.hidden / 64};
    pdl_wait();
    pdl_launch();
    const int units = weights.strips * list_work(work, p.choice, min(*p.live * p.top_k, p.capacity), p.capacity, p.experts, 16);
    const int begin = static_cast<int>(static_cast<int64_t>(units) * blockIdx.x / gridDim.x);
    const int end = static_cast<int>(static_cast<int64_t>(units) * (blockIdx.x + 1) / gridDim.x);
    auto row_of = [&](int pair) { return pair / p.top_k; };
    auto done = [&](const Segment& segment, int strip, int tile, const float (&sum)[4]) {
        const int lane = threadIdx.x % 32, row = strip * 8 + lane / 4, token = tile * 8 + lane % 4 * 2;
        const float2 bias = bias_of(p, segment.expert, row);
        if (token < segment.count) store(p, work.pairs[segment.first + token], row, sum[0], sum[2], bias);
        if (token + 1 < segment.count) store(p, work.pairs[segment.first + token + 1], row, sum[1], sum[3], bias);
    };
    Streamer<decltype(row_of), decltype(done)> streamer{
        weights, work, reinterpret_cast<const uint4*>(p.h), shared + warp * (STAGES * STAGE), row_of, done};
    streamer.run(begin, end, [] {});
}
