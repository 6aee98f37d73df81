// RMSNorm of the residual stream into the experts' operand: y[position[row, slot]] = x[row] * scale[row] * w for every slot, panels of fp16 or
// bf16, in float32 until the last rounding; route.cu found the scales. One block a row. Padding rows among the sorted ones keep what they
// hold: the products of a row depend on no other row, and nobody reads theirs.
//
// `moe_scatter` goes by positions that moe_sort.cu found. `moe_scatter_sorting`, of few rows, saves that launch: each block counts all
// choices for itself, which gives the positions of its row; one more block writes the tiles.
#include "common/tiles.cuh"

struct Sort {
    const int* choice;  // [rows, slots]: experts
    int4* tiles;        // as moe_sort.cu
    int* counts;        // as moe_sort.cu
    int rows;           // most live rows; rows * slots is at most ENTRIES * THREADS
    int experts;        // at most 128
    int height;         // most sorted rows of a tile, a multiple of 8
};

struct Params {
    const float* x;       // [rows, cols]
    const float* weight;  // [cols]
    const float* scale;   // [rows]
    void* y;              // panels of [capacity, cols], fp16 or bf16
    int* position;        // [rows, slots]: rows of y; `moe_scatter_sorting` writes them
    const int* live;      // rows to do
    int cols;             // multiple of 64
    int capacity;         // multiple of 8
    int slots;            // at most SLOTS
    Sort sort;            // of `moe_scatter_sorting`
};

constexpr int THREADS = 384, SLOTS = 8, MOST_EXPERTS = 128;
constexpr int ENTRIES = 3;  // choices that a thread counts, at the most

// Eight columns of a row and of the weight.
struct Piece {
    float4 a, b, v, w;

    __device__ __forceinline__ Piece(const Params& p, int row, int col) {
        const float4* const x = reinterpret_cast<const float4*>(p.x + static_cast<size_t>(row) * p.cols + col);
        const float4* const weight = reinterpret_cast<const float4*>(p.weight + col);
        a = x[0], b = x[1], v = __ldg(weight), w = __ldg(weight + 1);
    }
    template <class T> __device__ __forceinline__ void put(const Params& p, int col, float scale, const int (&position)[SLOTS]) const {
        uint4 packed;
        packed.x = pack2<T>(a.x * scale * v.x, a.y * scale * v.y);
        packed.y = pack2<T>(a.z * scale * v.z, a.w * scale * v.w);
        packed.z = pack2<T>(b.x * scale * w.x, b.y * scale * w.y);
        packed.w = pack2<T>(b.z * scale * w.z, b.w * scale * w.w);
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot) {
            if (slot >= p.slots) break;
            *reinterpret_cast<uint4*>(static_cast<char*>(p.y) + panel_chunk(position[slot], col, p.capacity)) = packed;
        }
    }
};

DEVICE void read_slots(int (&to)[SLOTS], const int* from, int slots) {
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) to[slot] = slot < slots ? from[slot] : 0;
}

template <class T> DEVICE void scatter(const Params& p) {
    pdl_wait();
    pdl_launch();
    const int row = blockIdx.x;
    // All reads at once, also those of a row that is not live: there is memory for it.
    const int live = *p.live;
    const float scale = p.scale[row];
    int position[SLOTS];
    read_slots(position, p.position + static_cast<size_t>(row) * p.slots, p.slots);
    for (int col = threadIdx.x * 8; col < p.cols; col += THREADS * 8) {
        const Piece piece(p, row, col);
        if (row >= live) return;
        piece.template put<T>(p, col, scale, position);
    }
}

DEVICE int exclusive_sum(int v) {
    const int lane = threadIdx.x % 32;
    int sum = v;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
        const int other = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += other;
    }
    return sum - v;
}

// One warp, EACH experts a lane: from rows to first sorted rows, in `counts`; or the tiles.
template <int EACH> DEVICE void place_experts(const Sort& sort, int (&counts)[MOST_EXPERTS], bool put_tiles) {
    const int lane = threadIdx.x % 32;
    int rows[EACH], sum = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) sum += rows[i] = (counts[lane * EACH + i] + 7) / 8 * 8;
    int first = exclusive_sum(sum);
    if (!put_tiles) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            counts[lane * EACH + i] = first;
            first += rows[i];
        }
        return;
    }
    int count = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const Tiles tiles(rows[i], sort.height);
        count += tiles.count;
    }
    int tile = exclusive_sum(count);
    if (lane == 31) sort.counts[0] = first + sum, sort.counts[1] = tile + count;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const Tiles tiles(rows[i], sort.height);
        for (int at = 0; at < tiles.count; ++at)
            sort.tiles[tile + at] = tiles.entry(lane * EACH + i, first, at);
        first += rows[i], tile += tiles.count;
    }
}

template <class T> DEVICE void scatter_sorting(const Params& p) {
    __shared__ int counts[MOST_EXPERTS];  // of rows; later the first sorted row
    __shared__ int before[SLOTS];         // choices of this row's experts by rows before it
    const Sort& sort = p.sort;
    const int row = blockIdx.x, thread = threadIdx.x;
    const bool puts_tiles = row == sort.rows;
    if (thread < MOST_EXPERTS) counts[thread] = 0;
    if (thread < SLOTS) before[thread] = 0;
    pdl_wait();
    pdl_launch();
    // All reads at once, those of a row for the block of the tiles as well.
    const int live = min(*p.live, sort.rows), from = puts_tiles ? 0 : row;
    const float scale = p.scale[from];
    // No expert is outside the table, whatever was chosen.
    const auto expert = [&](int chosen) { return static_cast<int>(min(static_cast<unsigned>(chosen), sort.experts - 1u)); };
    int own[SLOTS];
    read_slots(own, sort.choice + static_cast<size_t>(from) * p.slots, p.slots);
    int chosen[ENTRIES];
#pragma unroll
    for (int i = 0; i < ENTRIES; ++i) chosen[i] = i * THREADS + thread < sort.rows * p.slots ? sort.choice[i * THREADS + thread] : 0;
    const Piece piece(p, from, min(thread * 8, p.cols - 8));
    __syncthreads();
    if (row >= live && !puts_tiles) return;
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) own[slot] = slot < p.slots ? expert(own[slot]) : -1;
#pragma unroll
    for (int i = 0; i < ENTRIES; ++i) {
        const int at = i * THREADS + thread, mine = expert(chosen[i]);
        if (at >= live * p.slots) break;
        atomicAdd(&counts[mine], 1);
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot)
            if (mine == own[slot] && at < row * p.slots + slot) atomicAdd(&before[slot], 1);
    }
    __syncthreads();
    if (thread < 32) {
        if (sort.experts <= 32)
            place_experts<1>(sort, counts, puts_tiles);
        else
            place_experts<MOST_EXPERTS / 32>(sort, counts, puts_tiles);
    }
    if (puts_tiles) return;
    __syncthreads();
    int position[SLOTS];
#pragma unroll
    for (int slot = 0; slot < SLOTS; ++slot) position[slot] = slot < p.slots ? counts[own[slot]] + before[slot] : 0;
    if (thread == 0) {
#pragma unroll
        for (int slot = 0; slot < SLOTS; ++slot)
            if (slot < p.slots) p.position[static_cast<size_t>(row) * p.slots + slot] = position[slot];
    }
    if (thread * 8 < p.cols) piece.template put<T>(p, thread * 8, scale, position);
    for (int col = (thread + THREADS) * 8; col < p.cols; col += THREADS * 8) Piece(p, row, col).template put<T>(p, col, scale, position);
}

#define DEFINE(SUFFIX, T)                                                                                                             \
    KERNEL __launch_bounds__(THREADS) moe_scatter##SUFFIX(const __grid_constant__ Params p) { scatter<T>(p); }                     \
    KERNEL __launch_bounds__(THREADS) moe_scatter_sorting##SUFFIX(const __grid_constant__ Params p) { scatter_sorting<T>(p); }
DEFINE(, __half)
DEFINE(_bf16, __nv_bfloat16)
