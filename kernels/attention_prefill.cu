// Causal attention of many rows of a sequence over its gathered keys and values (kv_gather.cu). A block takes one query head of a
// run of rows, and walks over tiles of keys with the softmax kept up to date ("flash attention").
//
// `attention_prefill_portable` uses mma.sync.
#include "common/attention.cuh"

struct Params {
    const __nv_bfloat16* q;  // [rows, heads * 64], rotated
    const char* keys;        // [kv_heads][lines][64], swizzled
    const char* values;
    Sequences sequences;
    const float* sinks;      // [heads] or null
    void* out;               // bf16 [rows, heads * 64], row-major or panels
    int heads;
    int group;               // query heads of a key/value head
    int lines;               // of a head
    int window;              // 0 is none
    int capacity;            // rows of the panels of `out`; 0 is row-major
    float scale;             // times log2(e)
};

// A block's run of rows and the lines it needs.
struct Run {
    int row, rows;      // in the batch
    int position;       // of its first row
    int line;           // of the sequence's first visible position
    int base;           // that position
    int begin, end;     // lines needed, from `line`
};

template <int THREADS, int ROWS> DEVICE bool find_run(const Params& p, int item, Run& run) {
    const Place place = find_place<THREADS, ROWS>(p.sequences, p.window, item);
    const int s = place.sequence;
    if (s < 0) return false;
    const int start = p.sequences.start[s], count = p.sequences.row_count[s];
    // The last rows of a sequence see most: they come first.
    const int skipped = ((count + ROWS - 1) / ROWS - 1 - (item - place.run)) * ROWS;
    run.row = p.sequences.first_row[s] + skipped;
    run.rows = min(count - skipped, ROWS);
    run.position = start + skipped;
    run.base = first_visible(start, p.window);
    run.line = place.line;
    run.begin = first_visible(run.position, p.window) - run.base;
    run.end = run.position + run.rows - run.base;
    return true;
}

namespace portable {
constexpr int ROWS = 128;
constexpr int WARPS = ROWS / 16;
constexpr int KEYS = 64;
constexpr int TILE = KEYS * HEAD_DIM * 2;  // bytes

// A stage is a tile of keys and one of values, as they lie in memory.
DEVICE void fetch(const char* keys, const char* values, int line, uint32_t stage) {
#pragma unroll
    for (int at = threadIdx.x * 16; at < TILE; at += WARPS * 32 * 16) {
        copy_async_16(stage + at, keys + static_cast<size_t>(line) * 128 + at);
        copy_async_16(stage + TILE + at, values + static_cast<size_t>(line) * 128 + at);
    }
}
}  // namespace portable

KERNEL __launch_bounds__(portable::WARPS * 32) attention_prefill_portable(const __grid_constant__ Params p) {
    using namespace portable;
    __shared__ __align__(128) char shared[2 * 2 * TILE];
    pdl_launch();
    pdl_wait();
    Run run;
    if (!find_run<WARPS * 32, ROWS>(p, blockIdx.y, run)) return;
    const int head = blockIdx.x, kv_head = head / p.group;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const size_t offset = (static_cast<size_t>(kv_head) * p.lines + run.line) * 128;
    const char *keys = p.keys + offset, *values = p.values + offset;
    const uint32_t ring = shared_address(shared);
    const int first = run.begin / KEYS, tiles = (run.end + KEYS - 1) / KEYS;
    fetch(keys, values, first * KEYS, ring);
    copy_commit();

    // This lane's rows are `row` and `row + 8` of the run.
    const int row = warp * 16 + g;
    uint32_t q[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int r = row + j % 2 * 8, col = 16 * i + j / 2 * 8 + 2 * t;
            const __nv_bfloat16* from = p.q + (static_cast<size_t>(run.row + r) * p.heads + head) * HEAD_DIM + col;
            q[i][j] = r < run.rows ? *reinterpret_cast<const uint32_t*>(from) : 0;
        }
    float o[8][4] = {}, peak[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    for (int tile = first; tile < tiles; ++tile) {
        const uint32_t stage = ring + (tile - first) % 2 * 2 * TILE;
        if (tile + 1 < tiles) fetch(keys, values, (tile + 1) * KEYS, ring + (tile + 1 - first) % 2 * 2 * TILE);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        float s[KEYS / 8][4] = {};
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int key = n * 8 + lane % 8, chunk = half * 4 + lane / 8;
                const uint4 k = load_matrices(stage + key * 128 + ((chunk ^ (key & 7)) << 4));
                mma_bf16(s[n], q[2 * half][0], q[2 * half][1], q[2 * half][2], q[2 * half][3], k.x, k.y);
                mma_bf16(s[n], q[2 * half + 1][0], q[2 * half + 1][1], q[2 * half + 1][2], q[2 * half + 1][3], k.z, k.w);
            }
        float rescale[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int position = run.position + row + 8 * r;
            const int low = p.window > 0 ? position - p.window : -1;
            float high = peak[r];
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int key = run.base + tile * KEYS + n * 8 + 2 * t + e;
                    float& v = s[n][2 * r + e];
                    v = key <= position && key > low ? v * p.scale : -INFINITY;
                    high = fmaxf(high, v);
                }
            high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
            high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
            // A row may see nothing of a tile: then its peak is still minus infinity, and so it must not be subtracted.
            const float safe = high == -INFINITY ? 0 : high;
            rescale[r] = exp2_fast(peak[r] - safe);
            peak[r] = high;
            sum[r] *= rescale[r];
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& v = s[n][2 * r + e];
                    v = exp2_fast(v - safe);
                    sum[r] += v;
                }
        }
#pragma unroll
        for (int n = 0; n < 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) o[n][i] *= rescale[i / 2];
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) {
            uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = pack2<__nv_bfloat16>(s[2 * j + i / 2][i % 2 * 2], s[2 * j + i / 2][i % 2 * 2 + 1]);
#pragma unroll
            for (int n = 0; n < 8; n += 2) {
                const int key = j * 16 + lane % 16, chunk = n + lane / 16;
                const uint4 v = load_matrices_transposed(stage + TILE + key * 128 + ((chunk ^ (key & 7)) << 4));
                mma_bf16(o[n], a[0], a[1], a[2], a[3], v.x, v.y);
                mma_bf16(o[n + 1], a[0], a[1], a[2], a[3], v.z, v.w);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
        sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
        if (p.sinks) sum[r] += exp2_fast(p.sinks[head] * LOG2E - peak[r]);
        if (row + 8 * r >= run.rows) continue;
        const float inverse = 1.0f / sum[r];
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            char* to = output_at(p.out, run.row + row + 8 * r, head, n * 8 + 2 * t, p.heads, p.capacity);
            *reinterpret_cast<uint32_t*>(to) = pack2<__nv_bfloat16>(o[n][2 * r] * inverse, o[n][2 * r + 1] * inverse);
        }
    }
}
