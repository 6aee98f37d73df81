// Causal attention of many rows of a sequence over its gathered keys and values (kv_gather.cu). A block takes one query head of a
// run of rows, and walks over tiles of keys with the softmax kept up to date ("flash attention").
//
// `attention_prefill_portable` uses mma.sync; `attention_prefill_hopper` wgmma, with a warp that brings keys and values by bulk copies.
#include "common/attention.cuh"
#include "common/wgmma.cuh"

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

template <int ROWS> DEVICE bool find_run(const Params& p, int item, Run& run) {
    const Place place = find_place<ROWS>(p.sequences, p.window, item);
    if (place.rows == 0) return false;
    const int start = place.start, count = place.rows;
    // The last rows of a sequence see most: they come first.
    const int skipped = ((count + ROWS - 1) / ROWS - 1 - (item - place.run)) * ROWS;
    run.row = place.first_row + skipped;
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
    if (!find_run<ROWS>(p, blockIdx.y, run)) return;
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

namespace hopper {
constexpr int GROUPS = 3;  // of 128 threads and 64 rows each
constexpr int ROWS = GROUPS * 64;
constexpr int THREADS = (GROUPS + 1) * 128;
constexpr int KEYS = 128;
constexpr int STAGES = 3;
constexpr int TILE = KEYS * HEAD_DIM * 2;     // bytes
constexpr int QUERIES = 64 * HEAD_DIM * 2;    // bytes of a group's rows

#ifdef HOPPER
#define S8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define S32(d, i) S8(d, i), S8(d, i + 8), S8(d, i + 16), S8(d, i + 24)
#define LIST_32                                                                                                  \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
    "%29,%30,%31"
#define LIST_64                                                                                                         \
    LIST_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
            "%58,%59,%60,%61,%62,%63"

// S[64 x 128] = (KEEP: +=) Q[64 x 16] K[128 x 16]^T.
template <bool KEEP> DEVICE void product_of_keys(float (&s)[64], uint64_t q, uint64_t k) {
    asm volatile("{ .reg .pred keep; setp.ne.b32 keep, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" LIST_64 "}, %64, %65, keep, 1, 1, 0, 0; }"
                 : S32(s, 0), S32(s, 32)
                 : "l"(q), "l"(k), "n"(KEEP ? 1 : 0));
}
// O[64 x 64] += P[64 x 16] V[16 x 64]; V's lines are keys, so it is transposed on the way.
DEVICE void product_of_values(float (&o)[32], const uint32_t (&p)[4], uint64_t v) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" LIST_32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
                 : S32(o, 0)
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v));
}
#undef S8
#undef S32
#undef LIST_32
#undef LIST_64

DEVICE void scores(float (&s)[64], uint32_t q, uint32_t k) {
    const uint64_t a = wgmma_descriptor(q), b = wgmma_descriptor(k);
    wgmma_fence();
    product_of_keys<false>(s, a, b);
#pragma unroll
    for (int i = 1; i < 4; ++i) product_of_keys<true>(s, a + 2 * i, b + 2 * i);
    wgmma_commit();
}
DEVICE void add_values(float (&o)[32], const uint32_t (&p)[8][4], uint32_t v) {
    const uint64_t b = wgmma_descriptor(v);
    wgmma_fence();
    // 16 lines of 128 bytes further each time.
#pragma unroll
    for (int i = 0; i < 8; ++i) product_of_values(o, p[i], b + 128 * i);
    wgmma_commit();
}

struct Softmax {
    float peak[2] = {-INFINITY, -INFINITY};  // raw scores
    float sum[2] = {0, 0};                   // of this lane's columns
    float rescale[2];
};

// Scores of a tile to probabilities, in place. `position` is this lane's first row's, `key` that of its first column; the second row is
// eight further.
DEVICE void soften(float (&s)[64], Softmax& state, float scale, bool edge, int position, int key, int window) {
    if (edge) {
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            const int last = position + i / 2 % 2 * 8 - key, col = i / 4 * 8 + i % 2;
            s[i] = col <= last && (window == 0 || col > last - window) ? s[i] : -INFINITY;
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float peak = state.peak[r];
#pragma unroll
        for (int i = 0; i < 32; ++i) peak = fmaxf(peak, s[i / 2 * 4 + 2 * r + i % 2]);
        peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
        peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 2));
        // A row may see nothing of a tile: then its peak is still minus infinity, and so it must not be subtracted.
        const float safe = peak == -INFINITY ? 0 : peak * scale;
        state.rescale[r] = exp2_fast(state.peak[r] * scale - safe);
        state.peak[r] = peak;
        float sum = 0;
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            float& v = s[i / 2 * 4 + 2 * r + i % 2];
            v = exp2_fast(fmaf(v, scale, -safe));
            sum += v;
        }
        state.sum[r] = state.sum[r] * state.rescale[r] + sum;
    }
}
DEVICE void pack(uint32_t (&p)[8][4], const float (&s)[64]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) p[i / 4][i % 4] = pack2<__nv_bfloat16>(s[2 * i], s[2 * i + 1]);
}
#endif
}  // namespace hopper

KERNEL __launch_bounds__(hopper::THREADS, 1) attention_prefill_hopper(const __grid_constant__ Params p) {
#ifdef HOPPER
    using namespace hopper;
    extern __shared__ char raw[];
    const uint32_t queries = (shared_address(raw) + 1023) & ~1023u;
    const uint32_t keys = queries + GROUPS * QUERIES, values = keys + STAGES * TILE, barriers = values + STAGES * TILE;
    Ring<STAGES, 1, GROUPS * 4> key_ring(barriers), value_ring(barriers + 2 * STAGES * 8);
    if (threadIdx.x == 0) {
        key_ring.init();
        value_ring.init();
    }
    pdl_launch();
    __syncthreads();  // the barriers are there
    pdl_wait();
    Run run;
    if (!find_run<ROWS>(p, blockIdx.y, run)) return;
    const int head = blockIdx.x, kv_head = head / p.group;
    const int first = run.begin / KEYS, tiles = (run.end + KEYS - 1) / KEYS;
    const int group = threadIdx.x / 128;
    if (group == GROUPS) {
        registers_shrink<32>();
        if (threadIdx.x != GROUPS * 128) return;
        proxy_fence();
        const size_t offset = (static_cast<size_t>(kv_head) * p.lines + run.line) * 128;
        for (int tile = first; tile < tiles; ++tile) {
            const size_t at = offset + static_cast<size_t>(tile) * TILE;
            key_ring.wait_empty();
            barrier_expect(key_ring.full(), TILE);
            bulk_load(keys + key_ring.stage * TILE, p.keys + at, TILE, key_ring.full());
            key_ring.advance();
            value_ring.wait_empty();
            barrier_expect(value_ring.full(), TILE);
            bulk_load(values + value_ring.stage * TILE, p.values + at, TILE, value_ring.full());
            value_ring.advance();
        }
        return;
    }
    registers_grow<160>();
    const int thread = threadIdx.x % 128, lane = thread % 32, g = lane / 4, t = lane % 4;
    const uint32_t q = queries + group * QUERIES;
    const int rows = min(run.rows - group * 64, 64);  // of this group; may be none
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = i * 16 + thread / 8, chunk = thread % 8;
        const int there = row < rows ? group * 64 + row : 0;
        const __nv_bfloat16* from = p.q + (static_cast<size_t>(run.row + there) * p.heads + head) * HEAD_DIM + chunk * 8;
        copy_async_16(q + row * 128 + ((chunk ^ (row & 7)) << 4), from, row < rows ? 16 : 0);
    }
    copy_commit();
    copy_wait<0>();
    proxy_fence();
    asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");

    // Tiles that some row of this group sees, and among them those that every row sees whole.
    const int low = run.position + group * 64, high = low + rows - 1;
    int begin = first, end = tiles;
    if (rows > 0) {
        begin = (first_visible(low, p.window) - run.base) / KEYS;
        end = (high - run.base) / KEYS + 1;
    } else {
        begin = end = tiles;
    }
    const int position = low + thread / 32 * 16 + g;
    const auto edge = [&](int tile) {
        const int key = run.base + tile * KEYS;
        return key + KEYS - 1 > low || (p.window > 0 && key <= high - p.window);
    };
    const auto skip = [&]() {
        key_ring.wait_full();
        value_ring.wait_full();
        __syncwarp();
        if (lane == 0) {
            barrier_arrive(key_ring.empty());
            barrier_arrive(value_ring.empty());
        }
        key_ring.advance();
        value_ring.advance();
    };
    for (int tile = first; tile < begin; ++tile) skip();

    float s[64], o[32];
    uint32_t weights[8][4];
#pragma unroll
    for (int i = 0; i < 32; ++i) o[i] = 0;
    Softmax state;
    if (begin < end) {
        key_ring.wait_full();
        scores(s, q, keys + key_ring.stage * TILE);
        wgmma_wait<0>();
        wgmma_settle(s);
        if (lane == 0) barrier_arrive(key_ring.empty());
        key_ring.advance();
        soften(s, state, p.scale, edge(begin), position, run.base + begin * KEYS + 2 * t, p.window);
        pack(weights, s);
        if (begin + 1 < end) key_ring.wait_full();
        for (int tile = begin + 1; tile < end; ++tile) {
            // The next tile's scores and this one's outputs are under way while the next one's softmax waits for its scores only.
            scores(s, q, keys + key_ring.stage * TILE);
            value_ring.wait_full();
            add_values(o, weights, values + value_ring.stage * TILE);
            wgmma_wait<1>();
            wgmma_settle(s);
            if (lane == 0) barrier_arrive(key_ring.empty());
            key_ring.advance();
            soften(s, state, p.scale, edge(tile), position, run.base + tile * KEYS + 2 * t, p.window);
            // The loop in the wait for keys keeps the assembler from moving the wait for outputs up, ahead of the softmax.
            wgmma_settle(s);
            if (tile + 1 < end) key_ring.wait_full();
            wgmma_wait<0>();
            wgmma_settle(o);
            if (lane == 0) barrier_arrive(value_ring.empty());
            value_ring.advance();
            // Peaks rarely move after the first tiles.
            if (__any_sync(~0u, state.rescale[0] != 1 || state.rescale[1] != 1)) {
#pragma unroll
                for (int i = 0; i < 32; ++i) o[i] *= state.rescale[i / 2 % 2];
            }
            pack(weights, s);
        }
        value_ring.wait_full();
        add_values(o, weights, values + value_ring.stage * TILE);
        wgmma_wait<0>();
        wgmma_settle(o);
        if (lane == 0) barrier_arrive(value_ring.empty());
        value_ring.advance();
    }
    for (int tile = end; tile < tiles; ++tile) skip();

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float sum = state.sum[r];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (p.sinks) sum += exp2_fast(p.sinks[head] * LOG2E - state.peak[r] * p.scale);
        const int row = thread / 32 * 16 + g + 8 * r;
        if (row >= rows) continue;
        const float inverse = 1.0f / sum;
        const int out_row = run.row + group * 64 + row, turn = p.capacity ? out_row & 7 : 0;
        char* line = output_at(p.out, out_row, head, turn * 8, p.heads, p.capacity);
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            char* to = line + ((n ^ turn) << 4) + 4 * t;
            *reinterpret_cast<uint32_t*>(to) = pack2<__nv_bfloat16>(o[4 * n + 2 * r] * inverse, o[4 * n + 2 * r + 1] * inverse);
        }
    }
#endif
}
