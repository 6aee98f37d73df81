// Products of at most 16 token rows on Hopper, where few blocks must not each read all tokens: the eight blocks of a cluster share the
// columns. Their warps, eight too, have TILES tiles of 8 outputs each, the same in every block; then warp w sends its sums to block w of the
// cluster, which adds them up in the order of the blocks and stores them. So a block reads an eighth of the tokens, and two blocks, of
// consecutive launches, fit a multiprocessor.
//
// Weights come by bulk copies through a ring of each warp (STAGES stages of one panel x TILES tiles, contiguous in W).
//
// Shared memory: rings [8][STAGES][TILES * 1024]; tokens, bf16 panels of [lines, columns of a block]; sums that others sent [8][part];
// sums of squares [8][lines], if the input is normed; barriers [1 + 8 * STAGES].
#pragma once
#include "common/gemv.cuh"
#include "common/inbox.cuh"
#include "common/wgmma.cuh"

#ifdef HOPPER
namespace gemv {

constexpr int SPLIT = 8;  // blocks of a cluster, warps of a block

// ROWS is 8 or 16: the most token rows. The first stage goes to registers before the wait, so that its place is filled again.
template <int TILES, int STAGES, int ROWS, class Input, class Output>
DEVICE void run_split(const Product& m, Input input, const Output& output, float mean, float eps) {
    extern __shared__ __align__(128) unsigned char shared[];
    constexpr bool HIGH = ROWS > 8;
    constexpr int STAGE = TILES * 1024, LANE = HIGH ? 16 : 8, PART = TILES * 32 * LANE;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int rank = cluster_rank(), cluster = blockIdx.x / SPLIT;
    const int begin = m.panels * rank / SPLIT, count = m.panels * (rank + 1) / SPLIT - begin;
    const int first_tile = cluster * SPLIT * TILES;
    const auto tiles_of = [&](int group) { return max(0, min(TILES, m.outputs / 8 - first_tile - group * TILES)); };
    const int tiles = tiles_of(warp), stored_tiles = tiles_of(rank);
    unsigned char* const ring = shared + warp * STAGES * STAGE;
    unsigned char* const tokens = shared + SPLIT * STAGES * STAGE;
    unsigned char* const inbox = tokens + (m.panels + SPLIT - 1) / SPLIT * m.lines * 128;
    float* const squares = reinterpret_cast<float*>(inbox + SPLIT * PART);
    const Share share{begin, count, lane, tokens, squares + rank * m.lines};
    // Barriers: the inbox's, then those of the rings.
    const uint32_t inbox_barrier = shared_address(squares + (Input::NORMED ? (SPLIT * m.lines + 3) / 4 * 4 : 0)), full = inbox_barrier + 8 + warp * STAGES * 8;

    const size_t panel_bytes = static_cast<size_t>(m.outputs) * 128;
    const char* weights = static_cast<const char*>(m.weights) + begin * panel_bytes +
                          static_cast<size_t>(first_tile + warp * TILES) * 1024;
    const int panels = tiles > 0 ? count : 0;
    int asked = 0;
    const auto fill = [&](int stage) {
        if (lane == 0 && asked < panels) {
            barrier_expect(full + stage * 8, tiles * 1024);
            bulk_load(shared_address(ring) + stage * STAGE, weights, tiles * 1024, full + stage * 8);
        }
        weights += panel_bytes;
        ++asked;
    };
    if (lane == 0) {
#pragma unroll
        for (int stage = 0; stage < STAGES; ++stage) barrier_init(full + stage * 8, 1);
        barrier_init_fence();
    }
    __syncwarp();
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) fill(stage);
    if (warp == 0) {
        const int sums = stored_tiles > 0 ? SPLIT * TILES * (HIGH ? 512 : m.lines * 32) : 0;
        inbox_open(inbox_barrier, sums + (Input::NORMED ? (SPLIT - 1) * m.lines * 4 : 0));
    }
    __syncwarp();
    cluster_arrive();

    int missing = panels;
    if (panels > 0 && m.launch >= panels) pdl_launch();
    uint4 b[TILES][2];
    int stage = 0;
    uint32_t parity = 0;
    const auto take = [&] {
        barrier_wait(full + stage * 8, parity);
        const unsigned char* line = ring + stage * STAGE + g * 128;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int s = 0; s < 2; ++s)
                b[tile][s] = *reinterpret_cast<const uint4*>(line + tile * 1024 + (((2 * t + s) ^ g) << 4));
        __syncwarp();
        fill(stage);
        if (++stage == STAGES) stage = 0, parity ^= 1;
        if (--missing == m.launch) pdl_launch();
    };

    input.before_wait(share);
    if (panels > 0) take();
    pdl_wait();
    // No block sends before all have opened their inboxes.
    cluster_wait();
    input.template stage<ROWS / SPLIT, SPLIT>(m, share, warp);
    const int live = __ldcg(m.live) - m.first;
    if (Input::NORMED) {
        __syncwarp();
#pragma unroll
        for (int line = warp; line < ROWS; line += SPLIT)
            if (line < m.lines && lane < SPLIT && lane != rank)
                send(shared_address(share.squares + line), inbox_barrier, lane, share.squares[line]);
    }
    __syncthreads();

    // What this thread stores first of the sums that come to this block.
    const auto row_of = [&](int unit) { return unit / TILES * 8 + g; };
    const auto column_of = [&](int unit) { return (first_tile + rank * TILES + unit % TILES) * 8 + 2 * t; };
    constexpr int UNITS = (HIGH ? 2 : 1) * TILES;
    const auto is_stored = [&](int unit) { return unit < UNITS && row_of(unit) < m.lines && unit % TILES < stored_tiles; };
    const bool own = is_stored(warp);
    typename Output::Early early{};
    if (own) early = output.load(m.first + row_of(warp), column_of(warp));
    float sums[TILES][4];
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[tile][i] = 0;
    for (int panel = 0; panel < panels; ++panel) {
        const unsigned char* line = tokens + (panel * m.lines + g) * 128;
        uint4 low[2], high[2];
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            const int at = ((2 * t + s) ^ g) << 4;
            low[s] = g < m.lines ? *reinterpret_cast<const uint4*>(line + at) : make_uint4(0, 0, 0, 0);
            high[s] = HIGH && g + 8 < m.lines ? *reinterpret_cast<const uint4*>(line + 1024 + at) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int s = 0; s < 2; ++s) {
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
                mma_bf16(sums[tile], low[s].x, high[s].x, low[s].y, high[s].y, b[tile][s].x, b[tile][s].y);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
                mma_bf16(sums[tile], low[s].z, high[s].z, low[s].w, high[s].w, b[tile][s].z, b[tile][s].w);
        }
        if (panel + 1 < panels) take();
    }
    if (tiles > 0) {
        const uint32_t to = shared_address(inbox) + rank * PART + lane * LANE;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            const float (&v)[4] = sums[tile];
            if (HIGH)
                send(to + tile * 32 * LANE, inbox_barrier, warp, make_float4(v[0], v[1], v[2], v[3]));
            else if (g < m.lines)
                send(to + tile * 32 * LANE, inbox_barrier, warp, make_float2(v[0], v[1]));
        }
    }
    if (own) output.refine(early);
    inbox_wait(inbox_barrier);
    for (int unit = warp; unit < UNITS; unit += SPLIT) {
        const int row = row_of(unit), tile = unit % TILES;
        if (!is_stored(unit) || row >= live) continue;
        const unsigned char* from = inbox + (tile * 32 + lane) * LANE + unit / TILES * 8;
        float2 sum = make_float2(0, 0);
        float square = 0;
#pragma unroll
        for (int block = 0; block < SPLIT; ++block) {
            const float2 part = *reinterpret_cast<const float2*>(from + block * PART);
            sum.x += part.x, sum.y += part.y;
            if (Input::NORMED) square += squares[block * m.lines + row];
        }
        if (Input::NORMED) {
            const float scale = rsqrtf(fmaf(square, mean, eps));
            sum = make_float2(__fmul_rn(sum.x, scale), __fmul_rn(sum.y, scale));
        }
        if (unit != warp) {
            early = output.load(m.first + row, column_of(unit));
            output.refine(early);
        }
        output.store(m.first + row, column_of(unit), sum, early);
    }
}

}  // namespace gemv
#endif
