// Orders the rows of a step by expert, for products that take an expert's rows together. Every (row, slot) gets a place among the
// sorted rows: experts in order, within one by row, then slot; each expert's run starts at a multiple of 8 and is filled up with
// padding rows (source -1). A counting sort: each warp counts a stretch, the blocks of the one cluster exchange their counts, and each
// warp then places its stretch.
#include "common/tiles.cuh"

struct Params {
    const int* choice;  // [rows, slots]: experts
    const int* live;    // rows to do
    int* position;      // [rows, slots]: sorted row
    int* source;        // [capacity]: row of each sorted row, or -1
    int4* tiles;        // [most tiles]: {expert, first sorted row, sorted rows, 0}; no tile spans experts
    int* counts;        // {sorted rows, tiles}
    int rows;           // most live rows
    int slots;
    int experts;  // at most 128
    int height;   // most sorted rows of a tile, a multiple of 8
};

constexpr int THREADS = 1024, WARPS = THREADS / 32, MOST_EXPERTS = 128;

#if __CUDA_ARCH__ >= 900
constexpr int BLOCKS = 8;  // one cluster
#define CLUSTER __cluster_dims__(BLOCKS, 1, 1)
// Every thread of every block has come here, and what was written to shared memory before is seen.
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
DEVICE int read_of_block(const int* own, int block) {
    uint32_t address;
    int v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(block));
    asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}
#else
constexpr int BLOCKS = 1;
#define CLUSTER
DEVICE void cluster_sync() { __syncthreads(); }
DEVICE int read_of_block(const int* own, int) { return *own; }
#endif

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

KERNEL CLUSTER __launch_bounds__(THREADS) moe_sort(const __grid_constant__ Params p) {
    __shared__ int counts[WARPS][MOST_EXPERTS];            // of a warp's stretch; later where its next goes
    __shared__ int totals[MOST_EXPERTS];                   // of this block
    __shared__ int before[MOST_EXPERTS], all[MOST_EXPERTS];  // of the blocks before this one, of all
    __shared__ int first[MOST_EXPERTS], first_tile[MOST_EXPERTS];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, block = blockIdx.x;
    for (int e = lane; e < MOST_EXPERTS; e += 32) counts[warp][e] = 0;
    pdl_wait();
    pdl_launch();
    const int entries = min(*p.live, p.rows) * p.slots;
    const int stretch = (entries + BLOCKS * THREADS - 1) / (BLOCKS * THREADS) * 32;
    const int begin = (block * WARPS + warp) * stretch, end = min(begin + stretch, entries);
    // No expert is outside the table, whatever was chosen.
    const auto expert = [&](int at) { return min(static_cast<unsigned>(p.choice[at]), p.experts - 1u); };
    __syncwarp();
#pragma unroll 4
    for (int at = begin + lane; at < end; at += 32) atomicAdd(&counts[warp][expert(at)], 1);
    __syncthreads();
    if (threadIdx.x < MOST_EXPERTS) {
        int sum = 0;
#pragma unroll 8
        for (int w = 0; w < WARPS; ++w) {
            const int own = counts[w][threadIdx.x];
            counts[w][threadIdx.x] = sum;
            sum += own;
        }
        totals[threadIdx.x] = sum;
    }
    cluster_sync();
    if (threadIdx.x < MOST_EXPERTS) {
        int sum = 0, mine = 0;
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
            if (b == block) mine = sum;
            sum += read_of_block(&totals[threadIdx.x], b);
        }
        before[threadIdx.x] = mine;
        all[threadIdx.x] = sum;
    }
    // Nobody reads this block's totals any more once all have come here.
    cluster_sync();
    if (warp == 0) {
        constexpr int EACH = MOST_EXPERTS / 32;
        int rows[EACH], tiles[EACH], row_sum = 0, tile_sum = 0;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            rows[i] = (all[lane * EACH + i] + 7) / 8 * 8;
            tiles[i] = Tiles(rows[i], p.height).count;
            row_sum += rows[i];
            tile_sum += tiles[i];
        }
        int row = exclusive_sum(row_sum), tile = exclusive_sum(tile_sum);
        if (block == 0 && lane == 31) {
            p.counts[0] = row + row_sum;
            p.counts[1] = tile + tile_sum;
        }
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            first[lane * EACH + i] = row;
            first_tile[lane * EACH + i] = tile;
            row += rows[i];
            tile += tiles[i];
        }
    }
    __syncthreads();
    for (int e = lane; e < p.experts; e += 32) counts[warp][e] += first[e] + before[e];
    __syncwarp();
    for (int base = begin; base < end; base += 32) {
        const int at = base + lane;
        const bool real = at < end;
        const int e = real ? expert(at) : MOST_EXPERTS + lane;
        const uint32_t same = __match_any_sync(~0u, e);
        const int to = real ? counts[warp][e] + __popc(same & ((1u << lane) - 1)) : 0;
        __syncwarp();
        if (real) {
            p.position[at] = to;
            p.source[to] = at / p.slots;
            if (same >> lane == 1) counts[warp][e] = to + 1;
        }
        __syncwarp();
    }
    // Padding and tiles; a warp of some block an expert.
    for (int e = block * WARPS + warp; e < p.experts; e += BLOCKS * WARPS) {
        const int rows = (all[e] + 7) / 8 * 8;
        if (all[e] + lane < rows) p.source[first[e] + all[e] + lane] = -1;
        const Tiles tiles(rows, p.height);
        for (int tile = lane; tile < tiles.count; tile += 32)
            p.tiles[first_tile[e] + tile] = tiles.entry(e, first[e], tile);
    }
}
