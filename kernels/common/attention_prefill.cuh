// The work of attention_prefill.cu: what its kernels are given, how they cut it, and how queries come and outputs go.
#pragma once
#include "common/attention_hopper.cuh"

struct Params {
    const __nv_bfloat16* q;  // [rows, heads * DIM], rotated
    const char* keys;        // [kv_heads][DIM / 64][lines][64], swizzled
    const char* values;
    Sequences sequences;
    const float* sinks;      // [heads] or null
    void* out;               // bf16 [rows, heads * DIM], row-major or panels
    int heads;
    int group;               // query heads of a key/value head
    int lines;               // of a head
    int window;              // 0 is none
    int capacity;            // rows of the panels of `out`; 0 is row-major
    float scale;             // times log2(e)
    int pack_shift;          // log2 of the query heads of a tile's rows: they have one key/value head
    int runs;                // at least the runs of all sequences
};

// A block's run of rows and the lines it needs.
struct Run {
    int row, rows;      // in the batch
    int position;       // of its first row
    int line;           // of the sequence's first visible position
    int base;           // that position
    int begin, end;     // lines needed, from `line`
};

// Rows of a sequence from its `skipped`-th on, at most `length`.
DEVICE void cut(const Params& p, const Place& place, int skipped, int length, Run& run) {
    run.row = place.first_row + skipped;
    run.rows = min(place.rows - skipped, length);
    run.position = place.start + skipped;
    run.base = first_visible(place.start, p.window);
    run.line = place.line;
    run.begin = first_visible(run.position, p.window) - run.base;
    run.end = run.position + run.rows - run.base;
}

DEVICE bool find_run(const Params& p, int item, int length, Run& run) {
    const Place place = find_place<true>(p.sequences, p.window, item, length);
    if (place.rows == 0) return false;
    // The last rows of a sequence see most: they come first.
    cut(p, place, ((place.rows + length - 1) / length - 1 - (item - place.run)) * length, length, run);
    return true;
}

// Runs of at most 32 sequences in the order of what they see, those that see most first, by lengths of `length` positions ("levels").
DEVICE bool find_longest(const Params& p, int item, int length, Run& run) {
    const int lane = threadIdx.x % 32, s = p.sequences.first + min(lane, p.sequences.count - 1);
    const bool there = lane < p.sequences.count;
    const int first_row = p.sequences.first_row[s], rows = there ? p.sequences.row_count[s] : 0, start = p.sequences.start[s];
    const int begin = start / length, end = begin + (rows + length - 1) / length;  // levels of this lane's sequence
    // Runs of a level and above.
    const auto above = [&](int level) { return static_cast<int>(__reduce_add_sync(~0u, max(end - max(level, begin), 0))); };
    if (item >= above(0)) return false;
    int level = 0;
    for (int high = __reduce_max_sync(~0u, end); high - level > 1;) {
        const int middle = (level + high) / 2;
        if (above(middle) > item)
            level = middle;
        else
            high = middle;
    }
    const int rank = item - above(level + 1);
    const bool has = begin <= level && level < end;
    const uint32_t all = __ballot_sync(~0u, has);
    const int from = __ffs(__ballot_sync(~0u, has && __popc(all & ((1u << lane) - 1)) == rank)) - 1;
    const int own = there ? (start + rows - first_visible(start, p.window) + LINES - 1) / LINES * LINES : 0;
    const int line = __reduce_add_sync(~0u, lane < from ? own : 0);
    const Place place{p.sequences.first + from, __shfl_sync(~0u, first_row, from), __shfl_sync(~0u, rows, from), __shfl_sync(~0u, start, from), line, 0};
    cut(p, place, (level - place.start / length) * length, length, run);
    return true;
}

namespace hopper {
constexpr int QUERIES = 64 * 128;  // bytes of 64 dimensions of a group's rows
constexpr int SLOTS = 2;  // of a group's queries

// What a group does next.
struct Item {
    int ahead;      // position of the first row less that of the first tile's first key
    int tiles;      // none: there are no more items
    int row, rows;  // of the batch; may be none
    int head;       // first query head
    int skip;       // lines of the block's before the group's first
    int line;       // of the first tile's first key, in its head's first panel
    int unused;
    float sinks[8];
};

#ifdef HOPPER
// Walks over the items of this block: long ones come first, so blocks take turns in going first.
struct Walk {
    int round = 0;
    template <bool WINDOW> __device__ __forceinline__ bool next(const Params& p, int rows, Run& run, int& head) {
        const int sets = p.heads >> p.pack_shift, blocks = gridDim.x;
        const int item = round * blocks + (round % 2 ? blocks - 1 - blockIdx.x : blockIdx.x);
        ++round;
        if (item >= p.runs * sets) return false;
        // Where rows see a window all items are alike.
        const bool mixed = !WINDOW && p.sequences.count > 1 && p.sequences.count <= 32;
        if (mixed ? !find_longest(p, item / sets, rows, run) : !find_run(p, item / sets, rows, run)) return false;
        head = (item % sets) << p.pack_shift;
        return true;
    }
};

// Puts a group's outputs where its queries were, as they will lie in memory, copies them out, and gives the queries' place back. Each lane answers
// for what it read of the queries and of their note.
template <int PANELS>
DEVICE void deliver(const Params& p, const float (&o)[PANELS][32], const float (&factor)[2], uint32_t q, uint32_t note, int barrier, uint32_t empty) {
    constexpr int DIM = PANELS * 64;
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int length_shift = 6 - p.pack_shift, length = 1 << length_shift;
    const int first_row = load_shared_32(note + 8), rows = load_shared_32(note + 12), head = load_shared_32(note + 16);
    const int line = warp * 16 + lane / 8 % 2 * 8 + lane % 8, row = line & (length - 1), chunk = lane / 16;
    const int turn = (first_row + row) & 7;
    group_sync(barrier);  // nobody's products read the queries any more
#pragma unroll
    for (int panel = 0; panel < PANELS; ++panel)
#pragma unroll
        for (int n = 0; n < 8; n += 2) {
            const uint32_t to = p.capacity ? q + panel * QUERIES + line * 128 + (((chunk + n) ^ turn) << 4)
                                           : q + ((row << p.pack_shift) + (line >> length_shift)) * DIM * 2 + panel * 128 + (chunk + n) * 16;
            const float* from = &o[panel][4 * n];
            store_matrices(to, pack2<__nv_bfloat16>(from[0] * factor[0], from[1] * factor[0]), pack2<__nv_bfloat16>(from[2] * factor[1], from[3] * factor[1]),
                           pack2<__nv_bfloat16>(from[4] * factor[0], from[5] * factor[0]), pack2<__nv_bfloat16>(from[6] * factor[1], from[7] * factor[1]));
        }
    shared_proxy_fence();
    group_sync(barrier);
    if (warp != 0) {
        barrier_arrive(empty);
        return;
    }
    const int heads = 1 << p.pack_shift;
    char* out = static_cast<char*>(p.out);
    if (p.capacity) {
        const int panel = lane >> p.pack_shift, member = lane & (heads - 1);
        if (rows > 0 && panel < PANELS)
            bulk_store(out + (static_cast<size_t>((head + member) * PANELS + panel) * p.capacity + first_row) * 128,
                       q + panel * QUERIES + member * length * 128, rows * 128);
    } else {
        for (int r = lane; r < rows; r += 32)
            bulk_store(out + (static_cast<size_t>(first_row + r) * p.heads + head) * DIM * 2, q + (r << p.pack_shift) * DIM * 2, heads * DIM * 2);
    }
    bulk_commit();
    bulk_wait_read();
    barrier_arrive(empty);
}

// Brings a group's queries: 64 lines, of `rows` (or none) from `row` on by the heads from `head` on.
template <int PANELS> DEVICE void bring_queries(const Params& p, uint32_t to, int row, int rows, int head) {
    constexpr int DIM = PANELS * 64;
    const int lane = threadIdx.x % 32, length_shift = 6 - p.pack_shift;
    const __nv_bfloat16* from = p.q + lane % 8 * 8;
#pragma unroll 4
    for (int i = 0; i < 16 * PANELS; ++i) {
        const int line = i / PANELS * 4 + lane / 8, panel = i % PANELS, ahead = line & ((1 << length_shift) - 1);
        const bool there = ahead < rows;
        const size_t at = there ? static_cast<size_t>(row + ahead) * p.heads + head + (line >> length_shift) : 0;
        copy_async_16(to + panel * QUERIES + line * 128 + ((lane % 8 ^ (line & 7)) << 4), from + at * DIM + panel * 64, there ? 16 : 0);
    }
    copy_commit();
    copy_wait<0>();
}

// Leaves a note for the group, once its queries are there. Each lane answers for what it brought and wrote.
DEVICE void announce(const Params& p, const Item& item, uint32_t note, uint32_t full) {
    const int lane = threadIdx.x % 32;
    if (lane == 0) {
        store_shared_32(note, item.ahead);
        store_shared_32(note + 4, item.tiles);
        store_shared_32(note + 8, item.row);
        store_shared_32(note + 12, item.rows);
        store_shared_32(note + 16, item.head);
        store_shared_32(note + 20, item.skip);
        store_shared_32(note + 24, item.line);
    }
    if (lane < 8) store_shared_f32(note + 32 + lane * 4, p.sinks && lane >> p.pack_shift == 0 && item.tiles > 0 ? p.sinks[item.head + lane] : -INFINITY);
    shared_proxy_fence();
    barrier_arrive(full);
}
#endif
}  // namespace hopper
