// The experts' products with bf16 weights, for rows sorted by expert (moe_sort): gate and up with SwiGLU, and down. Weights are operand A,
// rows operand B, both as the panel layout holds them: a bulk copy brings 64 k of either.
//
// Two shapes on Hopper, blocks that stay in both. `few`: 64 weight rows by up to 64 sorted rows, one warpgroup, two blocks to a
// multiprocessor (one, of a single row), 200 KB of rings in all, because the weights' bytes are what counts. `many`: 128 weight rows by up to 256 sorted rows,
// two warpgroups, because the products are. Elsewhere eight warps copy and multiply 16 rows each by 64 sorted rows, with mma.sync.
#include "common/products.cuh"
#include "common/swiglu.cuh"
#include "common/wgmma_more.cuh"

struct Params {
    const void* w;      // panels of [w_rows, cols]: the experts one after another
    const float* bias;  // [w_rows]: gate/up: gate i at 2i, up i at 2i + 1; down: rows in order
    const void* x;      // panels of [capacity, cols]
    void* y;            // gate/up: panels of [capacity, rows / 2]; down: [capacity, rows]
    const int4* tiles;  // {expert, first sorted row, sorted rows (a multiple of 8), 0}
    const int* count;   // tiles
    int cols;           // multiple of 64
    int rows;           // of one expert, a multiple of 16
    int w_rows;         // of all
    int capacity;       // multiple of 8
    int group;          // tiles that are swept together, for reuse of weights in L2
    float alpha, limit; // SwiGLU: sigmoid's factor, clamp
};

// What becomes of the sums.
enum Output { SWIGLU, DOWN };

// What a block multiplies at a time: some rows of one expert by the rows of one tile.
struct Piece {
    int4 tile;
    int row;
};

// Piece `at` of the list: groups of some tiles; within a group the first weight rows with all its tiles, then the next.
DEVICE Piece piece_of(const Params& p, int at, int row_tiles, int count, int rows) {
    const int group = at / (row_tiles * p.group), rest = at - group * row_tiles * p.group;
    const int size = min(p.group, count - group * p.group);
    return {p.tiles[group * p.group + rest % size], rest / size * rows};
}

// Biases of a lane's two weight rows, of the warp's 16 from `row` on; read ahead of the products.
struct Biases {
    float low = 0, high = 0;

    template <Output OUT> __device__ __forceinline__ void load(const Params& p, int expert, int row) {
        if (row >= p.rows) return;
        const int g = threadIdx.x % 32 / 4;
        const float* const from = p.bias + static_cast<size_t>(expert) * p.rows + row;
        low = __ldg(from + (OUT == SWIGLU ? 2 * g : g)), high = __ldg(from + (OUT == SWIGLU ? 2 * g + 1 : g + 8));
    }
};

// Sums of the warp's 16 weight rows from `row` on, for N sorted rows from `first` on, of which `tokens` are to be stored. Of d, lane
// (g, t) holds at 4 j.. {row g: sorted rows 8 j + 2 t, + 1}, {row g + 8: the same}; row g is a gate and row g + 8 its up.
template <int N, Output OUT> DEVICE void store(const Params& p, const float (&d)[N / 2], const Biases& bias, int row, int first, int tokens) {
    if (row >= p.rows) return;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    // A multiple of 8 rows further is a multiple of 1024 bytes further in a panel.
    char* y = static_cast<char*>(p.y) + (OUT == SWIGLU ? panel_chunk(first + g, row / 2, p.capacity) + 4 * t
                                                       : (static_cast<size_t>(first + g) * p.rows + row + 2 * t) * 2);
    const size_t stride = OUT == SWIGLU ? 1024 : static_cast<size_t>(p.rows) * 16;
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
        if (8 * j >= tokens) break;
        const float v[4] = {d[4 * j] + bias.low, d[4 * j + 1] + bias.low, d[4 * j + 2] + bias.high, d[4 * j + 3] + bias.high};
        if constexpr (OUT == SWIGLU) {
            const float even = swiglu(v[0], v[2], p.alpha, p.limit), odd = swiglu(v[1], v[3], p.alpha, p.limit);
            *reinterpret_cast<uint32_t*>(y) = transpose8(pack2<__nv_bfloat16>(even, odd));
        } else {
            *reinterpret_cast<uint32_t*>(y) = transpose8(pack2<__nv_bfloat16>(v[0], v[1]));
            *reinterpret_cast<uint32_t*>(y + 16) = transpose8(pack2<__nv_bfloat16>(v[2], v[3]));
        }
        y += stride;
    }
}

template <Output OUT> DEVICE void moe_gemm_portable(const Params& p) {
    constexpr int ROWS = 128, TOKENS = 64, STAGES = 3, STAGE_BYTES = (ROWS + TOKENS) * 128, THREADS = ROWS * 2;
    extern __shared__ __align__(1024) char shared[];
    const uint32_t stages = shared_address(shared);
    pdl_wait();
    pdl_launch();
    const int count = *p.count, row_tiles = (p.rows + ROWS - 1) / ROWS, steps = p.cols / 64, warp = threadIdx.x / 32;
    for (int at = blockIdx.x; at < count * row_tiles; at += gridDim.x) {
        const Piece piece = piece_of(p, at, row_tiles, count, ROWS);
        const int4 tile = piece.tile;
        const int row = piece.row + warp * 16;
        const char* w = static_cast<const char*>(p.w) + (static_cast<size_t>(tile.x) * p.rows + piece.row) * 128;
        Biases bias;
        bias.load<OUT>(p, tile.x, row);
        for (int done = 0; done < tile.z; done += TOKENS) {
            const char* x = static_cast<const char*>(p.x) + static_cast<size_t>(tile.y + done) * 128;
            const auto fill = [&](int step) {
                if (step < steps) {
                    const uint32_t to = stages + step % STAGES * STAGE_BYTES;
                    copy_lines<ROWS, THREADS>(to, w + static_cast<size_t>(step) * p.w_rows * 128, p.rows - piece.row);
                    copy_lines<TOKENS, THREADS>(to + ROWS * 128, x + static_cast<size_t>(step) * p.capacity * 128, tile.z - done);
                }
                copy_commit();
            };
            float d[TOKENS / 8][4] = {};
            multiply_portable<ROWS, TOKENS, STAGES>(d, stages, steps, fill);
            store<TOKENS, OUT>(p, reinterpret_cast<const float(&)[TOKENS / 2]>(d), bias, row, tile.y + done, tile.z - done);
        }
    }
}

#ifdef HOPPER

// A ragged tile multiplies as few columns as an instruction made for it has.
template <int MAX, class Run> DEVICE void for_columns(int rows, const Run& run) {
    if constexpr (MAX <= 64) {
        if (rows <= 8) run(Columns<8>{});
        else if (MAX == 16 || rows <= 16) run(Columns<16>{});
        else if (rows <= 24) run(Columns<24>{});
        else if (MAX == 32 || rows <= 32) run(Columns<32>{});
        else if (rows <= 48) run(Columns<48>{});
        else run(Columns<64>{});
    } else if constexpr (MAX == 128) {
        if (rows <= 16) run(Columns<16>{});
        else if (rows <= 32) run(Columns<32>{});
        else if (rows <= 48) run(Columns<48>{});
        else if (rows <= 64) run(Columns<64>{});
        else if (rows <= 96) run(Columns<96>{});
        else run(Columns<128>{});
    } else {
        if (rows <= 64) run(Columns<64>{});
        else if (rows <= 96) run(Columns<96>{});
        else if (rows <= 128) run(Columns<128>{});
        else if (rows <= 160) run(Columns<160>{});
        else if (rows <= 192) run(Columns<192>{});
        else if (rows <= 224) run(Columns<224>{});
        else run(Columns<256>{});
    }
}

// The thread that copies: stages of ROWS weight rows and a tile's rows, 64 k of both.
template <int ROWS, int STAGE_BYTES, class R> DEVICE void produce(const Params& p, R& ring, uint32_t stages, int count) {
    const int row_tiles = (p.rows + ROWS - 1) / ROWS, steps = p.cols / 64;
    for (int at = blockIdx.x; at < count * row_tiles; at += gridDim.x) {
        const Piece piece = piece_of(p, at, row_tiles, count, ROWS);
        const uint32_t a_bytes = min(ROWS, p.rows - piece.row) * 128, b_bytes = piece.tile.z * 128;
        const char* a = static_cast<const char*>(p.w) + (static_cast<size_t>(piece.tile.x) * p.rows + piece.row) * 128;
        const char* b = static_cast<const char*>(p.x) + static_cast<size_t>(piece.tile.y) * 128;
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
}

// GROUPS warpgroups of 64 weight rows each, tiles of up to MAX sorted rows.
template <int GROUPS, int MAX, int STAGES, Output OUT> DEVICE void moe_gemm(const Params& p) {
    constexpr int ROWS = GROUPS * 64, STAGE_BYTES = (ROWS + MAX) * 128, CONSUMERS = GROUPS * 4;
    extern __shared__ __align__(1024) char shared[];
    __shared__ __align__(8) uint64_t barriers[2 * STAGES];
    const uint32_t stages = shared_address(shared);
    Ring<STAGES, 1, CONSUMERS> ring(shared_address(barriers));
    if (threadIdx.x == 0) ring.init();
    __syncthreads();
    pdl_wait();
    pdl_launch();
    const int count = *p.count, warp = threadIdx.x / 32;
    if (warp >= CONSUMERS) {
        if constexpr (GROUPS > 1) registers_shrink<24>();
        if (threadIdx.x != CONSUMERS * 32) return;
        global_proxy_fence();
        produce<ROWS, STAGE_BYTES>(p, ring, stages, count);
    } else {
        if constexpr (GROUPS > 1) registers_grow<240>();
        const int row_tiles = (p.rows + ROWS - 1) / ROWS;
        for (int at = blockIdx.x; at < count * row_tiles; at += gridDim.x) {
            const Piece piece = piece_of(p, at, row_tiles, count, ROWS);
            const int row = piece.row + warp * 16;
            Biases bias;
            bias.load<OUT>(p, piece.tile.x, row);
            for_columns<MAX>(piece.tile.z, [&](auto columns) {
                constexpr int N = columns.value;
                float d[N / 2] = {};
                give_back(multiply_stages<N, STAGE_BYTES>(d, ring, stages, warp / 4 * 8192, ROWS * 128, p.cols / 64));
                store<N, OUT>(p, d, bias, row, piece.tile.y, piece.tile.z);
            });
        }
    }
}

#define BODY(GROUPS, MAX, STAGES, OUT) moe_gemm<GROUPS, MAX, STAGES, OUT>(p)
#else
#define BODY(GROUPS, MAX, STAGES, OUT)
#endif

#define DEFINE(NAME, OUT)                                                                                                  \
    KERNEL __launch_bounds__(160, 1) NAME##_one(const __grid_constant__ Params p) { BODY(1, 16, 22, OUT); }                \
    KERNEL __launch_bounds__(160, 2) NAME##_16(const __grid_constant__ Params p) { BODY(1, 16, 11, OUT); }                 \
    KERNEL __launch_bounds__(160, 2) NAME##_32(const __grid_constant__ Params p) { BODY(1, 32, 9, OUT); }                  \
    KERNEL __launch_bounds__(160, 2) NAME##_64(const __grid_constant__ Params p) { BODY(1, 64, 6, OUT); }                  \
    KERNEL __launch_bounds__(384, 1) NAME##_128(const __grid_constant__ Params p) { BODY(2, 128, 7, OUT); }                \
    KERNEL __launch_bounds__(384, 1) NAME##_256(const __grid_constant__ Params p) { BODY(2, 256, 4, OUT); }                \
    KERNEL __launch_bounds__(256) NAME##_portable(const __grid_constant__ Params p) { moe_gemm_portable<OUT>(p); }
DEFINE(moe_gate_up_bf16, SWIGLU)
DEFINE(moe_down_bf16, DOWN)
