// Attention of decode rows (one new token a sequence) over the paged cache, split over its length. The new token is appended
// first: the block that covers its position rounds it, stores it, and attends over what it stored.
//
// A block takes the (up to 8) query heads of one key/value head over one stretch of positions. Its warps take tiles of keys in
// turn, each through its own ring of asynchronous copies. S^T = K Q^T has keys as rows and query heads as columns;
// O^T = V^T P^T has dimensions as rows. What warps found meets in shared memory, what blocks of a cluster found in that of each
// other, and what clusters found in global memory, where the last to arrive has the last word. All sums are in order of position.
//
// Where the new tokens come as `kv`, a block reads the step's description and the cache before its pdl_wait. That is sound when some
// kernel between the one that wrote the description and this one (embed) lets its successor start only after its own pdl_wait, and none
// between them writes what the cache has from earlier steps.
#include "common/attention.cuh"
#include "common/inbox.cuh"

struct Params {
    const __nv_bfloat16* q;  // [rows, heads * 64], rotated
    const float* kv;         // [rows, 2 * kv_heads * 64]: rotated keys, then values; null where the cache has them already
    Cache cache;
    Tables tables;        // row r is sequence r
    const int* position;  // [rows]
    const int* slot;      // [rows]: page * page_size + offset of the new token; negative is nowhere
    const int* live;      // rows to do
    const float* sinks;   // [heads] or null
    void* out;            // bf16 [rows, heads * 64], row-major or panels
    float* partial;       // [rows][kv_heads][8][clusters][PARTIAL], where there are several
    int* arrived;         // [rows][kv_heads][8], zero before and after
    int group;            // query heads of a key/value head, 1..8
    int capacity;         // rows of the panels of `out`; 0 is row-major
    int depth_shift;      // log2 of the tiles that every warp of a cluster has before another cluster is used
    float scale;          // times log2(e)
};

constexpr int STAGES = 3;
constexpr int GROUP = 8;
// The outputs of a head, not yet divided, its peak, its sum.
constexpr int PARTIAL = HEAD_DIM + 2;
// Keeps products of probabilities and value scales in the normal range of fp16.
constexpr float P_SCALE = 1024.0f;
constexpr int MERGE_STRIDE = HEAD_DIM + 4;
constexpr int BATCH = 8;  // parts that are read at once

template <bool FP8> struct Shape {
    static constexpr int KEYS = FP8 ? 32 : 16;  // of a tile
    static constexpr int LINE = FP8 ? 64 : 128;
    static constexpr int VALUES = KEYS * LINE;  // offset in a stage
    static constexpr int SCALES = 2 * KEYS * LINE;
    static constexpr int STAGE = SCALES + (FP8 ? 2 * KEYS * 4 : 0);
    static constexpr int PAGES = KEYS / 16;
};

// Row of S^T to key within 8. With e4m3 neighbours are swapped in every other pair, so that the value lines that the lanes of a
// quad read together lie in different banks.
template <bool FP8> DEVICE int key_of(int row) { return FP8 ? row ^ ((row >> 1) & 1) : row; }
template <bool FP8> DEVICE int key_chunk(int key, int chunk) { return FP8 ? chunk : chunk ^ ((key & 1) << 2); }
template <bool FP8> DEVICE int value_chunk(int key, int chunk) { return FP8 ? chunk ^ (((key >> 2) & 1) << 1) : chunk ^ (key & 7); }

// What the lanes of a block agree on.
struct Seen {
    int row, head;
    int first, last;   // positions
    int copied;        // last position to be read from the cache
    const int* table;  // by logical page
    int slot;          // of the new token
};

template <bool FP8> DEVICE void find_pages(const Params& p, const Seen& seen, int tile, int (&pages)[Shape<FP8>::PAGES]) {
#pragma unroll
    for (int i = 0; i < Shape<FP8>::PAGES; ++i) {
        const int key = tile * Shape<FP8>::KEYS + i * 16;
        // Entries of positions that are not seen may not exist.
        pages[i] = key + 15 >= seen.first && key <= seen.copied ? __ldg(seen.table + (key >> p.cache.page_shift)) : 0;
    }
}

// Copies a tile; positions that are not seen become zeros, whatever the cache has there.
template <bool FP8>
DEVICE void fetch(const Params& p, const Seen& seen, int tile, const int (&pages)[Shape<FP8>::PAGES], uint32_t stage) {
    using S = Shape<FP8>;
    constexpr int CHUNKS = S::LINE / 16, LINES = 32 / CHUNKS;
    const int lane = threadIdx.x % 32, chunk = lane % CHUNKS;
    const int mask = (1 << p.cache.page_shift) - 1;
    const size_t values = values_after_keys(p.cache);
#pragma unroll
    for (int i = 0; i < S::KEYS / LINES; ++i) {
        const int key = i * LINES + lane / CHUNKS, position = tile * S::KEYS + key;
        const uint32_t bytes = position >= seen.first && position <= seen.copied ? 16 : 0;
        const size_t token = token_of(p.cache, pages[S::PAGES == 1 ? 0 : i * LINES / 16], seen.head, position & mask);
        const char* from = p.cache.data + token * S::LINE + chunk * 16;
        copy_async_16(stage + key * S::LINE + key_chunk<FP8>(key, chunk) * 16, from, bytes);
        copy_async_16(stage + S::VALUES + key * S::LINE + value_chunk<FP8>(key, chunk) * 16, from + values * S::LINE, bytes);
    }
    if constexpr (FP8) {
        const int position = tile * S::KEYS + lane;
        const uint32_t bytes = position >= seen.first && position <= seen.copied ? 4 : 0;
        const float* from = p.cache.scales + token_of(p.cache, lane < 16 ? pages[0] : pages[1], seen.head, position & mask);
        copy_async_4(stage + S::SCALES + lane * 4, from, bytes);
        copy_async_4(stage + S::SCALES + 128 + lane * 4, from + values, bytes);
    }
}

// The new token, two dimensions of keys and two of values a lane: to the stage as its tile's line, and to the cache.
template <bool FP8> DEVICE void append(const Params& p, const Seen& seen, float2 k, float2 v, uint32_t stage) {
    using S = Shape<FP8>;
    const int lane = threadIdx.x % 32, key = seen.last % S::KEYS;
    const int slot = seen.slot, size = 1 << p.cache.page_shift;
    const size_t token = token_of(p.cache, slot >> p.cache.page_shift, seen.head, slot & (size - 1));
    const size_t values = values_after_keys(p.cache);
    // A lane's two elements and where they are in a line of chunks.
    constexpr int LANES = FP8 ? 8 : 4;
    const int chunk = lane / LANES, within = lane % LANES * (16 / LANES);
    const uint32_t to_k = stage + key * S::LINE + key_chunk<FP8>(key, chunk) * 16 + within;
    const uint32_t to_v = stage + S::VALUES + key * S::LINE + value_chunk<FP8>(key, chunk) * 16 + within;
    if constexpr (FP8) {
        const float scale_k = e4m3_scale(warp_max(fmaxf(fabsf(k.x), fabsf(k.y))));
        const float scale_v = e4m3_scale(warp_max(fmaxf(fabsf(v.x), fabsf(v.y))));
        const uint32_t code_k = to_e4m3(k.x, k.y, scale_k), code_v = to_e4m3(v.x, v.y, scale_v);
        store_shared_16(to_k, code_k);
        store_shared_16(to_v, code_v);
        if (lane == 0) {
            store_shared_f32(stage + S::SCALES + key * 4, scale_k);
            store_shared_f32(stage + S::SCALES + 128 + key * 4, scale_v);
        }
        if (slot >= 0) {
            char* data = p.cache.data + token * S::LINE + lane * 2;
            *reinterpret_cast<uint16_t*>(data) = static_cast<uint16_t>(code_k);
            *reinterpret_cast<uint16_t*>(data + values * S::LINE) = static_cast<uint16_t>(code_v);
            if (lane == 0) {
                p.cache.scales[token] = scale_k;
                p.cache.scales[token + values] = scale_v;
            }
        }
    } else {
        const uint32_t pair_k = pack2<__nv_bfloat16>(k.x, k.y), pair_v = pack2<__nv_bfloat16>(v.x, v.y);
        store_shared_32(to_k, pair_k);
        store_shared_32(to_v, pair_v);
        if (slot >= 0) {
            char* data = p.cache.data + token * S::LINE + lane * 4;
            *reinterpret_cast<uint32_t*>(data) = pair_k;
            *reinterpret_cast<uint32_t*>(data + values * S::LINE) = pair_v;
        }
    }
    __syncwarp();
}

// Queries as operand B: lane (g, t) has head g. The order of the dimensions is that in which `attend` meets the keys'. Missing heads
// repeat the last one; their results are not written.
template <bool FP8> DEVICE void load_queries(const Params& p, const Seen& seen, uint32_t (&q)[8]) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const size_t at = (static_cast<size_t>(seen.row) * p.cache.kv_heads + seen.head) * p.group + min(g, p.group - 1);
    const uint4* from = reinterpret_cast<const uint4*>(p.q + at * HEAD_DIM);
    const uint4 a = from[FP8 ? 2 * t : t], b = from[FP8 ? 2 * t + 1 : t + 4];
    const uint32_t words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if constexpr (FP8) {
            const float low = __uint_as_float(words[i] << 16), high = __uint_as_float(words[i] & 0xffff0000u);
            q[i] = pack2<__half>(fminf(fmaxf(low, -65504.0f), 65504.0f), fminf(fmaxf(high, -65504.0f), 65504.0f));
        } else {
            q[i] = words[i];
        }
    }
}

template <bool FP8> struct State {
    float o[4][4];       // O^T: four tiles of 16 dimensions by 8 heads
    float peak[2], sum[2];  // heads 2t, 2t + 1; sums of this lane's keys only
};

template <bool FP8>
DEVICE void attend(const Params& p, const Seen& seen, int tile, uint32_t stage, const uint32_t (&q)[8], State<FP8>& state) {
    using S = Shape<FP8>;
    constexpr int BLOCKS = S::KEYS / 16;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int row = key_of<FP8>(g);
    float s[BLOCKS][4], weight[BLOCKS][2];
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
        s[b][0] = s[b][1] = s[b][2] = s[b][3] = 0;
        const uint32_t low = stage + (b * 16 + row) * S::LINE, high = low + 8 * S::LINE;
#pragma unroll
        for (int half = 0; half < (FP8 ? 1 : 2); ++half) {
            const int at = key_chunk<FP8>(row, t + 4 * half) * 16;
            const uint4 x = load_shared_16(low + at), y = load_shared_16(high + at);
            const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
            if constexpr (FP8) {
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    mma_fp16(s[b], e4m3_to_half2(xs[i]), e4m3_to_half2(ys[i]), e4m3_to_half2(xs[i] >> 16), e4m3_to_half2(ys[i] >> 16),
                             q[2 * i], q[2 * i + 1]);
            } else {
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    mma_bf16(s[b], xs[2 * i], ys[2 * i], xs[2 * i + 1], ys[2 * i + 1], q[4 * half + 2 * i], q[4 * half + 2 * i + 1]);
            }
        }
    }
    float peak[2] = {state.peak[0], state.peak[1]};
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int key = b * 16 + r * 8 + row, position = tile * S::KEYS + key;
            const bool visible = position >= seen.first && position <= seen.last;
            float factor = p.scale;
            if constexpr (FP8) {
                factor *= load_shared_f32(stage + S::SCALES + key * 4);
                weight[b][r] = load_shared_f32(stage + S::SCALES + 128 + key * 4) * P_SCALE;
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float& v = s[b][2 * r + e];
                v = visible ? v * factor : -INFINITY;
                peak[e] = fmaxf(peak[e], v);
            }
        }
    float rescale[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) peak[e] = fmaxf(peak[e], __shfl_xor_sync(~0u, peak[e], step));
        rescale[e] = exp2_fast(state.peak[e] - peak[e]);
        state.peak[e] = peak[e];
        state.sum[e] *= rescale[e];
    }
#pragma unroll
    for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) state.o[m][i] *= rescale[i & 1];
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
        uint32_t probabilities[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float x = exp2_fast(s[b][2 * r] - peak[0]), y = exp2_fast(s[b][2 * r + 1] - peak[1]);
            state.sum[0] += x;
            state.sum[1] += y;
            if constexpr (FP8)
                probabilities[r] = pack2<__half>(fminf(x * weight[b][r], 65504.0f), fminf(y * weight[b][r], 65504.0f));
            else
                probabilities[r] = pack2<__nv_bfloat16>(x, y);
            // From (key, pair of heads) to (head, pair of keys).
            probabilities[r] = transpose_8x8(probabilities[r]);
        }
        const uint32_t values = stage + S::VALUES + b * 16 * S::LINE;
        if constexpr (FP8) {
            // Lane (g, t) has dimensions 8g.. of the keys in rows 2t, 2t + 1, 2t + 8, 2t + 9 of S^T.
            const uint32_t at = values + 2 * t * S::LINE + value_chunk<FP8>(2 * t, g / 2) * 16 + g % 2 * 8;
            const uint32_t even = at + (t & 1) * S::LINE, odd = at + (~t & 1) * S::LINE;
            const uint2 a = load_shared_8(even), c = load_shared_8(odd);
            const uint2 d = load_shared_8(even + 8 * S::LINE), e = load_shared_8(odd + 8 * S::LINE);
            const uint32_t as[2] = {a.x, a.y}, cs[2] = {c.x, c.y}, ds[2] = {d.x, d.y}, es[2] = {e.x, e.y};
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                const uint32_t select = m % 2 == 0 ? 0x5140 : 0x7362;
                const uint32_t low = __byte_perm(as[m / 2], cs[m / 2], select), high = __byte_perm(ds[m / 2], es[m / 2], select);
                mma_fp16(state.o[m], e4m3_to_half2(low), e4m3_to_half2(low >> 16), e4m3_to_half2(high), e4m3_to_half2(high >> 16),
                         probabilities[0], probabilities[1]);
            }
        } else {
            const int key = lane % 8 + lane / 16 * 8;
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                const int chunk = 2 * m + lane / 8 % 2;
                const uint4 v = load_matrices_transposed(values + key * S::LINE + value_chunk<FP8>(key, chunk) * 16);
                mma_bf16(state.o[m], v.x, v.y, v.z, v.w, probabilities[0], probabilities[1]);
            }
        }
    }
}

template <bool FP8> DEVICE int dimension(int m, int upper, int g) { return FP8 ? 8 * g + 2 * m + upper : 16 * m + 8 * upper + g; }

// A lane's two dimensions of query head `member`, divided and written.
DEVICE void finish(const Params& p, const Seen& seen, int member, Part part, float sink) {
    if (member >= p.group) return;
    const int heads = p.cache.kv_heads * p.group, head = seen.head * p.group + member;
    const float inverse = 1.0f / (part.sum + exp2_fast(sink * LOG2E - part.peak));
    char* to = output_at(p.out, seen.row, head, threadIdx.x % 32 * 2, heads, p.capacity);
    *reinterpret_cast<uint32_t*>(to) = pack2<__nv_bfloat16>(part.o.x * inverse, part.o.y * inverse);
}

// CLUSTER blocks of WARPS warps each take consecutive stretches of a row's positions. The grid is (CLUSTER * kv_heads, rows, clusters): blocks
// that short rows have no use for come last.
template <bool FP8, int WARPS, int CLUSTER> DEVICE void attention_decode(const Params& p) {
    using S = Shape<FP8>;
    extern __shared__ __align__(128) char shared[];
    __shared__ float peaks[WARPS][GROUP], sums[WARPS][GROUP];
    // Parts that the blocks of the cluster sent: by block, then query head.
    constexpr int MINE = CLUSTER > 1 ? GROUP / CLUSTER : 1;
    __shared__ __align__(16) float inbox[CLUSTER][MINE][PARTIAL];
    __shared__ __align__(8) uint64_t inbox_full;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int rank = blockIdx.x % CLUSTER, cluster = blockIdx.z, clusters = gridDim.z;
    // Query heads that this warp has the last word on, of those of its cluster.
    constexpr int MEMBERS = WARPS * CLUSTER >= GROUP ? 1 : GROUP / (WARPS * CLUSTER);
    const auto member_at = [&](int i) { return rank + CLUSTER * (warp + WARPS * i); };
    Seen seen;
    seen.head = blockIdx.x / CLUSTER;
    seen.row = blockIdx.y;
    pdl_launch();
    if constexpr (CLUSTER > 1) {
        if (threadIdx.x == 0) inbox_open(shared_address(&inbox_full), sizeof(inbox));
        __syncwarp();
        cluster_arrive();
    }
    float sinks[MEMBERS];
#pragma unroll
    for (int i = 0; i < MEMBERS; ++i)
        sinks[i] = p.sinks && member_at(i) < p.group ? p.sinks[seen.head * p.group + member_at(i)] : -INFINITY;
    // With the new token in hand nothing that the kernel before writes is needed to fetch what the cache has.
    const bool ahead = p.kv != nullptr;
    if (!ahead) pdl_wait();
    // No branch before the last of these loads, so that they take one round trip. What rows beyond the live ones have is not used.
    const bool live = seen.row < *p.live;
    const int position = p.position[seen.row];
    seen.slot = p.slot[seen.row];
    seen.table = table_of(p.tables, seen.row);
    seen.last = live ? position : 0;
    seen.first = first_visible(seen.last, p.cache.window);
    seen.copied = p.kv ? seen.last - 1 : seen.last;

    // Tiles start at multiples of their length, so that none crosses a page (or a half of one, a page).
    const int first_tile = seen.first / S::KEYS, tiles = seen.last / S::KEYS + 1 - first_tile;
    const auto ceiling = [](int a, int b) { return (a + b - 1) / b; };
    const int wanted = min((tiles - 1) / (CLUSTER * WARPS) >> p.depth_shift, clusters - 1) + 1;
    int each = ceiling(tiles, CLUSTER * WARPS) * WARPS, used = 1;  // tiles of a block, clusters
    if (wanted > 1) {
        each = ceiling(tiles, wanted * CLUSTER * WARPS) * WARPS;
        used = ceiling(tiles, each * CLUSTER);
    }
    if (!live || cluster >= used) {
        // This grid must not end before the kernel before it. One block that waits is enough: the others make room for the next kernel.
        if (ahead && seen.row == 0 && cluster == 0) pdl_wait();
        return;
    }
    const int begin = first_tile + (cluster * CLUSTER + rank) * each, end = min(begin + each, first_tile + tiles);
    const int count = max((end - begin - warp + WARPS - 1) / WARPS, 0);
    const auto tile_at = [&](int i) { return begin + warp + i * WARPS; };

    char* mine = shared + warp * STAGES * S::STAGE;
    const uint32_t ring = shared_address(mine);
    int early[STAGES][S::PAGES];
#pragma unroll
    for (int i = 0; i < STAGES; ++i)
        if (i < count) find_pages<FP8>(p, seen, tile_at(i), early[i]);
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (i < count) fetch<FP8>(p, seen, tile_at(i), early[i], ring + i * S::STAGE);
        copy_commit();
    }
    int pages[S::PAGES];
#pragma unroll
    for (int i = 0; i < S::PAGES; ++i) pages[i] = early[STAGES - 1][i];
    if (ahead) pdl_wait();
    const bool appends = ahead && count > 0 && tile_at(count - 1) == seen.last / S::KEYS;
    float2 k = make_float2(0, 0), v = k;
    if (appends) {
        const int width = p.cache.kv_heads * HEAD_DIM;
        const float* from = p.kv + static_cast<size_t>(seen.row) * 2 * width + seen.head * HEAD_DIM + lane * 2;
        k = *reinterpret_cast<const float2*>(from);
        v = *reinterpret_cast<const float2*>(from + width);
    }
    uint32_t q[8];
    load_queries<FP8>(p, seen, q);

    State<FP8> state;
#pragma unroll
    for (int m = 0; m < 4; ++m) state.o[m][0] = state.o[m][1] = state.o[m][2] = state.o[m][3] = 0;
    state.peak[0] = state.peak[1] = -INFINITY;
    state.sum[0] = state.sum[1] = 0;
    for (int i = 0; i < count; ++i) {
        copy_wait<STAGES - 2>();
        // After it every lane sees tile i, and has done with the stage that is filled next.
        __syncwarp();
        const int next = i + STAGES - 1;
        if (next < count) {
            fetch<FP8>(p, seen, tile_at(next), pages, ring + next % STAGES * S::STAGE);
            if (next + 1 < count) find_pages<FP8>(p, seen, tile_at(next + 1), pages);
        }
        copy_commit();
        const uint32_t stage = ring + i % STAGES * S::STAGE;
        if (appends && i == count - 1) append<FP8>(p, seen, k, v, stage);
        attend<FP8>(p, seen, tile_at(i), stage, q, state);
    }

    // Warps meet. Each leaves what it found where its ring was.
    __syncwarp();
    float* merged = reinterpret_cast<float*>(mine);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) state.sum[e] += __shfl_xor_sync(~0u, state.sum[e], step);
        if (g == 0) {
            peaks[warp][2 * t + e] = state.peak[e];
            sums[warp][2 * t + e] = state.sum[e];
        }
#pragma unroll
        for (int m = 0; m < 4; ++m)
#pragma unroll
            for (int upper = 0; upper < 2; ++upper)
                merged[(2 * t + e) * MERGE_STRIDE + dimension<FP8>(m, upper, g)] = state.o[m][2 * upper + e] * (FP8 ? 1 / P_SCALE : 1);
    }
    __syncthreads();
    const auto of_block = [&](int member) {
        Part parts[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float* from = reinterpret_cast<const float*>(shared + w * STAGES * S::STAGE) + member * MERGE_STRIDE + 2 * lane;
            parts[w] = Part{*reinterpret_cast<const float2*>(from), peaks[w][member], sums[w][member]};
        }
        return merge(nothing(), parts);
    };
    if constexpr (CLUSTER > 1) {
        static_assert(WARPS == GROUP, "a warp sends one query head's part");
        const Part part = of_block(warp);
        const uint32_t to = shared_address(inbox[rank][warp / CLUSTER]), full = shared_address(&inbox_full);
        cluster_wait();  // all have opened their inboxes, long ago
        send(to + 8 * lane, full, warp % CLUSTER, part.o);
        if (lane == 0) send(to + 4 * HEAD_DIM, full, warp % CLUSTER, make_float2(part.peak, part.sum));
    }
#pragma unroll
    for (int i = 0; i < MEMBERS; ++i) {
        const int member = member_at(i);
        if (member >= GROUP) break;
        Part part;
        if constexpr (CLUSTER > 1) {
            Part parts[CLUSTER];
            inbox_wait(shared_address(&inbox_full));
#pragma unroll
            for (int r = 0; r < CLUSTER; ++r) {
                const float* from = inbox[r][member / CLUSTER];
                parts[r] = Part{*reinterpret_cast<const float2*>(from + 2 * lane), from[HEAD_DIM], from[HEAD_DIM + 1]};
            }
            part = merge(nothing(), parts);
        } else {
            part = of_block(member);
        }
        if (used > 1) {
            // Clusters meet: each leaves its part, the last to come reads all.
            const int pair = (seen.row * p.cache.kv_heads + seen.head) * GROUP + member;
            float* all = p.partial + static_cast<size_t>(pair) * clusters * PARTIAL;
            float* own = all + cluster * PARTIAL;
            *reinterpret_cast<float2*>(own + 2 * lane) = part.o;
            if (lane == 0) *reinterpret_cast<float2*>(own + HEAD_DIM) = make_float2(part.peak, part.sum);
            __syncwarp();
            int order = 0;
            if (lane == 0) order = arrive(p.arrived + pair);
            if (__shfl_sync(~0u, order, 0) != used - 1) continue;
            __syncwarp();
            if (lane == 0) p.arrived[pair] = 0;
            part = nothing();
            for (int start = 0; start < used; start += BATCH) {
                Part parts[BATCH];
#pragma unroll
                for (int c = 0; c < BATCH; ++c) {
                    const float* from = all + min(start + c, used - 1) * PARTIAL;
                    const float2 o = __ldcg(reinterpret_cast<const float2*>(from + 2 * lane));
                    const float2 rest = __ldcg(reinterpret_cast<const float2*>(from + HEAD_DIM));
                    // Beyond the end the last part was read again; it does not count.
                    parts[c] = start + c < used ? Part{o, rest.x, rest.y} : nothing();
                }
                part = merge(part, parts);
            }
        }
        finish(p, seen, member, part, sinks[i]);
    }
}

#define KERNELS(WARPS)                                                                                                                   \
    KERNEL __launch_bounds__(WARPS * 32) attention_decode_e4m3_##WARPS(const __grid_constant__ Params p) { attention_decode<true, WARPS, 1>(p); } \
    KERNEL __launch_bounds__(WARPS * 32) attention_decode_bf16_##WARPS(const __grid_constant__ Params p) { attention_decode<false, WARPS, 1>(p); }
KERNELS(4)
KERNELS(8)

// Clusters are a matter of compute capability 9.0 and newer; elsewhere these are not used.
#if __CUDA_ARCH__ >= 900
#define CLUSTERS(SIZE)                                                                                                                     \
    KERNEL __launch_bounds__(256) __cluster_dims__(SIZE, 1, 1) attention_decode_e4m3_cluster_##SIZE(const __grid_constant__ Params p) {  \
        attention_decode<true, 8, SIZE>(p);                                                                                                \
    }                                                                                                                                      \
    KERNEL __launch_bounds__(256) __cluster_dims__(SIZE, 1, 1) attention_decode_bf16_cluster_##SIZE(const __grid_constant__ Params p) {  \
        attention_decode<false, 8, SIZE>(p);                                                                                               \
    }
CLUSTERS(2)
CLUSTERS(8)
#endif
