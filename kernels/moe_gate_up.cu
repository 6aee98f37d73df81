// Gate/up of the chosen experts and the clamped SwiGLU, for small batches: a[pair] = SwiGLU(W_e h[row] + b_e) for each of the
// top_k experts e of a row. Weights are read once for up to 16 tokens of an expert.
//
// `small` and `wide`, for at most 8 rows: the pieces of all units of a block are dealt to its warps, partial sums meet in shared memory.
// `large` and `vast`: a warp computes whole strips. Both sum in the same order.
#include "common/pipe.cuh"

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
    int stages;           // of the ring (pipe)
    float alpha;
    float limit;
};

extern __shared__ __align__(128) char shared[];

DEVICE void store(const Params& p, int pair, int row, float gate, float up, float2 bias) {
    const float value = swiglu(fmaf(gate, FP4_UNIT, bias.x), fmaf(up, FP4_UNIT, bias.y), p.alpha, p.limit);
    p.a[static_cast<size_t>(pair) * p.inner + fragment(row)] = __float2half_rn(value);
}

DEVICE float2 bias_of(const Params& p, int expert, int row) {
    return __ldg(reinterpret_cast<const float2*>(p.bias) + static_cast<size_t>(expert) * p.inner + row);
}

template <bool ONE> DEVICE void few_rows(const Params& p) {
    const int warps = blockDim.x / 32 - PRODUCERS, threads = warps * 32;
    char* const ring = shared + BARRIERS;
    float* const sums = reinterpret_cast<float*>(ring + STAGES * warps * PIECE_BYTES);
    const Work work = work_at(reinterpret_cast<char*>(sums + p.sums), p.capacity);
    const int strips = p.inner / 8, tiles = p.hidden / 64, pieces = (tiles + PIECE - 1) / PIECE, slices = (pieces + warps - 1) / warps;
    init_barriers(shared_address(shared), warps);

    // What is chosen is known only after the wait; the next kernel may start then, knowing that `choice` is complete.
    pdl_wait();
    pdl_launch();
    const int units = strips * list_work(work, p.choice, min(*p.live * p.top_k, p.capacity), p.capacity, p.experts, GROUP_FEW);
    const int begin = share(units, blockIdx.x), end = share(units, blockIdx.x + 1);
    if (begin == end) return;

    const Strips from{work, p.weights, strips * strip_bytes(tiles), strips, tiles, 0};
    Slices<false> slice{from, shared_address(shared), shared_address(ring), warps, slices, end - begin, begin / strips, begin % strips};
    if (!feed(slice, (end - begin) * slices)) return;
    auto row_of = [&](int pair) { return reinterpret_cast<const uint4*>(p.h + static_cast<size_t>(pair / p.top_k) * p.hidden); };
    Sharer<false, ONE, decltype(row_of)> sharer{
        from, slice, ring, shared_address(shared), warps, slices, row_of, begin / strips, begin % strips};

    // A window is as many units as there is room for.
    const int most = most_tokens(work, begin, end, strips), window = p.sums / (pieces * most * 16);
    for (int base = begin; base < end; base += window) {
        const int count = min(window, end - base), items = count * most * 8;
        // Item i is (unit, token, row of eight); the first one of a thread gets its bias early.
        auto bias_at = [&](int item) {
            const int unit = base + item / (8 * most);
            return bias_of(p, work.segments[unit / strips].expert, unit % strips * 8 + item % 8);
        };
        float2 bias = make_float2(0, 0);
        if (static_cast<int>(threadIdx.x) < items) bias = bias_at(threadIdx.x);
        sharer.multiply_units(count, sums, most);
        sync_computing(warps);
#pragma unroll 1
        for (int item = threadIdx.x; item < items; item += threads) {
            const int unit = item / (8 * most), token = item / 8 % most, row = item % 8;
            if (item >= threads) bias = bias_at(item);
            const Segment segment = work.segments[(base + unit) / strips];
            if (token >= segment.count) continue;
            const float* in = sums + (unit * pieces * most + token) * 16 + row;
            const float gate = sum_pieces(in, pieces, most * 16), up = sum_pieces(in + 8, pieces, most * 16);
            store(p, work.pairs[segment.first + token], (base + unit) % strips * 8 + row, gate, up, bias);
        }
        sync_computing(warps);
    }
    drain();
}

KERNEL __launch_bounds__(MOST_THREADS, 1) moe_gate_up_few(const __grid_constant__ Params p) { few_rows<true>(p); }
// For more pieces than warps.
KERNEL __launch_bounds__(MOST_THREADS, 1) moe_gate_up_wide(const __grid_constant__ Params p) { few_rows<false>(p); }

template <bool STAGED> DEVICE void many_rows(const Params& p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    char* const ring = shared + BARRIERS + 64;
    const int strips = p.inner / 8, tiles = p.hidden / 64;
    uint4* const staged = reinterpret_cast<uint4*>(ring + warps * STAGES * PIECE_BYTES);
    const Work work = work_at(reinterpret_cast<char*>(staged) + (STAGED ? GROUP_MANY * (tiles * 128 + 64) : 0), p.capacity);
    init_own_barriers(shared_address(shared), warps);
    pdl_wait();
    pdl_launch();
    const int units = strips * list_work(work, p.choice, min(*p.live * p.top_k, p.capacity), p.capacity, p.experts, GROUP_MANY);
    const int begin = share(units, blockIdx.x), end = share(units, blockIdx.x + 1);
    const Strips from{work, p.weights, strips * strip_bytes(tiles), strips, tiles, 0};
    auto row_of = [&](int pair) { return reinterpret_cast<const uint4*>(p.h + static_cast<size_t>(pair / p.top_k) * p.hidden); };
    auto done = [&](const Segment& segment, int strip, int tile, const float (&sum)[4]) {
        const int row = strip * 8 + lane / 4, token = tile * 8 + lane % 4 * 2;
        const float2 bias = bias_of(p, segment.expert, row);
        if (token < segment.count) store(p, work.pairs[segment.first + token], row, sum[0], sum[2], bias);
        if (token + 1 < segment.count) store(p, work.pairs[segment.first + token + 1], row, sum[1], sum[3], bias);
    };
    Streamer<STAGED, decltype(row_of), decltype(done)> streamer{
        from, shared_address(shared) + warp * STAGES * 8, shared_address(shared) + BARRIERS, ring + warp * STAGES * PIECE_BYTES, staged,
        warps, row_of, done};
    streamer.start(begin, end);
    streamer.run(begin, end);
}

KERNEL __launch_bounds__(MOST_THREADS, 1) moe_gate_up_large(const __grid_constant__ Params p) { many_rows<true>(p); }
// Where tokens do not fit shared memory.
KERNEL __launch_bounds__(MOST_THREADS, 1) moe_gate_up_vast(const __grid_constant__ Params p) { many_rows<false>(p); }

KERNEL __launch_bounds__(640, 1) moe_gate_up_pipe(const __grid_constant__ Params p) {
#ifdef HOPPER
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tiles = p.hidden / 64, pieces = (tiles + PIECE - 1) / PIECE;
    Product product{p.weights, p.bias, p.h, p.top_k, p.inner / 8, tiles};
    char* const ring = shared + PIPE_FIXED + FINISHERS * pieces * SUMS * 16;
    const Work work = work_at(ring + p.stages * product.strip_size(), p.capacity);
    const Pipe pipe{work, shared_address(shared), shared_address(ring), p.stages, product.strip_size(), pieces, shared + BARRIERS,
                    reinterpret_cast<float4*>(shared + PIPE_FIXED)};
    if (threadIdx.x == 0) pipe.init(), barrier_init_fence();
    pdl_wait();
    pdl_launch();
    product.deal(work, list_work(work, p.choice, min(*p.live * p.top_k, p.capacity), p.capacity, p.experts, GROUP_PIPE));
    if (warp < MULTIPLIERS) {
        registers_of_multipliers();
        Multiplier{pipe}.run(product);
        return;
    }
    registers_of_others();
    if (warp == MULTIPLIERS) {
        if (lane == 0) Copier{pipe}.run(product);
    } else {
        Finisher{pipe, warp - MULTIPLIERS - 1}.run(product, [&](const Segment& segment, int strip, int tile, const float (&sum)[4], const float* biases) {
            const int row = strip * 8 + lane / 4, token = tile * 8 + lane % 4 * 2;
            const float2 bias = make_float2(biases[lane / 4 * 2], biases[lane / 4 * 2 + 1]);
            if (token < segment.count) store(p, work.pairs[segment.first + token], row, sum[0], sum[2], bias);
            if (token + 1 < segment.count) store(p, work.pairs[segment.first + token + 1], row, sum[1], sum[3], bias);
        });
    }
#endif
}
