// Causal attention of many rows of a sequence over its gathered keys and values (kv_gather.cu), with the softmax kept up to date from one tile
// of keys to the next ("flash attention").
//
// `attention_prefill_portable` uses mma.sync; a block takes one query head of a run of rows. The others use wgmma, with warps that bring
// queries, keys and values; a block takes one item after another, rows of all query heads of a key/value head.
#include <type_traits>

#include "common/attention_prefill.cuh"

namespace portable {
constexpr int ROWS = 128;
constexpr int WARPS = ROWS / 16;
template <int DIM> constexpr int KEYS_OF = DIM == 64 ? 64 : 32;  // of a tile

// A stage is a tile of keys and one of values: panels of 64 dimensions, as they lie in memory.
template <int DIM> DEVICE void fetch(const Params& p, size_t at, uint32_t stage) {
    constexpr int PANEL = KEYS_OF<DIM> * 128, TILE = DIM / 64 * PANEL;
#pragma unroll
    for (int i = threadIdx.x * 16; i < TILE; i += WARPS * 32 * 16) {
        const size_t from = at + i / PANEL * static_cast<size_t>(p.lines) * 128 + i % PANEL;
        copy_async_16(stage + i, p.keys + from);
        copy_async_16(stage + TILE + i, p.values + from);
    }
}

template <int DIM> DEVICE void attention(const Params& p) {
    constexpr int KEYS = KEYS_OF<DIM>, PANEL = KEYS * 128, TILE = DIM / 64 * PANEL;
    __shared__ __align__(128) char shared[2 * 2 * TILE];
    pdl_launch();
    pdl_wait();
    Run run;
    if (!find_run(p, blockIdx.y, ROWS, run)) return;
    const int head = blockIdx.x, kv_head = head / p.group;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const size_t offset = (static_cast<size_t>(kv_head) * (DIM / 64) * p.lines + run.line) * 128;
    const uint32_t ring = shared_address(shared);
    const int first = run.begin / KEYS, tiles = (run.end + KEYS - 1) / KEYS;
    fetch<DIM>(p, offset + static_cast<size_t>(first) * PANEL, ring);
    copy_commit();

    // This lane's rows are `row` and `row + 8` of the run.
    const int row = warp * 16 + g;
    uint32_t q[DIM / 16][4];
#pragma unroll
    for (int i = 0; i < DIM / 16; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int r = row + j % 2 * 8, col = 16 * i + j / 2 * 8 + 2 * t;
            const __nv_bfloat16* from = p.q + (static_cast<size_t>(run.row + r) * p.heads + head) * DIM + col;
            q[i][j] = r < run.rows ? *reinterpret_cast<const uint32_t*>(from) : 0;
        }
    float o[DIM / 8][4] = {}, peak[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    for (int tile = first; tile < tiles; ++tile) {
        const uint32_t stage = ring + (tile - first) % 2 * 2 * TILE;
        if (tile + 1 < tiles) fetch<DIM>(p, offset + static_cast<size_t>(tile + 1) * PANEL, ring + (tile + 1 - first) % 2 * 2 * TILE);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        float s[KEYS / 8][4] = {};
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int half = 0; half < DIM / 32; ++half) {
                const int key = n * 8 + lane % 8, chunk = half % 2 * 4 + lane / 8;
                const uint4 k = load_matrices(stage + half / 2 * PANEL + key * 128 + ((chunk ^ (key & 7)) << 4));
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
        for (int n = 0; n < DIM / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) o[n][i] *= rescale[i / 2];
#pragma unroll
        for (int j = 0; j < KEYS / 16; ++j) {
            uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = pack2<__nv_bfloat16>(s[2 * j + i / 2][i % 2 * 2], s[2 * j + i / 2][i % 2 * 2 + 1]);
#pragma unroll
            for (int n = 0; n < DIM / 8; n += 2) {
                const int key = j * 16 + lane % 16, chunk = n % 8 + lane / 16;
                const uint4 v = load_matrices_transposed(stage + TILE + n / 8 * PANEL + key * 128 + ((chunk ^ (key & 7)) << 4));
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
        for (int n = 0; n < DIM / 8; ++n) {
            char* to = output_at<DIM>(p.out, run.row + row + 8 * r, head, n * 8 + 2 * t, p.heads, p.capacity);
            *reinterpret_cast<uint32_t*>(to) = pack2<__nv_bfloat16>(o[n][2 * r] * inverse, o[n][2 * r + 1] * inverse);
        }
    }
}
}  // namespace portable

KERNEL __launch_bounds__(portable::WARPS * 32) attention_prefill_portable(const __grid_constant__ Params p) { portable::attention<64>(p); }
KERNEL __launch_bounds__(portable::WARPS * 32) attention_prefill_portable_128(const __grid_constant__ Params p) { portable::attention<128>(p); }

namespace hopper {
constexpr int KEYS = 128;
constexpr int TILE = KEYS * 128;  // bytes of 64 dimensions of a tile of keys or values

// Groups of 128 threads, each with 64 rows of a tile (pack query heads of 64 / pack rows of the batch).
template <int DIM> struct Plan {
    static constexpr int PANELS = DIM / 64;
    static constexpr int GROUPS = DIM == 64 ? 3 : 2;
    static constexpr int STAGES = DIM == 64 ? 4 : 2;  // a power of two
    static constexpr int THREADS = (GROUPS + 1) * 128;
};
}  // namespace hopper

#ifdef HOPPER
// WINDOW: rows may not see the first tile. Else the first tile's peaks are what all probabilities of a row are relative to: looking for
// peaks costs a seventh of the time, and only a row whose later scores are far greater, which its sum tells, is done once more.
template <int DIM, bool WINDOW> DEVICE void attention_hopper(const Params& p) {
    using namespace hopper;
    using Plan = hopper::Plan<DIM>;
    constexpr int PANELS = Plan::PANELS, GROUPS = Plan::GROUPS, STAGES = Plan::STAGES;
    extern __shared__ __align__(1024) char shared_memory[];
    const uint32_t queries = shared_address(shared_memory);
    const uint32_t keys = queries + GROUPS * SLOTS * PANELS * QUERIES, values = keys + STAGES * PANELS * TILE;
    const uint32_t items = values + STAGES * PANELS * TILE, barriers = items + GROUPS * SLOTS * sizeof(Item);
    const int group = uniform(threadIdx.x / 128), warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    // Barriers of stage `n`, which counts up for ever: full and empty, of keys and of values. Likewise of a group's queries.
    const auto key_full = [&](uint32_t n) { return barriers + 8 * (n % STAGES); };
    const auto key_empty = [&](uint32_t n) { return barriers + 8 * (STAGES + n % STAGES); };
    const auto value_full = [&](uint32_t n) { return barriers + 8 * (2 * STAGES + n % STAGES); };
    const auto value_empty = [&](uint32_t n) { return barriers + 8 * (3 * STAGES + n % STAGES); };
    const auto query_full = [&](int group, uint32_t n) { return barriers + 8 * (4 * STAGES + group * 2 * SLOTS + n % SLOTS); };
    const auto query_empty = [&](int group, uint32_t n) { return query_full(group, n) + 8 * SLOTS; };
    // The phase in which stage `n` of a ring is filled; it is empty in the one before.
    const auto phase = [](uint32_t n, uint32_t stages) { return n / stages % 2; };
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(key_full(i), 1);
            barrier_init(value_full(i), 1);
            barrier_init(key_empty(i), GROUPS * 4);
            barrier_init(value_empty(i), GROUPS * 4);
        }
        for (int i = 0; i < GROUPS * 2 * SLOTS; ++i) barrier_init(barriers + 8 * (4 * STAGES + i), i / SLOTS % 2 ? 128 : 32);
        barrier_init_fence();
    }
    pdl_launch();
    __syncthreads();  // the barriers are there
    pdl_wait();
    const int length_shift = 6 - p.pack_shift, length = 1 << length_shift;  // rows of a group
    if (group == GROUPS) {
        registers_shrink<DIM == 64 ? 32 : 24>();
        Walk walk;
        Run run;
        int head;
        if (warp == 0) {
            proxy_fence();
            const size_t panel = static_cast<size_t>(p.lines) * 128;
            uint32_t n = 0;
            while (walk.next<WINDOW>(p, GROUPS * length, run, head)) {
                const int first = run.begin / KEYS, tiles = (run.end + KEYS - 1) / KEYS;
                const size_t offset = (static_cast<size_t>(head / p.group) * PANELS * p.lines + run.line) * 128;
                for (int tile = first; lane == 0 && tile < tiles; ++tile, ++n) {
                    const size_t at = offset + static_cast<size_t>(tile) * TILE;
                    const uint32_t stage = n % STAGES * PANELS * TILE;
                    barrier_wait(key_empty(n), phase(n, STAGES) ^ 1);
                    barrier_expect(key_full(n), PANELS * TILE);
                    for (int i = 0; i < PANELS; ++i) bulk_load(keys + stage + i * TILE, p.keys + at + i * panel, TILE, key_full(n));
                    barrier_wait(value_empty(n), phase(n, STAGES) ^ 1);
                    barrier_expect(value_full(n), PANELS * TILE);
                    for (int i = 0; i < PANELS; ++i) bulk_load(values + stage + i * TILE, p.values + at + i * panel, TILE, value_full(n));
                }
                __syncwarp();
            }
        } else if (warp <= GROUPS) {
            const int loads_for = warp - 1;
            uint32_t n = 0;
            for (bool more = true; more; ++n) {
                more = walk.next<WINDOW>(p, GROUPS * length, run, head);
                Item item = {};
                if (more) {
                    const int before = loads_for * length, first = run.begin / KEYS;
                    item.row = run.row + before;
                    item.rows = max(min(run.rows - before, length), 0);
                    item.ahead = run.position + before - run.base - first * KEYS;
                    item.tiles = (run.end + KEYS - 1) / KEYS - first;
                    item.head = head;
                    item.line = head / p.group * PANELS * p.lines + run.line + first * KEYS;
                }
                barrier_wait(query_empty(loads_for, n), phase(n, SLOTS) ^ 1);
                const int slot = loads_for * SLOTS + n % SLOTS;
                if (more) bring_queries<PANELS>(p, queries + slot * PANELS * QUERIES, item.row, item.rows, head);
                announce(p, item, items + slot * sizeof(Item), query_full(loads_for, n));
            }
        }
        return;
    }
    registers_grow<DIM == 64 ? 160 : 240>();
    const int g = lane / 4, t = lane % 4;
    uint32_t n = 0;  // tiles before
    uint32_t item = 0;  // items before
    int ahead;          // how far the group's first row is ahead of the tile's first key
    uint32_t end;       // of this item's tiles
    const auto slot = [&]() { return group * SLOTS + item % SLOTS; };
    // Finds the next item, whose scores it issues; whether there is one.
    const auto start = [&]() {
        barrier_wait(query_full(group, item), phase(item, SLOTS));
        const uint2 words = load_shared_8(items + slot() * sizeof(Item));
        ahead = uniform(words.x);
        end = n + uniform(words.y);
        return end != n;
    };
    float s[64], o[PANELS][32];
    uint32_t weights[8][4];
    // Addresses are the same in every lane, and so are descriptors, if the assembler knows it.
    const auto issue_scores = [&]() {
        scores<PANELS>(s, uniform(queries + slot() * PANELS * QUERIES), QUERIES, uniform(keys + n % STAGES * PANELS * TILE), TILE);
    };
    const auto issue_values = [&]() {
        barrier_wait(value_full(n - 1), phase(n - 1, STAGES));
        add_values<PANELS>(o, weights, uniform(values + (n - 1) % STAGES * PANELS * TILE), TILE);
    };
    // Two groups issue in turn, so that one has its products while the other has its softmax. Barrier 4 + group lets a group go.
    constexpr bool TURNS = GROUPS == 2 && !WINDOW;
    if (TURNS && group == 1) pair_arrive(4);
    const auto settle = [&]() {
#pragma unroll
        for (int panel = 0; panel < PANELS; ++panel) wgmma_settle(o[panel]);
    };
    // Products are issued on every path: in a branch of their own the assembler would wait for each. After the last item they are of no use.
    const auto start_scores = [&]() {
        const bool more = start();
        if (more) barrier_wait(key_full(n), phase(n, STAGES));
        issue_scores();
        return more;
    };
    bool more = start_scores();
    while (more) {
        Softmax state;
        // How far a lane's two rows see, in columns of the tile.
        const auto find_last = [&](int ahead, int (&last)[2]) {
            const int line = warp * 16 + g;
            last[0] = ahead - 2 * t + (line & (length - 1));
            last[1] = ahead - 2 * t + ((line + 8) & (length - 1));
        };
        // Makes probabilities of the scores; whether a reference moved.
        const auto probabilities = [&](auto look) {
            wgmma_settle(s);
            if (lane == 0) barrier_arrive(key_empty(n));
            if (ahead < KEYS - 1 || (WINDOW && ahead + length > p.window)) {
                int last[2];
                find_last(ahead, last);
                hide(s, last, WINDOW ? p.window : 0);
            }
            ahead -= KEYS;
            bool moved = false;
            if constexpr (decltype(look)::value) moved = look_up(s, state, p.scale);
            float sums[2];
            soften(s, state, p.scale, sums);
            state.sum[0] += sums[0];
            state.sum[1] += sums[1];
            return moved;
        };
#pragma unroll
        for (int panel = 0; panel < PANELS; ++panel)
#pragma unroll
            for (int i = 0; i < 32; ++i) o[panel][i] = 0;
        wgmma_wait<0>();
        probabilities(std::true_type());
        pack(weights, s);
        for (++n; n != end; ++n) {
            // The next tile's scores and this one's outputs are under way while the next one's softmax waits for its scores only.
            barrier_wait(key_full(n), phase(n, STAGES));
            if constexpr (TURNS) pair_sync(4 + group);
            issue_scores();
            issue_values();
            if constexpr (TURNS) pair_arrive(5 - group);
            wgmma_wait<1>();
            const bool moved = probabilities(std::bool_constant<WINDOW>());
            now(state.sum[0] + state.sum[1]);
            wgmma_settle(s);
            wgmma_wait<0>();
            settle();
            if (lane == 0) barrier_arrive(value_empty(n - 1));
            if (moved) {
#pragma unroll
                for (int panel = 0; panel < PANELS; ++panel)
#pragma unroll
                    for (int i = 0; i < 32; ++i) o[panel][i] *= state.rescale[i / 2 % 2];
            }
            pack(weights, s);
        }
        // The last outputs, and the next item's first scores while they are written.
        issue_values();
        const uint32_t place = slot(), empty = query_empty(group, item), value = value_empty(n - 1);
        ++item;
        more = start_scores();
        wgmma_wait<1>();
        settle();
        if (lane == 0) barrier_arrive(value);
        const uint32_t note = items + place * sizeof(Item);
        if constexpr (!WINDOW) {
            bool over[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                int high = !(state.sum[r] < Softmax::MOST);
                high |= __shfl_xor_sync(~0u, high, 1);
                over[r] = high | __shfl_xor_sync(~0u, high, 2);
            }
            if (__any_sync(~0u, over[0] || over[1])) {
                const int first = load_shared_32(note), count = load_shared_32(note + 4) * KEYS;
                const size_t at = static_cast<size_t>(load_shared_32(note + 24)) * 128;
                int last[2];
                find_last(first, last);
                redo<PANELS>(o, state, over, queries + place * PANELS * QUERIES, QUERIES, p.keys + at, p.values + at, static_cast<size_t>(p.lines) * 128, count, last,
                             warp * 16, p.scale);
            }
        }
        float factor[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int line = warp * 16 + g + 8 * r;
            factor[r] = inverse_of(state, r, load_shared_f32(note + 32 + (line >> length_shift) * 4));
        }
        deliver<PANELS>(p, o, factor, queries + place * PANELS * QUERIES, note, group + 1, empty);
    }
    wgmma_wait<0>();
    if (warp == 0) bulk_wait();
}
#endif

namespace window {
constexpr int GROUPS = 4;           // of 8 rows by 8 heads
constexpr int ROWS = GROUPS * 8;
constexpr int KEYS = 144;           // of a group: a window of 128 for each of 8 rows, from a multiple of 8 on
constexpr int LINES = 128 + 40;     // of a block: the groups' keys start up to 24 lines apart
constexpr int STAGES = 2;
constexpr int THREADS = (GROUPS + 1) * 128;
constexpr int TILE = LINES * 128;
}  // namespace window

// Windows of at most 128 keys, 8 query heads a key/value head: what a row sees fits in one tile.
KERNEL __launch_bounds__(window::THREADS, 1) attention_prefill_window(const __grid_constant__ Params p) {
#ifdef HOPPER
    using namespace window;
    using hopper::Item;
    using hopper::QUERIES;
    extern __shared__ __align__(1024) char window_memory[];
    const uint32_t queries = shared_address(window_memory), keys = queries + GROUPS * STAGES * QUERIES;
    const uint32_t values = keys + STAGES * TILE, items = values + STAGES * TILE, barriers = items + GROUPS * STAGES * sizeof(Item);
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const auto lines_full = [&](uint32_t n) { return barriers + 8 * (n % STAGES); };
    const auto lines_empty = [&](uint32_t n) { return barriers + 8 * (STAGES + n % STAGES); };
    const auto query_full = [&](int group, uint32_t n) { return barriers + 8 * (2 * STAGES * (group + 1) + n % STAGES); };
    const auto query_empty = [&](int group, uint32_t n) { return query_full(group, n) + 8 * STAGES; };
    const auto phase = [](uint32_t n) { return n / STAGES % 2; };
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(lines_full(i), 1);
            barrier_init(lines_empty(i), GROUPS * 4);
        }
        for (int i = 0; i < GROUPS * 2 * STAGES; ++i) barrier_init(barriers + 8 * (2 * STAGES + i), i / STAGES % 2 ? 128 : 32);
        barrier_init_fence();
    }
    // Lines that a block has no use for are multiplied by zero: they must be numbers.
    for (int at = threadIdx.x * 16; at < STAGES * TILE; at += THREADS * 16) store_shared_zeros(values + at);
    shared_proxy_fence();
    pdl_launch();
    __syncthreads();
    pdl_wait();
    if (group == GROUPS) {
        registers_shrink<32>();
        if (warp == 0) proxy_fence();
        hopper::Walk walk;
        Run run;
        int head;
        uint32_t n = 0;
        for (bool more = true; more; ++n) {
            more = walk.next<true>(p, ROWS, run, head);
            Item item = {};
            const uint32_t stage = n % STAGES, slot = warp * STAGES + stage;
            const int begin = run.begin & ~7;
            if (more && warp == 0 && lane == 0) {
                const uint32_t bytes = (((run.end + 7) & ~7) - begin) * 128;
                const size_t at = (static_cast<size_t>(head / p.group) * p.lines + run.line + begin) * 128;
                barrier_wait(lines_empty(n), phase(n) ^ 1);
                barrier_expect(lines_full(n), 2 * bytes);
                bulk_load(keys + stage * TILE, p.keys + at, bytes, lines_full(n));
                bulk_load(values + stage * TILE, p.values + at, bytes, lines_full(n));
            }
            __syncwarp();
            if (more) {
                const int position = run.position + warp * 8, start = (first_visible(position, p.window) - run.base) & ~7;
                item.row = run.row + warp * 8;
                item.rows = max(min(run.rows - warp * 8, 8), 0);
                item.ahead = position - run.base - start;
                item.tiles = 1;
                item.head = head;
                item.skip = start - begin;
            }
            barrier_wait(query_empty(warp, n), phase(n) ^ 1);
            if (more) hopper::bring_queries<1>(p, queries + slot * QUERIES, item.row, item.rows, head);
            hopper::announce(p, item, items + slot * sizeof(Item), query_full(warp, n));
        }
        return;
    }
    registers_grow<112>();
    const int g = lane / 4, t = lane % 4;
    for (uint32_t n = 0;; ++n) {
        const uint32_t stage = n % STAGES, slot = group * STAGES + stage, note = items + slot * sizeof(Item);
        barrier_wait(query_full(group, n), phase(n));
        if (load_shared_32(note + 4) == 0) break;
        const int ahead = load_shared_32(note), skip = load_shared_32(note + 20) * 128;
        barrier_wait(lines_full(n), phase(n));
        Softmax state;
        uint32_t weights[KEYS / 16][4];
        {
            float s[KEYS / 2];
            scores<1>(s, queries + slot * QUERIES, 0, keys + stage * TILE + skip, 0);
            wgmma_wait<0>();
            wgmma_settle(s);
            const int last[2] = {ahead + g - 2 * t, ahead + g - 2 * t};
            if (p.window == 128 && ahead >= 127) {
                hide<0, 16>(s, last, 128);
                hide<128, 144>(s, last, 128);
            } else {
                hide(s, last, p.window);
            }
            look_up(s, state, p.scale);
            soften(s, state, p.scale, state.sum);
            pack(weights, s);
        }
        float o[1][32];
#pragma unroll
        for (int i = 0; i < 32; ++i) o[0][i] = 0;
        add_values<1>(o, weights, values + stage * TILE + skip, 0);
        float factor[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) factor[r] = inverse_of(state, r, load_shared_f32(note + 32 + (warp * 2 + r) * 4));
        wgmma_wait<0>();
        wgmma_settle(o[0]);
        if (lane == 0) barrier_arrive(lines_empty(n));
        hopper::deliver<1>(p, o, factor, queries + slot * QUERIES, note, group + 1, query_empty(group, n));
    }
    if (warp == 0) bulk_wait();
#endif
}

#ifdef HOPPER
#define HOPPER_BODY(...) __VA_ARGS__
#else
#define HOPPER_BODY(...)
#endif
#define KERNEL_OF(NAME, DIM, WINDOW)                                                                                       \
    KERNEL __launch_bounds__(hopper::Plan<DIM>::THREADS, 1) attention_prefill_##NAME(const __grid_constant__ Params p) { \
        HOPPER_BODY(attention_hopper<DIM, WINDOW>(p);)                                                                   \
    }
KERNEL_OF(hopper, 64, false)
KERNEL_OF(hopper_any, 64, true)
KERNEL_OF(hopper_128, 128, false)
KERNEL_OF(hopper_any_128, 128, true)
