// Products of at most 16 token rows with a bf16 matrix [outputs, cols] in panel layout: y = x W^T, bound by reading W.
//
// A block owns TILES tiles of 8 outputs at a time; its warps share the columns, `slice` panels of 64 each. A warp streams its part of W
// through a ring of its own in shared memory (STAGES stages of one panel x TILES tiles, contiguous in W), multiplies with
// mma.m16n8k16 (tokens are A, weights B) and meets the other warps only when the sums over columns are added, in warp order.
// The ring is filled before `pdl_wait`: weights depend on nothing.
//
// The k order within a panel is permuted: lane (g, t) takes chunks 2t and 2t + 1 of 8 columns, of token g as of weight row g. So
// every operand is one conflict-free 16-byte read of a swizzled line.
//
// Shared memory: rings [warps][STAGES][TILES * 1024]; tokens, bf16 panels of [lines, cols]; sums of squares [warps][lines],
// padded to 16 bytes, if the input is normed; then, where a block walks, partial sums: two of [warps][lines][TILES * 8] floats.
// Where it does not they lie in the rings.
#pragma once
#include "common/common.cuh"

#define METHOD __device__ __forceinline__

namespace gemv {

constexpr int MAX_WARPS = 16;
// With few rows two blocks of 288 threads, of consecutive launches, are to have their registers on one SM.
constexpr int max_threads(int rows) { return rows > 8 ? 512 : 576; }

struct Product {
    const void* weights;  // panels of [outputs, cols]
    const int* live;      // token rows to do; what later ones hold stays with them and is not written
    int outputs;          // multiple of 8
    int panels;           // cols / 64
    int slice;            // panels of a warp; every warp has at least one
    int lines;            // token rows of this launch
    int first;            // the first of them
    int full, tail;       // rounds of TILES tiles that every block has, tiles of a block in a last round
    int launch;           // let the next kernel start when this many panels of a warp have not arrived yet
};

// The tiles of a block. One that does not walk has one round of TILES tiles; else TILES a round while every block has them, and an
// even share of the rest at last.
template <int TILES, bool WALKS> struct Rounds {
    int all, full, tail, count;
    METHOD explicit Rounds(const Product& m) : all(m.outputs / 8), full(m.full), tail(m.tail), count(1) {
        if (WALKS) count = full + (full * gridDim.x * TILES + blockIdx.x * tail < all);
    }
    METHOD int start(int round) const {
        if (!WALKS) return blockIdx.x * TILES;
        return round < full ? (round * gridDim.x + blockIdx.x) * TILES : full * gridDim.x * TILES + blockIdx.x * tail;
    }
    METHOD int size(int round) const { return min(!WALKS || round < full ? TILES : tail, all - start(round)); }
};

// A warp's share of the tokens: columns `begin * 64` on, `count` panels.
struct Share {
    int begin, count, lane;
    unsigned char* tokens;  // its panels of [lines, cols]
    float* squares;         // [lines]
};

// Float32 rows, normed: stores bf16(x * weight) and each row's sum of squares; 1 / rms is applied to the product.
struct NormedRows {
    static constexpr bool NORMED = true;
    static constexpr int UNITS = 3;  // float4 of a lane and row at once: 6 panels
    const float* x;                  // [rows, cols]
    const float* weight;             // [cols]
    const int* index;                // row of x for each token row; null is the same row
    unsigned sources;                // rows of x, if there is an index: those of rows that are not live may be anything
    int cols;
    float4 w[UNITS];

    METHOD void weights(const Share& s, int base) {
#pragma unroll
        for (int i = 0; i < UNITS; ++i) {
            const int unit = base + 32 * i;
            if (unit < s.count * 16) w[i] = __ldg(reinterpret_cast<const float4*>(weight + s.begin * 64) + unit);
        }
    }
    METHOD void before_wait(const Share& s) { weights(s, s.lane); }

    // All token rows, or, for a block whose warps share them, every SPLIT-th from `first` on.
    template <int ROWS> METHOD void stage(const Product& m, const Share& s) { stage<ROWS == 1 ? 1 : 6, 1>(m, s, 0); }
    template <int BATCH, int STEP> METHOD void stage(const Product& m, const Share& s, int first) {
        part<BATCH, STEP>(m, s, first, s.lane);
        for (int base = s.lane + 32 * UNITS; base - s.lane < s.count * 16; base += 32 * UNITS) {
            weights(s, base);
            part<BATCH, STEP>(m, s, first, base);
        }
    }

    template <int BATCH, int STEP> METHOD void part(const Product& m, const Share& s, int first, int unit0) const {
        for (int line0 = first; line0 < m.lines; line0 += BATCH * STEP) {
            float4 v[BATCH][UNITS];
#pragma unroll
            for (int k = 0; k < BATCH; ++k) {
                const int line = line0 + k * STEP;
                if (line >= m.lines) continue;
                int row = m.first + line;
                if (index) row = min(static_cast<unsigned>(__ldcg(index + row)), sources - 1);
                const float4* from = reinterpret_cast<const float4*>(x + static_cast<size_t>(row) * cols + s.begin * 64);
#pragma unroll
                for (int i = 0; i < UNITS; ++i) {
                    const int unit = unit0 + 32 * i;
                    if (unit < s.count * 16) v[k][i] = __ldcg(from + unit);
                }
            }
#pragma unroll
            for (int k = 0; k < BATCH; ++k) {
                const int line = line0 + k * STEP;
                if (line >= m.lines) continue;
                float squares = 0;
#pragma unroll
                for (int i = 0; i < UNITS; ++i) {
                    const int unit = unit0 + 32 * i;
                    if (unit >= s.count * 16) continue;
                    const float4 a = v[k][i];
                    squares = fmaf(a.x, a.x, fmaf(a.y, a.y, fmaf(a.z, a.z, fmaf(a.w, a.w, squares))));
                    const uint2 packed = make_uint2(pack2<__nv_bfloat16>(a.x * w[i].x, a.y * w[i].y),
                                                    pack2<__nv_bfloat16>(a.z * w[i].z, a.w * w[i].w));
                    const int chunk = (unit >> 1) & 7;
                    unsigned char* to = s.tokens + ((unit >> 4) * m.lines + line) * 128 + ((chunk ^ (line & 7)) << 4);
                    *reinterpret_cast<uint2*>(to + (unit & 1) * 8) = packed;
                }
                squares = warp_sum(squares);
                if (s.lane == 0) s.squares[line] = unit0 == s.lane ? squares : s.squares[line] + squares;
            }
        }
    }
};

// bf16 rows as they are.
struct PlainRows {
    static constexpr bool NORMED = false;
    static constexpr int UNITS = 2;  // 16 bytes of a lane and row at once: 8 panels
    const void* heads;  // [rows, cols]
    int cols;

    METHOD void before_wait(const Share&) {}

    template <int ROWS> METHOD void stage(const Product& m, const Share& s) const { stage<ROWS == 1 ? 1 : 4, 1>(m, s, 0); }
    template <int BATCH, int STEP> METHOD void stage(const Product& m, const Share& s, int first) const {
        for (int base = s.lane; base - s.lane < s.count * 8; base += 32 * UNITS) part<BATCH, STEP>(m, s, first, base);
    }

    template <int BATCH, int STEP> METHOD void part(const Product& m, const Share& s, int first, int unit0) const {
        for (int line0 = first; line0 < m.lines; line0 += BATCH * STEP) {
            uint4 v[BATCH][UNITS];
#pragma unroll
            for (int k = 0; k < BATCH; ++k) {
                const int line = line0 + k * STEP;
                const size_t at = static_cast<size_t>(m.first + line) * cols + s.begin * 64;
                const uint4* from = reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(heads) + at);
#pragma unroll
                for (int i = 0; i < UNITS; ++i) {
                    const int unit = unit0 + 32 * i;
                    if (line < m.lines && unit < s.count * 8) v[k][i] = __ldcg(from + unit);
                }
            }
#pragma unroll
            for (int k = 0; k < BATCH; ++k) {
                const int line = line0 + k * STEP;
#pragma unroll
                for (int i = 0; i < UNITS; ++i) {
                    const int unit = unit0 + 32 * i;
                    if (line >= m.lines || unit >= s.count * 8) continue;
                    unsigned char* to = s.tokens + ((unit >> 3) * m.lines + line) * 128 + (((unit & 7) ^ (line & 7)) << 4);
                    *reinterpret_cast<uint4*>(to) = v[k][i];
                }
            }
        }
    }
};

// Whether an output takes sums of two tiles at a time: of every 16 rows of the matrix the first eight are gates, the others the ups.
template <class Output, class = void> constexpr bool is_gated = false;
template <class Output> constexpr bool is_gated<Output, decltype(void(Output::GATED))> = Output::GATED;

// `Output` has: WALKS, whether a block has several rounds of tiles; a type `Early` of what it loads while weights still stream; `load(row, column)`, `refine` (arithmetic on it) and
// `store(row, column, {y[column], y[column + 1]}, early)`, `column` even. `mean` is one over the columns that are normed over.
// ROWS is 1 or 16: the most token rows. With one there are registers to hold the first stage over the wait, so that the ring is
// refilled before it.
template <int TILES, int STAGES, int ROWS, class Input, class Output>
DEVICE void run(const Product& m, Input input, const Output& output, float mean, float eps) {
    extern __shared__ __align__(128) unsigned char shared[];
    constexpr int STAGE = TILES * 1024, PAIRS = TILES * 4;
    constexpr bool HIGH = ROWS > 8, HOLD = ROWS == 1;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, g = lane / 4, t = lane % 4;
    const Rounds<TILES, Output::WALKS> rounds(m);
    const int begin = warp * m.slice, count = min(m.slice, m.panels - begin);
    unsigned char* ring = shared + warp * STAGES * STAGE;
    unsigned char* tokens = shared + warps * STAGES * STAGE;
    float* squares = reinterpret_cast<float*>(tokens + m.panels * m.lines * 128);
    const Share share{begin, count, lane, tokens + begin * m.lines * 128, squares + warp * m.lines};
    constexpr bool single = !Output::WALKS;
    unsigned char* partials = single ? shared : reinterpret_cast<unsigned char*>(squares + (Input::NORMED ? (warps * m.lines + 3) / 4 * 4 : 0));
    const int partial_bytes = single ? STAGES * STAGE : m.lines * PAIRS * 8;

    const size_t panel_bytes = static_cast<size_t>(m.outputs) * 128;
    const char* weights = static_cast<const char*>(m.weights) + begin * panel_bytes + lane * 16;
    const uint32_t ring_address = shared_address(ring) + lane * 16;
    int fill_round = 0, fill_panel = 0;
    auto fill = [&](int stage) {
        if (fill_round < rounds.count) {
            const char* from = weights + fill_panel * panel_bytes + static_cast<size_t>(rounds.start(fill_round)) * 1024;
            const uint32_t to = ring_address + stage * STAGE;
            const int tiles = rounds.size(fill_round);
            if (tiles == TILES) {
#pragma unroll
                for (int i = 0; i < TILES * 2; ++i) copy_async_16(to + i * 512, from + i * 512);
            } else {
#pragma unroll 1
                for (int i = 0; i < tiles * 2; ++i) copy_async_16(to + i * 512, from + i * 512);
            }
            if (++fill_panel == count) fill_panel = 0, ++fill_round;
        }
        copy_commit();
    };
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) fill(stage);

    // Every panel of this warp in every round, less those that have arrived.
    int missing = rounds.count * count;
    if (m.launch >= missing) pdl_launch();

    uint4 b[TILES][2];
    int stage = 0;
    auto take = [&] {
        copy_wait<STAGES - 1>();
        __syncwarp();
        const unsigned char* line = ring + stage * STAGE + g * 128;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int s = 0; s < 2; ++s)
                b[tile][s] = *reinterpret_cast<const uint4*>(line + tile * 1024 + (((2 * t + s) ^ g) << 4));
        __syncwarp();
        fill(stage);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        if (--missing == m.launch) pdl_launch();
    };

    input.before_wait(share);
    if (HOLD && rounds.count > 0) take();
    pdl_wait();
    // Only warps that store sums ask: a word that every warp of every block reads takes its time.
    const int live = warp * 32 < m.lines * PAIRS ? __ldcg(m.live) - m.first : 0;
    input.template stage<ROWS>(m, share);
    __syncwarp();

    for (int round = 0; round < rounds.count; ++round) {
        const int column = rounds.start(round) * 8, pairs = rounds.size(round) * 4;
        const int own_row = threadIdx.x / PAIRS, own_pair = threadIdx.x % PAIRS;
        const bool own = own_row < min(live, m.lines) && own_pair < pairs;
        typename Output::Early early{};
        float sums[TILES][4];
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[tile][i] = 0;

        // Not before the sums of the round before are stored: both do not fit the registers.
        if (!HOLD || round > 0) take();
        for (int panel = 0; panel < count; ++panel) {
            const unsigned char* line = share.tokens + (panel * m.lines + g) * 128;
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
            if (own && panel == 0) early = output.load(m.first + own_row, column + own_pair * 2);
            if (own && panel == count / 2) output.refine(early);
            if (panel + 1 < count) take();
        }

        unsigned char* buffer = partials + (single ? 0 : (round & 1) * warps * partial_bytes);
        float* mine = reinterpret_cast<float*>(buffer + warp * partial_bytes) + g * PAIRS * 2 + 2 * t;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            if (g < m.lines) *reinterpret_cast<float2*>(mine + tile * 8) = make_float2(sums[tile][0], sums[tile][1]);
            if (HIGH && g + 8 < m.lines)
                *reinterpret_cast<float2*>(mine + 8 * PAIRS * 2 + tile * 8) = make_float2(sums[tile][2], sums[tile][3]);
        }
        // One barrier a round: a warp writes this buffer again two rounds later, after a barrier that every reader has reached.
        __syncthreads();
        // Sums of a pair of outputs over the columns, in the order of the warps.
        const auto total = [&](int row, int item) {
            float2 sum = make_float2(0, 0);
            float square = 0;
#pragma unroll
            for (int from = 0; from < MAX_WARPS; ++from) {
                if (from >= warps) continue;
                const float2 part = reinterpret_cast<const float2*>(buffer + from * partial_bytes)[item];
                sum.x += part.x, sum.y += part.y;
                if (Input::NORMED) square += squares[from * m.lines + row];
            }
            if (Input::NORMED) {
                const float scale = rsqrtf(fmaf(square, mean, eps));
                sum = make_float2(__fmul_rn(sum.x, scale), __fmul_rn(sum.y, scale));
            }
            return sum;
        };
        if constexpr (is_gated<Output>) {
            static_assert(TILES % 2 == 0, "a gate and its up are of one block");
            for (int item = threadIdx.x; item < m.lines * (PAIRS / 2); item += blockDim.x) {
                const int row = item / (PAIRS / 2), at = item % (PAIRS / 2), pair = at / 4 * 8 + at % 4;
                if (row >= live || pair >= pairs) continue;
                const int gate = row * PAIRS + pair;
                output.store(m.first + row, column / 2 + at * 2, total(row, gate), total(row, gate + 4));
            }
        } else {
            for (int item = threadIdx.x; item < m.lines * PAIRS; item += blockDim.x) {
                const int row = item / PAIRS, pair = item % PAIRS;
                if (row >= live || pair >= pairs) continue;
                const float2 sum = total(row, item);
                if (item != static_cast<int>(threadIdx.x)) {
                    early = output.load(m.first + row, column + pair * 2);
                    output.refine(early);
                }
                output.store(m.first + row, column + pair * 2, sum, early);
            }
        }
    }
}

}  // namespace gemv
